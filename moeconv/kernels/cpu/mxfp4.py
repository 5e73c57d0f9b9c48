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
    TABLE,
    TRIPLE,
    Array,
    Counts,
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
    """Return the lowest scale of a value that is not finite, and [scales * bytes, 3] counts."""
    wide = value_bits("F32") & u4(0x7FFFFFFF)  # [256, 16]
    top = INFINITIES[dtype]
    ends_inf = (value_bits(dtype) & MAGNITUDES[dtype]) == top
    finite = wide < u4(0x7F800000)
    kinds = (wide > u4(0x7F800000), wide == u4(0x7F800000), ends_inf & finite)
    each = np.stack(kinds, axis=-1).astype(np.uint8)  # [256, 16, 3]
    codes = np.arange(256)
    pairs = (each[:, codes & 15] + each[:, codes >> 4]).reshape(-1, 3)
    return int(np.argmax(each.any(axis=(1, 2)))), pairs


@jitable
def _decode_row_16(codes: Array, scales: Array, table: Array, pairs: Array) -> None:
    """Fill a row of uint32 pairs; the inner loop has a constant trip count and no branch."""
    for group in range(scales.size):
        entry = np.int64(scales[group]) * 256
        entries = table[entry : entry + 256]
        taken = codes[group * PAIRS : group * PAIRS + PAIRS]
        given = pairs[group * PAIRS : group * PAIRS + PAIRS]
        for j in range(PAIRS):
            given[j] = entries[taken[j]]


@jitable
def _decode_row_32(codes: Array, scales: Array, table: Array, pairs: Array) -> None:
    """Fill a row of uint64 pairs of float32.

    Every MXFP4 value is a BF16 number, whose bits are the top half of the float32's.
    """
    for group in range(scales.size):
        entry = np.int64(scales[group]) * 256
        entries = table[entry : entry + 256]
        taken = codes[group * PAIRS : group * PAIRS + PAIRS]
        given = pairs[group * PAIRS : group * PAIRS + PAIRS]
        for j in range(PAIRS):
            pair = u8(entries[taken[j]])
            given[j] = u8(u8(pair & u8(0xFFFF)) << u8(16)) | u8(u8(pair >> u8(16)) << u8(48))


@compiled((BYTES_IN, BYTES_IN, TABLE, BYTES_OUT, TRIPLE, TRIPLE))
def _decode(
    codes: Array,
    scales: Array,
    table: Array,
    out: Array,
    pitches: Triple,
    shape: Triple,
) -> None:
    """Fill `out`. pitches: bytes per row of the arrays; shape: rows, groups, bytes per element."""
    rows, groups, width = shape
    for row in range(rows):
        taken = codes[row * pitches[0] : row * pitches[0] + groups * PAIRS]
        scale = scales[row * pitches[1] : row * pitches[1] + groups]
        given = out[row * pitches[2] : row * pitches[2] + groups * GROUP * width]
        if width == 2:
            _decode_row_16(taken, scale, table, given.view(u4))
        else:
            _decode_row_32(taken, scale, table, given.view(u8))


def decode(
    parts: Mapping[str, Array], window: Window, params: Params, out_dtype: str, out: Array
) -> Counts:
    """Fill `out` [R, C] from `blocks` [R, C/2] and `scales` [R, C/32], both uint8.

    Equals codecs/mxfp4.py rounded once; tests/kernels/test_cpu_mxfp4.py holds it to that.
    """
    rows, cols = window.rows, window.cols
    codes, scales = parts["blocks"], parts["scales"]
    groups = -(-cols // GROUP)
    check_array("blocks", codes, U8, (rows, groups * PAIRS))
    check_array("scales", scales, U8, (rows, groups))
    check_array("out", out, ELEMENTS[out_dtype], (rows, groups * GROUP))
    table = pair_table("F16" if out_dtype == "F16" else "BF16")
    memory = (rows_of(codes), rows_of(scales), rows_of(out))
    pitches = (memory[0].pitch, memory[1].pitch, memory[2].pitch)
    shape = (rows, groups, out.itemsize)
    _decode(memory[0].memory, memory[1].memory, table, memory[2].memory, pitches, shape)
    return _count(codes, scales, out_dtype)


def _count(codes: Array, scales: Array, dtype: str) -> Counts:
    """Return the counts; the scales alone tell the usual case, where nothing is to be counted."""
    first, per_pair = tallies(dtype)
    if not scales.size or scales.max() < first:
        return Counts(0, 0, 0)
    rows, groups = np.nonzero(scales >= first)
    blocks = codes.reshape(*scales.shape, PAIRS)[rows, groups]  # [N, 16]
    entries = scales[rows, groups].astype(np.intp)[:, None] * 256 + blocks
    nan, inf, overflow = per_pair[entries].sum(axis=(0, 1), dtype=np.int64)
    return Counts(int(nan), int(inf), int(overflow))
