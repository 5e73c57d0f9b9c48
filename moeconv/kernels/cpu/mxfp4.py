"""MXFP4: one look-up per pair of codes, in the 64 K-entry table of all scales and bytes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from moeconv.codecs.base import Window
from moeconv.codecs.mxfp4 import E2M1, GROUP
from moeconv.kernels.cpu.base import (
    BYTES_IN,
    BYTES_OUT,
    ELEMENTS,
    INFINITIES,
    MAGNITUDES,
    PAIR,
    TABLE,
    TRIPLE,
    Array,
    Counts,
    Pair,
    Triple,
    check_array,
    rows_of,
)
from moeconv.kernels.cpu.cache import compiled, jitable
from moeconv.kernels.cpu.floats import cast
from moeconv.types import Params

E8M0_BIAS = 127  # OCP MX v1.0, 5.4
E8M0_NAN = 255
PAIRS = GROUP // 2  # bytes per scale
U8 = np.dtype(np.uint8)
u4, u8 = np.uint32, np.uint64


@cache
def value_bits(dtype: str) -> npt.NDArray[Any]:
    """Return the outputs [256 scales, 16 codes] as unsigned bits, NaN canonical."""
    exponents = np.arange(256)[:, None] - E8M0_BIAS
    values = np.ldexp(np.array(E2M1)[None, :], exponents)  # [256, 16] float64, exact
    values[E8M0_NAN] = np.nan
    bits = np.empty(values.shape, ELEMENTS[dtype])
    cast(values, ("F64", dtype), bits)
    return bits.view(f"u{bits.itemsize}")


@cache
def pair_table(dtype: str) -> npt.NDArray[np.uint32]:
    """Return 16-bit outputs [256 scales * 256 bytes] in pairs, the low nibble's in the low half."""
    bits = value_bits(dtype).astype(u4)
    codes = np.arange(256)
    table = (bits[:, codes & 15] | bits[:, codes >> 4] << u4(16)).ravel()
    table.flags.writeable = False
    return table


@cache
def tallies(dtype: str) -> tuple[int, npt.NDArray[np.uint8]]:
    """Return the lowest scale that can give NaN or Inf, and flat [scales, bytes, 3] counts."""
    wide = value_bits("F32") & u4(0x7FFFFFFF)  # [256, 16]
    top = INFINITIES[dtype]
    ends_inf = (value_bits(dtype) & MAGNITUDES[dtype]) == top
    finite = wide < u4(0x7F800000)
    kinds = (wide > u4(0x7F800000), wide == u4(0x7F800000), ends_inf & finite)
    each = np.stack(kinds, axis=-1).astype(np.uint8)  # [256, 16, 3]
    codes = np.arange(256)
    pairs = (each[:, codes & 15] + each[:, codes >> 4]).ravel()
    return int(np.argmax(each.any(axis=(1, 2)))), pairs


