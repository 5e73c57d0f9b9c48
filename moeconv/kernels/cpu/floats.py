"""Rounding between BF16, F16, F32 and F64, by integer arithmetic on the bits.

Every conversion goes through float32, nearest even; NaN becomes the canonical one; a dtype to
itself is a copy, NaN payloads included. Subnormal numbers never meet a float multiplier (6-7
times slower on some CPUs, and zero where a library has set flush-to-zero).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moeconv.codecs.base import Window
from moeconv.kernels.cpu.base import (
    BYTES_IN,
    BYTES_OUT,
    ELEMENTS,
    PAIR,
    Array,
    Counts,
    Pair,
    Triple,
    check_array,
    rows_of,
)
from moeconv.kernels.cpu.cache import compiled, jitable
from moeconv.types import Params

CHUNK = 2048  # elements between two looks at the largest magnitude; 8 KiB of float32 stay in L1
BF16, F16, F32, F64, DECODED = range(5)  # DECODED: float32 whose NaN become canonical
CODES = {"BF16": BF16, "F16": F16, "F32": F32, "F64": F64}

u2, u4, u8 = np.uint16, np.uint32, np.uint64
MAGNITUDE = u4(0x7FFFFFFF)
INF = u4(0x7F800000)
NAN = u4(0x7FC00000)
# The smallest float32 that rounds to Inf: halfway past the largest finite number.
OVERFLOW_BF16 = u4(0x7F7F8000)
OVERFLOW_F16 = u4(0x477FF000)


# numba takes `.view` of a number only right after its constructor.
@jitable
def as_u4(value: np.float32) -> np.uint32:
    """Return the bits of a float32."""
    return np.float32(value).view(u4)


@jitable
def as_f32(bits: np.uint32) -> np.float32:
    """Return the float32 of these bits."""
    return u4(bits).view(np.float32)


@jitable
def as_u8(value: np.float64) -> np.uint64:
    """Return the bits of a float64."""
    return np.float64(value).view(u8)


@jitable
def as_f64(bits: np.uint64) -> np.float64:
    """Return the float64 of these bits."""
    return u8(bits).view(np.float64)


@jitable
def _widen_bf16(source: Array, wide: Array) -> None:
    for i in range(wide.size):
        bits = u4(u4(source[i]) << u4(16))
        wide[i] = NAN if (bits & MAGNITUDE) > INF else bits


@jitable
def _widen_f16(source: Array, wide: Array) -> None:
    for i in range(wide.size):
        bits = u4(source[i])
        sign = u4((bits & u4(0x8000)) << u4(16))
        magnitude = u4(bits & u4(0x7FFF))
        # A subnormal is an integer times 2^-24: exact, and a normal float32.
        integer = as_u4(np.float32(np.int32(magnitude)))
        tiny = u4(integer - u4(24 << 23)) if magnitude != 0 else u4(0)
        normal = u4(u4(magnitude << u4(13)) + u4(112 << 23))
        wider = normal if magnitude >= u4(0x400) else tiny
        wider = u4(wider + u4(112 << 23)) if magnitude >= u4(0x7C00) else wider
        wide[i] = NAN if magnitude > u4(0x7C00) else u4(sign | wider)


@jitable
def _widen_f32(source: Array, wide: Array) -> None:
    for i in range(wide.size):
        bits = source[i]
        wide[i] = NAN if (bits & MAGNITUDE) > INF else bits


@jitable
def widen_f64(source: Array, wide: Array) -> None:
    """Fill float32 bits `wide` [N], NaN canonical, from float64 bits, to nearest even."""
    for i in range(wide.size):
        bits = source[i]
        magnitude = u8(bits & u8(0x7FFFFFFFFFFFFFFF))
        sign = u8(u8(bits >> u8(32)) & u8(0x80000000))
        odd = u8(u8(magnitude >> u8(29)) & u8(1))
        normal = u8(u8(magnitude - u8(896 << 52)) + u8(0x0FFFFFFF) + odd) >> u8(29)
        normal = u8(INF) if normal > u8(INF) else normal
        # Below 2^-126: adding 2^-97, whose last bit is worth 2^-149, leaves the rounded integer.
        # At most 2^-150 rounds to zero, and so keeps float64 subnormals away from the addition.
        small = magnitude if magnitude > u8(873 << 52) else u8(0)
        tiny = u8(as_u8(as_f64(small) + np.float64(2.0**-97)) - u8(926 << 52))
        rounded = normal if magnitude >= u8(897 << 52) else tiny
        wide[i] = NAN if magnitude > u8(0x7FF << 52) else u4(sign | rounded)


@jitable
def _narrow_bf16(wide: Array, out: Array) -> None:
    for i in range(wide.size):
        bits = wide[i]
        rounded = u4(bits + u4(0x7FFF) + u4(u4(bits >> u4(16)) & u4(1))) >> u4(16)
        out[i] = u2(0x7FC0) if (bits & MAGNITUDE) > INF else u2(rounded)


@jitable
def _narrow_f16(wide: Array, out: Array) -> None:
    for i in range(wide.size):
        bits = wide[i]
        magnitude = u4(bits & MAGNITUDE)
        sign = u4(u4(bits >> u4(16)) & u4(0x8000))
        odd = u4(u4(magnitude >> u4(13)) & u4(1))
        normal = u4(u4(u4(magnitude - u4(112 << 23)) + u4(0x0FFF) + odd) >> u4(13))
        normal = u4(0x7C00) if normal > u4(0x7C00) else normal
        # Below 2^-14: adding 0.5, whose last bit is worth 2^-24, leaves the rounded integer.
        # At most 2^-25 rounds to zero.
        small = magnitude if magnitude > u4(102 << 23) else u4(0)
        tiny = u4(as_u4(np.float32(as_f32(small) + np.float32(0.5))) - u4(126 << 23))
        rounded = normal if magnitude >= u4(113 << 23) else tiny
        out[i] = u2(0x7E00) if magnitude > INF else u2(sign | rounded)


@jitable
def copy_elements(source: Array, out: Array) -> None:
    """Fill `out` with the elements of `source`, of the same size."""
    # A slice assignment looks for overlap and goes byte by byte: 4 times slower.
    for i in range(out.size):
        out[i] = source[i]


@jitable
def count_wide(wide: Array, overflow: np.uint32) -> Triple:
    """Return NaN, Inf and overflow counts of float32 bits; finite from `overflow` on is overflow.

    The usual case is one vectorised maximum.
    """
    top = u4(0)
    for i in range(wide.size):
        top = max(top, u4(wide[i] & MAGNITUDE))
    nan = inf = over = 0
    if top >= overflow:
        for i in range(wide.size):
            magnitude = u4(wide[i] & MAGNITUDE)
            nan += int(magnitude > INF)
            inf += int(magnitude == INF)
            over += int(overflow <= magnitude < INF)
    return nan, inf, over


@jitable
def overflow_of(code: int) -> np.uint32:
    """Return the bits of the smallest float32 that rounds to Inf."""
    return OVERFLOW_BF16 if code == BF16 else OVERFLOW_F16 if code == F16 else INF


@jitable
def _widen(code: int, source: Array, wide: Array) -> None:
    """Fill `wide` [N] float32 bits from the bytes of N elements."""
    if code == BF16:
        _widen_bf16(source.view(u2), wide)
    elif code == F16:
        _widen_f16(source.view(u2), wide)
    elif code != F64:
        _widen_f32(source.view(u4), wide)
    else:
        widen_f64(source.view(u8), wide)


@jitable
def narrow(code: int, wide: Array, out: Array) -> None:
    """Fill the bytes of N elements from `wide` [N] float32 bits."""
    if code == BF16:
        _narrow_bf16(wide, out.view(u2))
    elif code == F16:
        _narrow_f16(wide, out.view(u2))
    else:
        copy_elements(wide, out.view(u4))


@jitable
def _cast_row(source: Array, out: Array, scratch: Array, codes: Pair, widths: Pair) -> Triple:
    """Return the counts of the elements cast from the bytes `source` to `out`, by chunks."""
    overflow = overflow_of(codes[1])
    nan = inf = over = 0
    count = source.size // widths[0]
    for start in range(0, count, CHUNK):
        stop = min(start + CHUNK, count)
        taken = source[start * widths[0] : stop * widths[0]]
        given = out[start * widths[1] : stop * widths[1]]
        wide = scratch[: stop - start]
        _widen(codes[0], taken, wide)
        if codes[0] == codes[1]:
            copy_elements(taken.view(u2), given.view(u2))
        else:
            narrow(codes[1], wide, given)
        found = count_wide(wide, overflow)
        nan, inf, over = nan + found[0], inf + found[1], over + found[2]
    return nan, inf, over


@compiled((BYTES_IN, BYTES_OUT, PAIR, PAIR, PAIR, PAIR))
def _cast(
    source: Array, out: Array, codes: Pair, widths: Pair, pitches: Pair, shape: Pair
) -> Triple:
    """Return the counts of [rows, cols] = `shape` elements cast from `source` to `out`.

    codes, widths (bytes per element) and pitches (bytes per row): of source and out.
    """
    scratch = np.empty(CHUNK, u4)
    nan = inf = over = 0
    for row in range(shape[0]):
        taken = source[row * pitches[0] : row * pitches[0] + shape[1] * widths[0]]
        given = out[row * pitches[1] : row * pitches[1] + shape[1] * widths[1]]
        found = _cast_row(taken, given, scratch, codes, widths)
        nan, inf, over = nan + found[0], inf + found[1], over + found[2]
    return nan, inf, over


def cast(source: Array, dtypes: tuple[str, str], out: Array) -> Counts:
    """Fill `out` [R, C] with `source` [R, C]; return the counts.

    `dtypes`: (stored, output), the same one for a copy of the bits; NaN becomes canonical else.
    """
    check_array("source", source, ELEMENTS[dtypes[0]], source.shape)
    check_array("out", out, ELEMENTS[dtypes[1]], source.shape)
    return _cast_checked(source, out, (CODES[dtypes[0]], CODES[dtypes[1]]))


def round_to(out_dtype: str, source: Array, out: Array) -> Counts:
    """Fill `out` [R, C] with float32 `source` [R, C] rounded to BF16, F16 or F32.

    Unlike a copy of F32, NaN becomes the canonical one: `source` is what a decoder computed.
    """
    check_array("source", source, ELEMENTS["F32"], source.shape)
    check_array("out", out, ELEMENTS[out_dtype], source.shape)
    return _cast_checked(source, out, (DECODED, CODES[out_dtype]))


def _cast_checked(source: Array, out: Array, codes: Pair) -> Counts:
    rows, cols = source.shape
    taken, given = rows_of(source), rows_of(out)
    if taken.touching and given.touching:  # one long row
        rows, cols = 1, rows * cols
    widths = (source.itemsize, out.itemsize)
    pitches = (taken.pitch, given.pitch)
    return Counts(*_cast(taken.memory, given.memory, codes, widths, pitches, (rows, cols)))


def decode(
    parts: Mapping[str, Array], window: Window, params: Params, out_dtype: str, out: Array
) -> Counts:
    """Fill `out` [R, C] with the plain floats of `weight` [R, C].

    Equals codecs/floats.py rounded once; tests/kernels/test_cpu_floats.py holds it to that.
    """
    check_array("out", out, ELEMENTS[out_dtype], (window.rows, window.cols))
    return cast(parts["weight"], (str(params["dtype"]), out_dtype), out)
