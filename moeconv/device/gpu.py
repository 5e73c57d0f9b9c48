"""Windows decoded on GPUs: parts up, a kernel, values down, on a stream of their own."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moeconv.codecs import CODECS, PAYLOAD_CHECKS
from moeconv.codecs.base import Window
from moeconv.decoding import KEEPING_NOTHING, decode_window, has_kernel, named
from moeconv.device.arena import Arenas, Place, aligned_nbytes
from moeconv.device.pinned import pinned_pages
from moeconv.device.ways import CPU, KERNEL, REFERENCE, way_of
from moeconv.errors import IOFailed
from moeconv.kernels.cpu import Counts
from moeconv.kernels.cpu.base import rows_of
from moeconv.kernels.gpu import amx, kernel_of
from moeconv.kernels.gpu.base import COMPILE_ERRORS, OUT_DTYPES, Output, Parts
from moeconv.kernels.gpu.rounding import round_on_device
from moeconv.store.buffers import BufferPool
from moeconv.torch_dtypes import torch_dtype
from moeconv.types import DTYPE_BITS, Weight

Array = npt.NDArray[Any]

COUNTS_NBYTES = 3 * 8
# Triton compiles a kernel on its first launch, and its interpreter patches its language meanwhile:
# one thread at a time. A launch takes microseconds; what was launched runs on all streams at once.
_LAUNCH = threading.Lock()
FAILURES: tuple[type[Exception], ...] = (RuntimeError, *COMPILE_ERRORS)  # torch raises the first


class _Lane:
    """A stream and where its counts come back to: what one window at a time uses."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.counts = torch.zeros(3, dtype=torch.int64, pin_memory=self.stream is not None)

    @contextmanager
    def use(self) -> Iterator[None]:
        """Let work go to the stream and its device.

        The device first: leaving a stream of another device would wake the one before.
        """
        with ExitStack() as stack:
            if self.stream is not None:
                stack.enter_context(torch.cuda.device(self.stream.device))
                stack.enter_context(torch.cuda.stream(self.stream))
            yield

    def wait(self) -> None:
        """Return when everything given to the stream is done; other threads run meanwhile."""
        if self.stream is not None:
            self.stream.synchronize()


class _Card:
    """One device: its arena and its lanes, one of them for references.

    What a reference allocates is torch's own, which keeps it for the stream that had it: in one
    lane it never is more than one window's.
    """

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self.device = device
        self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._lanes: list[_Lane] = []
        self._reference = _Lane(device)
        self._alone = threading.Lock()

    @contextmanager
    def lane(self, way: str) -> Iterator[_Lane]:
        """Lend a lane; there are as many as windows were ever in flight at once.

        It is waited for after an error, too: memory that is still written is not lent again.
        """
        if way == REFERENCE:
            with self._alone:
                try:
                    yield self._reference
                finally:
                    self._reference.wait()
            return
        try:
            lane = self._lanes.pop()
        except IndexError:
            lane = _Lane(self.device)
        try:
            yield lane
        finally:
            lane.wait()
            self._lanes.append(lane)


class _Room:
    """A place of an arena, handed out from its beginning."""

    def __init__(self, card: _Card, place: Place) -> None:
        self._memory = card.memory[place.offset : place.offset + place.nbytes]
        self._used = 0

    def take(self, nbytes: int) -> torch.Tensor:
        """Return the next [nbytes] uint8."""
        start = self._used
        self._used += aligned_nbytes(nbytes)
        return self._memory[start : start + nbytes]

    def upload(self, array: Array, dtype: torch.dtype) -> torch.Tensor:
        """Return the elements of a row-contiguous array on the device."""
        there = self.take(array.nbytes)
        there.copy_(_bytes_of(array), non_blocking=True)
        return there.view(dtype).reshape(array.shape)


