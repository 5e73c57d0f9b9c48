"""How fast a GPU is: copies to, from and on it, and every kernel beside the copy on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from moeconv.codecs.amx import FORMS
from moeconv.codecs.base import Window
from moeconv.kernels.gpu import amx, kernel_of
from moeconv.kernels.gpu.base import Kernel, Output, Parts
from moeconv.measure.cases import Case, Tile, cases
from moeconv.measure.figures import Device, Rates, rate_key

Run = Callable[[], object]


class Effort(NamedTuple):
    """What one launch decodes and one copy moves; medians of `repeats` of so many `launches`."""

    tile: Tile = Tile(8192, 8192)  # 128 MiB of BF16: more than a GPU's cache
    nbytes: int = 256 << 20
    launches: int = 10
    repeats: int = 3
    ahead: int = 64  # copies of `nbytes` on the device, that run while launches are prepared


class _Clock:
    """Runs on the current device, and how long they take there.

    `busy`: keeps the device busy while runs are launched. A launch may take Python longer than the
    run takes the device; what the device waits for is not its own speed.
    """

    def __init__(self, device: torch.device, effort: Effort, busy: Run) -> None:
        self.cuda = device.type == "cuda"
        self.effort = effort
        self.busy = busy

    def rate(self, run: Run, nbytes: int) -> float:
        """Return the GB/s of a run of `nbytes`, after one that is not counted: it may compile."""
        run()
        seconds = self._events if self.cuda else self._clock
        found = [seconds(run) for _ in range(self.effort.repeats)]
        return nbytes * self.effort.launches / median(found) / 1e9

    def _events(self, run: Run) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self.busy()
        start.record()
        for _ in range(self.effort.launches):
            run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def _clock(self, run: Run) -> float:
        start = time.perf_counter()
        for _ in range(self.effort.launches):
            run()
        return time.perf_counter() - start


def measure_device(
    device: torch.device, start_seconds: float, effort: Effort, say: Callable[[str, str], None]
) -> Device:
    """Return what a device does; `start_seconds` are those of a conversion that uses it."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return _measured(device, start_seconds, effort, say)


def _measured(
    device: torch.device, start_seconds: float, effort: Effort, say: Callable[[str, str], None]
) -> Device:
    say("the device", "copies")
    host = torch.empty(effort.nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there, other = (torch.empty_like(host, device=device) for _ in range(2))
    clock = _Clock(device, effort, lambda: [other.copy_(there) for _ in range(effort.ahead)])
    up = clock.rate(lambda: there.copy_(host, non_blocking=True), effort.nbytes)
    down = clock.rate(lambda: host.copy_(there, non_blocking=True), effort.nbytes)
    copy = clock.rate(lambda: other.copy_(there), 2 * effort.nbytes)
    rates = {}
    for key, title, run, moved in _runs(device, effort.tile):
        say("the device", title)
        out_nbytes, all_nbytes = moved
        one, roof = clock.rate(run, out_nbytes), copy * out_nbytes / all_nbytes
        rates[key] = Rates(title, one, one, roof, roof)
    return Device(start_seconds, up, down, copy, rates)


def _runs(device: torch.device, tile: Tile) -> Iterator[tuple[str, str, Run, tuple[int, int]]]:
    """Yield key, title, run of each kernel, and its bytes: of BF16, and all read and written."""
    nbytes = tile.rows * tile.cols * 2
    bits = torch.empty(tile, dtype=torch.int16, device=device)
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    for case in cases(tile):
        kernel = kernel_of(case.kernel)
        if kernel is None:
            continue
        parts = _parts(case, device)
        read = sum(part.nbytes for part in parts.values())
        run = _decode(kernel, case, parts, Output("BF16", bits, counts))
        yield rate_key(case.kernel, case.params), case.title, run, (nbytes, read + nbytes)
    for name, form in FORMS.items():
        packed = torch.empty(form.nbytes(*tile), dtype=torch.uint8, device=device)
        run = _encode(bits.zero_(), name, packed)
        yield name, f"{name}: quantize and pack", run, (nbytes, nbytes + packed.nbytes)


def _parts(case: Case, device: torch.device) -> Parts:
    return {part: _tensor(array, case).to(device) for part, array in case.parts.items()}


def _tensor(array: npt.NDArray[Any], case: Case) -> torch.Tensor:
    """Return a part as kernels take it: F16 comes as its bits."""
    if array.dtype == np.uint16 and case.params.get("dtype") == "F16":
        return torch.from_numpy(array.view(np.int16)).view(torch.float16)
    return torch.from_numpy(np.array(array))


def _decode(kernel: Kernel, case: Case, parts: Parts, out: Output) -> Run:
    window = Window(0, out.bits.shape[0], 0, out.bits.shape[1])
    return lambda: kernel(parts, window, case.params, out)


def _encode(values: torch.Tensor, name: str, packed: torch.Tensor) -> Run:
    bad = torch.full((1,), -1, dtype=torch.int64, device=values.device)
    return lambda: amx.encode(values, name, "weight", packed, bad)