@jitable
def _decode_row_16(codes: Array, scales: Array, table: Array, pairs: Array) -> None:
    """Fill a row of uint32 pairs; the loop over a whole group is constant and has no branch."""
    whole = codes.size // PAIRS * PAIRS
    for group in range(whole // PAIRS):
        entry = np.int64(scales[group]) * 256
        entries = table[entry : entry + 256]
        taken = codes[group * PAIRS : group * PAIRS + PAIRS]
        given = pairs[group * PAIRS : group * PAIRS + PAIRS]
        for j in range(PAIRS):
            given[j] = entries[taken[j]]
    for j in range(whole, codes.size):  # the last group of a row may be cut short
        pairs[j] = table[np.int64(scales[whole // PAIRS]) * 256 + codes[j]]


@jitable
def _both(pair: np.uint32) -> np.uint64:
    """Return two float32 of two BF16: every MXFP4 value is one, the top half of its float32."""
    return u8(u8(pair & u4(0xFFFF)) << u8(16)) | u8(u8(pair >> u4(16)) << u8(48))


@jitable
def _decode_row_32(codes: Array, scales: Array, table: Array, pairs: Array) -> None:
    """Fill a row of uint64 pairs of float32."""
    whole = codes.size // PAIRS * PAIRS
    for group in range(whole // PAIRS):
        entry = np.int64(scales[group]) * 256
        entries = table[entry : entry + 256]
        taken = codes[group * PAIRS : group * PAIRS + PAIRS]
        given = pairs[group * PAIRS : group * PAIRS + PAIRS]
        for j in range(PAIRS):
            given[j] = _both(entries[taken[j]])
    for j in range(whole, codes.size):
        pairs[j] = _both(table[np.int64(scales[whole // PAIRS]) * 256 + codes[j]])


@compiled((BYTES_IN, BYTES_IN, TABLE, BYTES_OUT, TRIPLE, TRIPLE))
def _decode(
    codes: Array,
    scales: Array,
    table: Array,
    out: Array,
    pitches: Triple,
    shape: Triple,
) -> None:
    """Fill `out`. pitches: bytes per row of the arrays; shape: rows, pairs, bytes per element."""
    rows, pairs, width = shape
    groups = -(-pairs // PAIRS)
    for row in range(rows):
        taken = codes[row * pitches[0] : row * pitches[0] + pairs]
        scale = scales[row * pitches[1] : row * pitches[1] + groups]
        given = out[row * pitches[2] : row * pitches[2] + pairs * 2 * width]
        if width == 2:
            _decode_row_16(taken, scale, table, given.view(u4))
        else:
            _decode_row_32(taken, scale, table, given.view(u8))


@compiled((BYTES_IN, BYTES_IN, BYTES_IN, TRIPLE, PAIR))
def _count(codes: Array, scales: Array, per_pair: Array, pitches: Triple, shape: Pair) -> Triple:
    """Return the counts of rows, pairs = `shape`. pitches: of codes, scales; then `first`.

    Only scales from `first` on are looked into.
    """
    nan = inf = overflow = 0
    for row in range(shape[0]):
        for group in range(-(-shape[1] // PAIRS)):
            scale = np.int64(scales[row * pitches[1] + group])
            if scale < pitches[2]:
                continue
            for j in range(group * PAIRS, min(group * PAIRS + PAIRS, shape[1])):
                entry = (scale * 256 + codes[row * pitches[0] + j]) * 3
                nan += int(per_pair[entry])
                inf += int(per_pair[entry + 1])
                overflow += int(per_pair[entry + 2])
    return nan, inf, overflow


def decode(
    parts: Mapping[str, Array], window: Window, params: Params, out_dtype: str, out: Array
) -> Counts:
    """Fill `out` [R, C] from codes [R, C/2] and scales [R, ceil(C/32)], both uint8.

    Equals codecs/mxfp4.py rounded once; tests/kernels/test_cpu_mxfp4.py holds it to that.
    """
    rows, pairs = window.rows, -(-window.cols // 2)
    codes, scales = parts[str(params["codes"])], parts[str(params["scales"])]
    check_array("codes", codes, U8, (rows, pairs))
    check_array("scales", scales, U8, (rows, -(-pairs // PAIRS)))
    check_array("out", out, ELEMENTS[out_dtype], (rows, pairs * 2))
    table = pair_table("F16" if out_dtype == "F16" else "BF16")
    taken, scale, given = rows_of(codes), rows_of(scales), rows_of(out)
    pitches = (taken.pitch, scale.pitch, given.pitch)
    _decode(taken.memory, scale.memory, table, given.memory, pitches, (rows, pairs, out.itemsize))
    first, per_pair = tallies(out_dtype)
    if not scales.size or scales.max() < first:  # the scales alone tell the usual case
        return Counts(0, 0, 0)
    steps = (taken.pitch, scale.pitch, first)
    return Counts(*_count(taken.memory, scale.memory, per_pair, steps, (rows, pairs)))
