"""kt-kernel's packed forms: scales, codes and their order in one pass over BF16 rows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moeconv.codecs.amx import BLOCK_COLS, FORMS, HALF_ROWS, LIFT, STEP_ROWS, TILE_BYTES, AmxForm
from moeconv.errors import ShapeMismatch
from moeconv.kernels.cpu.base import (
    BYTES_IN,
    BYTES_OUT,
    ELEMENTS,
    FLOATS_OUT,
    PAIR,
    TRIPLE,
    Array,
    Pair,
    Triple,
    check_array,
    rows_of,
)
from moeconv.kernels.cpu.cache import compiled, jitable
from moeconv.kernels.cpu.floats import as_f32
from moeconv.kernels.cpu.tiles import fill_4, fill_8

INF_BF16 = 0x7F80
MAGNITUDE_BF16 = np.uint16(0x7FFF)
HALF_BYTES = HALF_ROWS * TILE_BYTES
INVERSE_127 = np.float32(1) / np.float32(FORMS["amxint8"].levels)
INVERSE_112 = 1.0 / FORMS["amxint4"].levels
u2, u4, f4 = np.uint16, np.uint32, np.float32


@jitable
def _largest(source: Array) -> int:
    """Return the largest magnitude of BF16 bits, as bits."""
    top = u2(0)
    for i in range(source.size):
        top = max(top, u2(source[i] & MAGNITUDE_BF16))
    return int(top)


@jitable
def _scale(bits: int, form_bits: int) -> np.float32:
    """Return the scale of a row whose largest magnitude has these BF16 bits."""
    largest = as_f32(u4(bits << 16))
    if form_bits == 8:
        return f4(largest * INVERSE_127)
    return f4(np.float64(largest) * INVERSE_112)


@jitable
def _factors(scale: np.float32) -> tuple[np.float32, np.float32]:
    """Return (lift, inverse of the lifted scale); inverse 0 for a row of zeros."""
    if scale == f4(0):
        return f4(1), f4(0)
    inverse = f4(f4(1) / scale)
    if inverse == f4(np.inf):
        return LIFT, f4(f4(1) / f4(scale * LIFT))
    return f4(1), inverse


@jitable
def _pack_step(
    memory: Array, shape: Triple, row: int, factors: Array, out: Array, form: Pair
) -> None:
    """Fill the bytes of rows row..row + 32. shape: rows, cols, pitch; form: bits, N_BLOCK."""
    rows, cols, pitch = shape
    bits, block_rows = form
    first = row // block_rows * block_rows
    high = min(block_rows, rows - first)
    nbytes = TILE_BYTES * 16 // bits  # of a tile's columns in memory
    for left in range(0, cols, BLOCK_COLS):
        width = min(BLOCK_COLS, cols - left)
        at = (first * cols + left * high + (row - first) * width) * bits // 8
        for tile in range(width * 2 // nbytes):
            for half in range(2):
                begin = (row + half * HALF_ROWS) * pitch + left * 2 + tile * nbytes
                given = at + (2 * tile + half) * HALF_BYTES
                place = (begin, pitch, 2 * half * HALF_ROWS, given)
                if bits == 8:
                    fill_8(memory, factors, out, place)
                else:
                    fill_4(memory, factors, out, place)


@compiled((BYTES_IN, TRIPLE, FLOATS_OUT, BYTES_OUT, PAIR))
def _encode(memory: Array, shape: Triple, scales: Array, out: Array, form: Pair) -> int:
    """Fill scales [R], and out where it has room; return the first row with NaN or Inf, or -1."""
    rows, cols, pitch = shape
    factors = np.empty(2 * STEP_ROWS, f4)
    for row in range(0, rows, STEP_ROWS):
        for i in range(STEP_ROWS):
            start = (row + i) * pitch
            top = _largest(memory[start : start + cols * 2].view(u2))
            if top >= INF_BF16:
                return row + i
            scale = _scale(top, form[0])
            scales[row + i] = scale
            factors[2 * i], factors[2 * i + 1] = _factors(scale)
        if out.size:
            _pack_step(memory, shape, row, factors, out, form)
    return -1


def encode(
    values: Array, form: AmxForm, scales: npt.NDArray[np.float32], out: npt.NDArray[np.uint8] | None
) -> int:
    """Fill scales [R] and out (bytes, None: scales alone) from BF16 bits [R, C].

    Returns the first row with NaN or Inf, where it stops, or -1. Equals codecs/amx.py;
    tests/kernels/test_cpu_amx.py holds it to that.
    """
    rows, cols = values.shape
    check_array("values", values, ELEMENTS["BF16"], (rows, cols))
    packed = np.empty(0, np.uint8) if out is None else out
    room = form.nbytes(rows, cols) if out is not None else 0
    fits = scales.size == rows and packed.size == room and scales.dtype == np.float32
    if rows % STEP_ROWS or cols % form.tile_cols or not fits:
        raise ShapeMismatch(
            f"cannot pack [{rows}, {cols}] as {form.name} into {scales.size} scales and "
            f"{packed.size} bytes",
            hint=f"rows in steps of {STEP_ROWS}, columns in steps of {form.tile_cols}",
        )
    taken = rows_of(values)
    shape = (rows, cols, taken.pitch)
    return int(_encode(taken.memory, shape, scales, packed, (form.bits, form.block_rows)))


def encode_part(name: str, part: str, values: Array, out: npt.NDArray[np.uint8]) -> int:
    """Fill the bytes of a form's "weight" or "scale" from BF16 bits [R, C]; return as `encode`."""
    form = FORMS[name]
    if part == "scale":
        return encode(values, form, out.view(np.float32), None)
    return encode(values, form, np.empty(values.shape[0], np.float32), out)
