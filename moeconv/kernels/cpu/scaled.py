"""Numbers times scales, rounded once: what the kernels of all scaled codecs share.

Where every scale of a row is tame (`limits`) and every number finite, no product can be NaN, Inf,
subnormal or too large for the output: nothing is to be counted, and float32 multiplies at full
speed. Any other row gets float64 products and integer rounding, so that subnormal float32 never
meet a multiplier (6-7 times slower on some CPUs, zero where a library has set flush-to-zero).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from math import floor, log2
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moeconv.kernels.cpu.base import Array, Pair, Triple
from moeconv.kernels.cpu.cache import jitable
from moeconv.kernels.cpu.floats import (
    INF,
    MAGNITUDE,
    as_f64,
    as_u4,
    as_u8,
    count_wide,
    narrow,
    overflow_of,
    u2,
    u4,
    u8,
    widen_f64,
)

CHUNK = 8192  # columns at a time: the scratch stays in the cache
LOWEST = 2.0**-126  # the smallest normal float32
HIGHEST: Mapping[str, float] = {"BF16": 2.0**127, "F16": 2.0**15, "F32": 2.0**127}
E8M0_BIAS, E8M0_NAN = 127, 255  # OCP MX v1.0, 5.4
f4, f8 = np.float32, np.float64


class Scratch(NamedTuple):
    """Room for CHUNK columns. Made once: a view costs as much as decoding hundreds of columns."""

    exact: Array  # uint64
    wide: Array  # uint32
    values: Array  # float32, as the rest
    scales: Array
    zeros: Array
    groups: Array
    spare: Array


@jitable
def new_scratch() -> Scratch:
    """Return room for CHUNK columns."""
    floats = np.empty((5, CHUNK), f4)
    return Scratch(
        np.empty(CHUNK, u8),
        np.empty(CHUNK, u4),
        floats[0],
        floats[1],
        floats[2],
        floats[3],
        floats[4],
    )


@cache
def limits(smallest: float, largest: float, out_dtype: str) -> Pair:
    """Return the bits of the smallest and the largest tame scale but 0.

    `smallest` and `largest`: what magnitudes the numbers can have, but 0.
    """
    high = 2.0 ** floor(log2(HIGHEST[out_dtype] / largest))
    low_bits, high_bits = np.array([LOWEST / smallest, high], f4).view(u4)
    return int(low_bits), int(high_bits)


@cache
def e8m0_table() -> npt.NDArray[np.float32]:
    """Return float32 2^(b-127) of the 256 bytes; 255 is NaN."""
    table = np.full(256, np.nan, f4)
    table[:E8M0_NAN] = np.ldexp(f4(1), np.arange(E8M0_NAN) - E8M0_BIAS)
    table.flags.writeable = False
    return table


@jitable
def are_tame(scales: Array, low: int, high: int) -> bool:
    """Return whether every scale is 0 or of a magnitude from `low` to `high` (bits)."""
    least, most = u4(low), u4(high)
    wild = u4(0)
    for i in range(scales.size):
        bits = u4(as_u4(scales[i]) & MAGNITUDE)
        wild |= u4((bits != u4(0)) & ((bits < least) | (bits > most)))
    return bool(wild == u4(0))


@jitable
def _twice(source: Array, out: Array) -> None:
    for i in range(source.size):
        value = source[i]
        out[2 * i] = value
        out[2 * i + 1] = value


@jitable
def _four_times(source: Array, out: Array) -> None:
    for i in range(source.size):
        value = source[i]
        out[4 * i] = value
        out[4 * i + 1] = value
        out[4 * i + 2] = value
        out[4 * i + 3] = value


@jitable
def _by_runs(groups: Array, group_cols: int, first: int, out: Array) -> None:
    col, group = 0, first // group_cols
    stop = group_cols - first % group_cols
    while col < out.size:
        run = out[col : min(stop, out.size)]
        value = groups[group]
        for j in range(run.size):
            run[j] = value
        col, stop, group = stop, stop + group_cols, group + 1


@jitable
def spread(groups: Array, group_cols: int, first: int, out: Array, spare: Array) -> None:
    """Fill `out` [C] with what its columns, from column `first` on, take of `groups`.

    `spare`: as long as out. Short runs are too slow one by one: they are made by doubling.
    """
    whole = out.size // group_cols
    if first % group_cols or group_cols not in (16, 32):
        whole = 0
    if whole:
        begin = first // group_cols
        taken = groups[begin : begin + whole]
        pairs, fours = spare[: 2 * whole], spare[2 * whole : 10 * whole]
        if group_cols == 32:
            _twice(taken, pairs)
            _four_times(pairs, fours)
            _four_times(fours, out[: 32 * whole])
        else:
            _four_times(taken, fours[: 4 * whole])
            _four_times(fours[: 4 * whole], out[: 16 * whole])
    done = whole * group_cols
    if done < out.size:
        _by_runs(groups, group_cols, first + done, out[done:])


@jitable
def bf16_of(value: np.float32) -> np.uint16:
    """Return the bits of a number that is not NaN, rounded to nearest even."""
    bits = as_u4(value)
    return u2(u4(bits + u4(0x7FFF) + u4(u4(bits >> u4(16)) & u4(1))) >> u4(16))


@jitable
def products(values: Array, scales: Array, exact: Array, wide: Array) -> None:
    """Fill float32 bits `wide` [N] with float32 values [N] times scales [N], whatever they are.

    exact: room for uint64 [N]. The float64 product of two float32 is exact.
    """
    for i in range(values.size):
        exact[i] = as_u8(as_f8(values[i]) * as_f8(scales[i]))
    widen_f64(exact, wide)


@jitable
def round_scaled(
    code: int, values: Array, scales: Array, scratch: Scratch, out: Array, tame: bool
) -> Triple:
    """Fill the bytes `out` with float32 values [N] times scales [N]; return the counts."""
    exact, wide = scratch.exact[: values.size], scratch.wide[: values.size]
    if tame:
        for i in range(values.size):
            wide[i] = as_u4(f4(values[i] * scales[i]))
    else:
        products(values, scales, exact, wide)
    narrow(code, wide, out)
    return count_wide(wide, overflow_of(code))


@jitable
def as_f8(value: np.float32) -> np.float64:
    """Return the same number; subnormal ones by way of an integer times 2^-149."""
    bits = as_u4(value)
    magnitude = u4(bits & MAGNITUDE)
    tiny = as_u8(f8(np.int32(magnitude)))
    tiny = u8(tiny - u8(149 << 52)) if magnitude != u4(0) else u8(0)
    normal = u8(u8(u8(magnitude) << u8(29)) + u8(896 << 52))
    normal = u8(normal + u8(896 << 52)) if magnitude >= INF else normal
    found = normal if magnitude >= u4(1 << 23) else tiny
    return as_f64(u8(found | u8(u8(bits & ~MAGNITUDE) << u8(32))))