class GpuDecoder:
    """Decodes on one or more devices, which share the windows; see decoding.Decoder.

    `max_nbytes`: no window with its parts and output may take more.
    """

    def __init__(self, devices: Sequence[torch.device], arena_nbytes: int) -> None:
        self._cards = tuple(_Card(device, arena_nbytes) for device in devices)
        self._arenas = Arenas([arena_nbytes] * len(devices))
        self._pinned = all(device.type == "cuda" for device in devices)
        self._pool = KEEPING_NOTHING
        self.max_nbytes = arena_nbytes

    def any_order(self, weight: Weight) -> bool:
        """Return whether the GPU decodes it, whose kernels write along any axis, or a kernel."""
        return way_of(weight) != CPU or has_kernel(weight)

    def pool(self, max_nbytes: int) -> BufferPool:
        """Return a pool of page-locked memory, which the CPU's tiles are taken from, too."""
        if self._pinned:
            make = partial(pinned_pages, device=self._cards[0].device)
            self._pool = BufferPool(max_nbytes, make)
        else:
            self._pool = BufferPool(max_nbytes)
        return self._pool

    def close(self) -> None:
        """Give the devices' memory back; nothing may be decoding."""
        self._cards = ()
        if self._pinned:
            with suppress(RuntimeError):  # after a device failed, which was said
                torch.cuda.empty_cache()

    def decode(
        self, weight: Weight, parts: Mapping[str, Array], window: Window, dtype: str, out: Array
    ) -> Counts:
        """Fill out [rows, cols], contiguous along rows or columns; return what it holds.

        BadSource for numbers that the codec refuses; IOFailed where a device fails.
        """
        way = way_of(weight)
        if way == CPU:
            return decode_window(weight, parts, window, dtype, out, self._pool)
        if weight.codec in PAYLOAD_CHECKS:
            with named(weight):
                PAYLOAD_CHECKS[weight.codec](parts, window, weight.params)
        nbytes = sum(aligned_nbytes(array.nbytes) for array in parts.values())
        nbytes += aligned_nbytes(out.nbytes) + aligned_nbytes(COUNTS_NBYTES)
        with self._arenas.lent(nbytes) as place, self._failures(place, weight.name):
            card = self._cards[place.card]
            room = _Room(card, place)
            with card.lane(way) as lane, lane.use():
                given = {
                    part: room.upload(array, _dtype(weight.parts[part].dtype, way))
                    for part, array in parts.items()
                }
                there = room.take(out.nbytes).view(OUT_DTYPES[dtype])
                flat = out if out.flags.c_contiguous else out.T
                bits = there.reshape(flat.shape)
                bits = bits if flat is out else bits.T
                counts = room.take(COUNTS_NBYTES).view(torch.int64).zero_()
                run = _by_kernel if way == KERNEL else _by_reference
                run(weight, given, window, Output(dtype, bits, counts))
                _bytes_of(flat).copy_(there.view(torch.uint8), non_blocking=True)
                lane.counts.copy_(counts, non_blocking=True)
                lane.wait()
                return Counts(*lane.counts.tolist())

    def encode(self, form: str, part: str, values: Array, out: Array) -> int:
        """Fill the bytes `out` with a packed part of BF16 bits [rows, cols], rows contiguous."""
        rows = rows_of(values)  # with what lies between the rows: it is in locked memory as well
        nbytes = sum(map(aligned_nbytes, (rows.memory.nbytes, out.nbytes, COUNTS_NBYTES)))
        with self._arenas.lent(nbytes) as place, self._failures(place, form):
            card = self._cards[place.card]
            room = _Room(card, place)
            with card.lane(KERNEL) as lane, lane.use():
                stored = room.take(rows.memory.nbytes)
                stored.copy_(_bytes_of(rows.memory), non_blocking=True)
                given = stored.view(torch.int16).as_strided(values.shape, (rows.pitch // 2, 1))
                there = room.take(out.nbytes)
                bad = room.take(COUNTS_NBYTES).view(torch.int64).fill_(-1)
                with _LAUNCH:
                    amx.encode(given, form, part, there, bad[:1])
                _bytes_of(out).copy_(there, non_blocking=True)
                lane.counts.copy_(bad, non_blocking=True)
                lane.wait()
                return int(lane.counts[0])

    @contextmanager
    def _failures(self, place: Place, what: str) -> Iterator[None]:
        """Raise IOFailed for what torch or Triton raise: the same command continues."""
        try:
            yield
        except FAILURES as error:
            device = self._cards[place.card].device
            said = str(error).strip() or type(error).__name__
            raise IOFailed(
                f"{device} failed while decoding '{what}': {said.splitlines()[0]}",
                hint="the same command continues; with --device cpu it needs no GPU",
            ) from error


def _by_kernel(weight: Weight, parts: Parts, window: Window, out: Output) -> None:
    kernel = kernel_of(weight.codec, turned=weight.transposed)
    assert kernel is not None  # way_of looked
    if weight.transposed:  # as stored: parts, window and output
        window = window.turned
        out = out._replace(bits=out.bits.T)
    with _LAUNCH:
        kernel(parts, window, weight.params, out)


def _by_reference(weight: Weight, parts: Parts, window: Window, out: Output) -> None:
    turned = {part: stored.T for part, stored in parts.items()} if weight.transposed else parts
    with torch.no_grad():
        values = CODECS[weight.codec].decode(turned, window, weight.params).float()
        round_on_device(values, out)


def _dtype(dtype: str, way: str) -> torch.dtype:
    """Return what a part's elements are on the device: kernels take one-byte floats as bytes."""
    if dtype not in DTYPE_BITS or (way == KERNEL and dtype.startswith("F8_")):
        return torch.uint8
    return torch_dtype(dtype)


def _bytes_of(array: Array) -> torch.Tensor:
    """Return the bytes of a contiguous array as a tensor over the same memory."""
    return torch.from_numpy(array.reshape(-1).view(np.uint8))
