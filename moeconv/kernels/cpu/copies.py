"""Copies between any strides, and the count of NaN and Inf: what needs no codec."""

from __future__ import annotations

import numpy as np

from moeconv.errors import ShapeMismatch
from moeconv.kernels.cpu.base import (
    BYTES_IN,
    BYTES_OUT,
    ELEMENTS,
    INFINITIES,
    INT,
    PAIR,
    TRIPLE,
    Array,
    Pair,
    Triple,
    is_row_contiguous,
    rows_of,
)
from moeconv.kernels.cpu.cache import compiled, jitable
from moeconv.kernels.cpu.squares import NBYTES, turn_square

BLOCK_NBYTES = 128  # of a row of the source: two lines, which are fetched together
RUN_NBYTES = 512  # that are written of a row before the next one
# Of what lies in the second-level cache single lines are written, which the processor sees coming;
# not where rows are so many bytes apart: their lines would drive each other out of the caches.
CLOSE_NBYTES, LINE_NBYTES, CLASHING_NBYTES = 4 << 20, 64, 2048
CHUNK = 8192  # bytes between two looks at the largest magnitude
u2, u4 = np.uint16, np.uint32


def copy_into(dst: Array, src: Array) -> None:
    """Copy `src` [R, C] into `dst` [R, C] of the same element width; bits stay as they are.

    Where one runs along rows and the other along columns, tile by tile.
    """
    if dst.shape != src.shape or dst.itemsize != src.itemsize or dst.ndim != 2:
        raise ShapeMismatch(
            f"cannot copy {src.dtype} {src.shape} into {dst.dtype} {dst.shape}",
            hint="pass two matrices of one shape and one element width",
        )
    unsigned = f"u{dst.itemsize}"
    dst, src = dst.view(unsigned), src.view(unsigned)
    if not is_row_contiguous(dst):
        dst, src = dst.T, src.T
    if dst.itemsize in (1, 2, 4) and _crossed(dst, src):
        given, taken = rows_of(dst), rows_of(src.T)
        shape = (*dst.shape, dst.itemsize)
        _transpose(taken.memory, given.memory, (taken.pitch, given.pitch), shape)
    else:
        np.copyto(dst, src)  # frees the GIL; rows that are contiguous in both go by memcpy


def _crossed(dst: Array, src: Array) -> bool:
    """Return whether `dst` runs along rows and `src` along columns, in whole elements."""
    return (
        not is_row_contiguous(src)
        and is_row_contiguous(dst)
        and is_row_contiguous(src.T)
        and dst.strides[0] % dst.itemsize == 0
        and src.strides[1] % src.itemsize == 0
    )


@jitable
def _transpose_edge(source: Array, out: Array, pitches: Pair, shape: Pair) -> None:
    """Fill out [rows, cols] from source [cols, rows], element by element."""
    for row in range(shape[0]):
        for col in range(shape[1]):
            out[row * pitches[1] + col] = source[col * pitches[0] + row]


@jitable
def _transpose_block(source: Array, out: Array, pitches: Pair, shape: Pair) -> None:
    """Fill out [rows, cols] from source [cols, rows], multiples of a square's side."""
    side = NBYTES // out.itemsize
    for row in range(0, shape[0], side):
        for col in range(0, shape[1], side):
            read, write = (col * pitches[0] + row, pitches[0]), (row * pitches[1] + col, pitches[1])
            turn_square(source, out, read, write)


@jitable
def transpose(source: Array, out: Array, pitches: Pair, shape: Pair) -> None:
    """Fill out [rows, cols] from source [cols, rows]; `pitches` in elements."""
    side, block = NBYTES // out.itemsize, BLOCK_NBYTES // out.itemsize
    rows, cols = shape[0] // side * side, shape[1] // side * side
    run = RUN_NBYTES // out.itemsize
    is_close = shape[0] * shape[1] * out.itemsize <= CLOSE_NBYTES
    if is_close and pitches[1] * out.itemsize % CLASHING_NBYTES:
        run = LINE_NBYTES // out.itemsize
    for col in range(0, cols, run):
        for row in range(0, rows, block):
            size = (min(block, rows - row), min(run, cols - col))
            taken, given = source[col * pitches[0] + row :], out[row * pitches[1] + col :]
            _transpose_block(taken, given, pitches, size)
    _transpose_edge(source[rows:], out[rows * pitches[1] :], pitches, (shape[0] - rows, cols))
    taken, given = source[cols * pitches[0] :], out[cols:]
    _transpose_edge(taken, given, pitches, (shape[0], shape[1] - cols))


@compiled((BYTES_IN, BYTES_OUT, PAIR, TRIPLE))
def _transpose(source: Array, out: Array, pitches: Pair, shape: Triple) -> None:
    """Fill out [rows, cols] from source [cols, rows]; shape: rows, cols, bytes per element."""
    size = (shape[0], shape[1])
    steps = (pitches[0] // shape[2], pitches[1] // shape[2])
    if shape[2] == 1:
        transpose(source, out, steps, size)
    elif shape[2] == 2:
        transpose(source.view(u2), out.view(u2), steps, size)
    else:
        transpose(source.view(u4), out.view(u4), steps, size)


def count_nonfinite(bits: Array, dtype: str) -> tuple[int, int]:
    """Return the NaN and Inf of a 1-D or 2-D array: BF16 or F16 as uint16 bits, or F32."""
    matrix = bits if bits.ndim == 2 else bits[None, :]
    if matrix.ndim != 2 or matrix.itemsize != ELEMENTS[dtype].itemsize:
        raise ShapeMismatch(
            f"cannot count {bits.dtype} {bits.shape} as {dtype}",
            hint="pass a vector or a matrix of the dtype's elements",
        )
    if not is_row_contiguous(matrix):
        matrix = matrix.T if is_row_contiguous(matrix.T) else np.ascontiguousarray(matrix)
    memory = rows_of(matrix)
    rows, cols = (1, matrix.size) if memory.touching else matrix.shape
    shape = (rows, cols * matrix.itemsize, memory.pitch)
    nan, inf = _count(memory.memory, shape, matrix.itemsize, INFINITIES[dtype])
    return nan, inf


@jitable
def _count_chunk(bits: Array, mask: int, inf_bits: int) -> tuple[int, int]:
    """Return NaN and Inf; the usual case is one vectorised maximum."""
    kind = bits.dtype.type
    mask, inf_bits = kind(mask), kind(inf_bits)
    top = kind(0)
    for i in range(bits.size):
        top = max(top, kind(bits[i] & mask))
    nan = inf = 0
    if top >= inf_bits:
        for i in range(bits.size):
            magnitude = kind(bits[i] & mask)
            nan += magnitude > inf_bits
            inf += magnitude == inf_bits
    return nan, inf


@compiled((BYTES_IN, TRIPLE, INT, INT))
def _count(memory: Array, shape: Triple, width: int, inf_bits: int) -> tuple[int, int]:
    """Return NaN and Inf. shape: rows, bytes per row used, bytes from row to row."""
    nan = inf = 0
    rows, used, pitch = shape
    for row in range(rows):
        for start in range(0, used, CHUNK):
            part = memory[row * pitch + start : row * pitch + min(start + CHUNK, used)]
            if width == 2:
                found = _count_chunk(part.view(u2), 0x7FFF, inf_bits)
            else:
                found = _count_chunk(part.view(u4), 0x7FFFFFFF, inf_bits)
            nan, inf = nan + found[0], inf + found[1]
    return nan, inf
