"""What is read of a weight: the bytes of its parts that a window needs, and these in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moeconv.codecs import CODECS
from moeconv.codecs.base import PartSlice, Window, part_slice
from moeconv.store.buffers import Buffer, BufferPool
from moeconv.store.reader import Reader
from moeconv.store.strides import runs_per_read
from moeconv.types import DTYPE_BITS, TensorRef, Weight

Array = npt.NDArray[Any]

# How the elements of a stored dtype lie in numpy; anything else is bytes.
NUMPY_DTYPES: Mapping[str, npt.DTypeLike] = {
    "BF16": np.uint16,
    "F16": np.uint16,
    "F32": np.float32,
    "F64": np.float64,
    "I16": np.int16,
    "U16": np.uint16,
    "I32": np.int32,
    "U32": np.uint32,
    "I64": np.int64,
    "U64": np.uint64,
}


class PartRead(NamedTuple):
    """The bytes of a part that a window needs: `runs` runs of `run` bytes every `stride` bytes."""

    part: str
    ref: TensorRef
    offset: int
    stride: int
    run: int
    runs: int

    @property
    def nbytes(self) -> int:
        return self.run * self.runs

    @property
    def scratch_nbytes(self) -> int:
        """Return the most memory that Reader.read_strided takes beside the buffer."""
        if self.stride == self.run or self.runs < 2:
            return 0
        at_once = min(runs_per_read(self.stride, self.run, self.runs), self.runs)
        return 0 if at_once == 1 else at_once * self.stride

    @property
    def asked_nbytes(self) -> int:
        """Return the bytes that are read: gaps that are short with what lies around them."""
        return self.stride * self.runs if self.scratch_nbytes else self.nbytes


def element_nbytes(dtype: str) -> int:
    """Return the bytes of one stored element; GGML blocks are stored as bytes."""
    return DTYPE_BITS.get(dtype, 8) // 8


def part_reads(weight: Weight, slot: int, window: Window) -> tuple[PartRead, ...]:
    """Return what to read for a block-aligned window of one slot of a weight."""
    tiles = CODECS[weight.codec].tiles(weight.params)
    reads = []
    for part, tile in tiles.items():
        ref = weight.parts.get(part)
        if ref is not None:
            reads.append(_read(part, ref, slot, part_slice(tile, window, weight)))
    return tuple(reads)


def _read(part: str, ref: TensorRef, slot: int, wanted: PartSlice) -> PartRead:
    width = element_nbytes(ref.dtype)
    majors, minors = wanted.extent
    stride = minors * width
    start = ref.offset + slot * majors * stride + wanted.major.start * stride
    if wanted.minor.length == minors:  # whole lines lie side by side
        return PartRead(part, ref, start, stride, stride, wanted.major.length)
    run = wanted.minor.length * width
    start += wanted.minor.start * width
    return PartRead(part, ref, start, stride, run, wanted.major.length)


def read_parts(
    reader: Reader, pool: BufferPool, reads: tuple[PartRead, ...], phase: int | None = None
) -> tuple[dict[str, Array], list[Buffer]]:
    """Return every part's elements [major, minor], and the buffers to give back with them.

    `phase`: what the addresses are congruent to; None: to where the parts lie in their files.
    """
    buffers = [pool.take(one.nbytes, one.offset if phase is None else phase) for one in reads]
    whole: dict[str, list[tuple[int, Array]]] = {}
    for read, buffer in zip(reads, buffers, strict=True):
        if read.stride == read.run:
            whole.setdefault(read.ref.file, []).append((read.offset, buffer.array))
        else:
            reader.read_strided(
                read.ref.file, read.offset, read.stride, read.run, read.runs, buffer.array
            )
    for file, ranges in whole.items():
        reader.read_ranges(file, ranges)
    parts = {
        one.part: _elements(one, buffer.array) for one, buffer in zip(reads, buffers, strict=True)
    }
    return parts, buffers


def _elements(read: PartRead, memory: Array) -> Array:
    dtype = NUMPY_DTYPES.get(read.ref.dtype, np.uint8)
    if not read.nbytes:
        return np.empty((read.runs, 0), dtype)
    return memory.view(dtype).reshape(read.runs, -1)
