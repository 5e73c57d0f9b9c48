"""Runs of a kernel, of a roofline or of one step, in a process of its own: seconds per call."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from moeconv.codecs import amx as amx_codec
from moeconv.codecs.base import Window
from moeconv.kernels.cpu import KERNELS, amx, copy_into
from moeconv.kernels.cpu.roofline import ROOFS, read_nbytes
from moeconv.measure.cases import Case, Draw, Tile, cases
from moeconv.measure.kernels import keep_apart

Run = Callable[[], object]
CALLS = 16  # at least, between two looks at the clock
GPTQ = "GPTQ INT4"
LOADS, STORES = "loads alone", "stores alone"
WORDS, NO_ZEROS = "turning the words alone", "the same without zero points"
SCALES = "the scales alone"


class Job(NamedTuple):
    """What to run: a title of a case, of a form or of STEPS; so many tiles, in turn."""

    title: str
    tile: Tile
    tiles: int


_barrier: Any = None


def begin(barrier: object, begun: Any) -> None:
    """Take the barrier at which two of these processes meet, and a core; `begun`: how many did.

    Left to the system both are now and then on one core, for all of a short run.
    """
    global _barrier
    _barrier = barrier
    with begun.get_lock():
        keep_apart(begun.value)
        begun.value += 1


def form_title(name: str) -> str:
    """Return the title of one of kt-kernel's forms."""
    return f"{name}: quantize and pack"


def roof_title(bits: int) -> str:
    """Return the title of a roofline."""
    return f"roofline, {bits} bits"


@cache
def cases_of(tile: Tile) -> dict[str, Case]:
    """Return every case by its title."""
    return {case.title: case for case in cases(tile)}


def decode(case: Case, tile: Tile) -> Run:
    """Return a run of a kernel, in memory of its own."""
    parts, out = case.copied().parts, np.zeros(tile, np.uint16)
    window, kernel = Window(0, tile.rows, 0, tile.cols), KERNELS[case.kernel]
    return lambda: kernel(parts, window, case.params, "BF16", out)


def encode(name: str, tile: Tile, *, scales_alone: bool = False) -> Run:
    """Return a run of a packer, in memory of its own."""
    form = amx_codec.FORMS[name]
    values = (Draw().normal(*tile).view(np.uint32) >> 16).astype(np.uint16)
    scales, packed = np.zeros(tile.rows, np.float32), np.zeros(form.nbytes(*tile), np.uint8)
    return lambda: amx.encode(values, form, scales, None if scales_alone else packed)


def roof(bits: int, tile: Tile) -> Run:
    """Return a run of a roofline, in memory of its own."""
    out = np.zeros(tile.rows * tile.cols * 2, np.uint8)
    given = np.ones(read_nbytes(bits, out.size), np.uint8)
    return lambda: ROOFS[bits](given, out)


def turn(tile: Tile) -> Run:
    """Return the turning of as many words as GPTQ has."""
    words = Draw().words(tile.cols // 8, tile.rows).view(np.uint32)
    out = np.zeros((tile.rows, tile.cols // 8), np.uint32)
    return lambda: copy_into(out, words.T)


def no_zeros(tile: Tile) -> Run:
    """Return a run of GPTQ without zero points: all of them are the middle, which it checks."""
    case = cases_of(tile)[GPTQ]
    middle = np.full_like(case.parts["qzeros"], 0x77777777)
    parts = {**case.parts, "qzeros": middle}
    return decode(case._replace(parts=parts, params={**case.params, "sym": True}), tile)


def load(tile: Tile) -> Run:
    """Return the reading of a tile of BF16, by numpy."""
    given = np.ones(tile.rows * tile.cols // 4, np.uint64)
    return lambda: np.bitwise_or.reduce(given)


def store(tile: Tile) -> Run:
    """Return the filling of a tile of BF16, by numpy."""
    out = np.zeros(tile.rows * tile.cols, np.uint16)
    return lambda: out.fill(1)


STEPS: Mapping[str, Callable[[Tile], Run]] = {
    LOADS: load,
    STORES: store,
    WORDS: turn,
    NO_ZEROS: no_zeros,
    **{roof_title(bits): lambda tile, bits=bits: roof(bits, tile) for bits in ROOFS},  # type: ignore[misc]
    **{form_title(name): lambda tile, name=name: encode(name, tile) for name in amx_codec.FORMS},  # type: ignore[misc]
    SCALES: lambda tile: encode("amxint8", tile, scales_alone=True),
}


@cache
def runs_of(job: Job) -> list[Run]:
    """Return the runs of a job, each once done."""
    make = STEPS.get(job.title) or (lambda tile: decode(cases_of(tile)[job.title], tile))
    runs = [make(job.tile) for _ in range(job.tiles)]
    for run in runs:
        run()
    return runs


def seconds_per_call(jobs: Sequence[Job], seconds: float, *, together: bool) -> list[float]:
    """Return what a call of each job takes: the median of batches of calls, in turn.

    `together`: while another process does the same.
    """
    every = [runs_of(job) for job in jobs]
    batches = [runs * -(-CALLS // len(runs)) for runs in every]
    found: list[list[float]] = [[] for _ in jobs]
    if together:
        _barrier.wait()
    end = time.perf_counter() + seconds
    while not found[0] or time.perf_counter() < end:
        for batch, times in zip(batches, found, strict=True):
            start = time.perf_counter()
            for run in batch:
                run()
            times.append((time.perf_counter() - start) / len(batch))
    if together:
        _barrier.wait()
    return [median(times) for times in found]
