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
    PAIR,
    TRIPLE,
    Array,
    Pair,
    Triple,
    check_array,
    nb,
    rows_of,
)
from moeconv.kernels.cpu.cache import compiled, jitable
from moeconv.kernels.cpu.floats import as_f32, as_u4
from moeconv.kernels.cpu.squares import turn_square

FLOATS_OUT = nb.Array(nb.float32, 1, "C", aligned=False)
INF_BF16 = 0x7F80
MAGNITUDE_BF16 = np.uint16(0x7FFF)
QUADS = TILE_BYTES // 4  # words of 4 codes per row of a tile
HALF_BYTES = HALF_ROWS * TILE_BYTES
SIDE = 4  # of a square of 32-bit words that is turned in registers: a quad each
INVERSE_127 = np.float32(1) / np.float32(FORMS["amxint8"].levels)
INVERSE_112 = 1.0 / FORMS["amxint4"].levels
# Adding 1.5 * 2^23 leaves the nearest even integer in the low bits.
ROUNDER = np.float32(12582912.0)
ROUNDER_BITS = np.int32(0x4B400000)
u1, u2, u4 = np.uint8, np.uint16, np.uint32
f4, i4 = np.float32, np.int32


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
def _round(bits: np.uint16, lift: np.float32, inverse: np.float32) -> np.int32:
    """Return a BF16 value over its row's scale, as the nearest even integer; below 2^22."""
    value = f4(as_f32(u4(u4(bits) << u4(16))) * lift)
    return i4(i4(as_u4(f4(f4(value * inverse) + ROUNDER))) - ROUNDER_BITS)


@jitable
def _nibble(code: np.int32) -> np.int32:
    """Return the upper four bits of an 8-bit code, rounded, halves away from zero."""
    magnitude = i4(i4(abs(code)) + i4(8)) >> i4(4)
    return i4(-magnitude) if code < i4(0) else magnitude


@jitable
def _quantize_8(source: Array, factors: tuple[np.float32, np.float32], codes: Array) -> None:
    """Fill bytes [N] from BF16 [N]; a row of a strip at a time, so that the loop is a long one."""
    lift, inverse = factors
    for j in range(source.size):
        codes[j] = u1(_round(source[j], lift, inverse))


@jitable
def _quantize_4(source: Array, factors: tuple[np.float32, np.float32], codes: Array) -> None:
    """Fill 64 bytes from 128 BF16: the first 64 in the low nibbles."""
    lift, inverse = factors
    for j in range(TILE_BYTES):
        low = _nibble(_round(source[j], lift, inverse))
        high = _nibble(_round(source[j + TILE_BYTES], lift, inverse))
        codes[j] = u1((low & i4(15)) | ((high & i4(15)) << i4(4)))


@jitable
def _transpose(words: Array, at: int, pitch: int, out: Array) -> None:
    """Fill uint32 out [16 quads, 16 rows] from words [16 rows, 16 quads] that begin at `at`."""
    for row in range(0, HALF_ROWS, SIDE):
        for quad in range(0, HALF_ROWS, SIDE):
            read = (at + row * pitch + quad, pitch)
            turn_square(words, out, read, (quad * HALF_ROWS + row, HALF_ROWS))


@jitable
def _quantize(memory: Array, pitch: int, width: int, work: tuple[Array, Array], bits: int) -> int:
    """Fill the strip with the bytes of 16 rows of `width` columns; return how many a row has.

    Row r begins at byte r * pitch of memory. work: (lift, inverse) of each row, the strip.
    """
    factors, strip = work
    nbytes = width * bits // 8
    for row in range(HALF_ROWS):
        source = memory[row * pitch : row * pitch + width * 2].view(u2)
        given = strip[row * nbytes : row * nbytes + nbytes]
        pair = (factors[2 * row], factors[2 * row + 1])
        if bits == 8:
            _quantize_8(source, pair, given)
        else:
            for at in range(0, nbytes, TILE_BYTES):
                tile = source[2 * at : 2 * at + 2 * TILE_BYTES]
                _quantize_4(tile, pair, given[at : at + TILE_BYTES])
    return nbytes


@jitable
def _pack_step(
    memory: Array, shape: Triple, row: int, work: tuple[Array, Array], out: Array, form: Pair
) -> None:
    """Fill the bytes of rows row..row + 32. shape: rows, cols, pitch; form: bits, N_BLOCK."""
    rows, cols, pitch = shape
    bits, block_rows = form
    factors, strip = work
    first = row // block_rows * block_rows
    high = min(block_rows, rows - first)
    for left in range(0, cols, BLOCK_COLS):
        width = min(BLOCK_COLS, cols - left)
        at = (first * cols + left * high + (row - first) * width) * bits // 8
        for half in range(2):
            taken = memory[(row + half * HALF_ROWS) * pitch + left * 2 :]
            pair = (factors[2 * half * HALF_ROWS :], strip)
            nbytes = _quantize(taken, pitch, width, pair, bits)
            for tile in range(nbytes // TILE_BYTES):
                begin = at + (2 * tile + half) * HALF_BYTES
                given = out[begin : begin + HALF_BYTES].view(u4)
                _transpose(strip.view(u4), tile * HALF_ROWS, nbytes // 4, given)


@compiled((BYTES_IN, TRIPLE, FLOATS_OUT, BYTES_OUT, PAIR))
def _encode(memory: Array, shape: Triple, scales: Array, out: Array, form: Pair) -> int:
    """Fill scales [R], and out where it has room; return the first row with NaN or Inf, or -1."""
    rows, cols, pitch = shape
    factors = np.empty(2 * STEP_ROWS, f4)
    strip = np.empty(HALF_ROWS * min(cols, BLOCK_COLS) * form[0] // 8, u1)
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
            _pack_step(memory, shape, row, (factors, strip), out, form)
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
