"""NVFP4: e2m1 by integer arithmetic; 256 scales per weight, looked up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moeconv.codecs.base import Window
from moeconv.codecs.fp8 import fp8_table
from moeconv.codecs.mxfp4 import E2M1
from moeconv.codecs.nvfp4 import GROUP
from moeconv.kernels.cpu.base import (
    BYTES_IN,
    BYTES_OUT,
    ELEMENTS,
    FLOATS_IN,
    INT,
    TRIPLE,
    Array,
    Counts,
    Triple,
    check_array,
    nb,
    rows_of,
)
from moeconv.kernels.cpu.cache import compiled, jitable
from moeconv.kernels.cpu.floats import BF16, CODES, as_f32, as_u4, u2, u4
from moeconv.kernels.cpu.ints import SPAN, nibbles
from moeconv.kernels.cpu.scaled import (
    Scratch,
    are_tame,
    bf16_of,
    f4,
    limits,
    new_scratch,
    round_scaled,
    spread,
)
from moeconv.types import Params

U8 = np.dtype(np.uint8)


class Job(NamedTuple):
    """What to decode: extents, output dtype and its bytes per element, tame scales (`limits`)."""

    rows: int
    cols: int
    code: int
    width: int
    low: int
    high: int


JOB = nb.NamedUniTuple(INT, len(Job._fields), Job)


@jitable
def e2m1(code: np.uint8) -> np.float32:
    """Return the value of a code 0..15; below 1 it is what it exceeds the exponent 0 by."""
    normal = u4(u4(u4(u4(code) & u4(7)) << u4(22)) + u4(126 << 23))
    above = as_u4(f4(as_f32(u4(normal + u4(1 << 23))) - f4(1)))
    return as_f32(u4(min(normal, above) | u4(u4(u4(code) & u4(8)) << u4(28))))


@jitable
def _fast(codes: Array, scales: Array, out: Array) -> None:
    for i in range(codes.size):
        out[i] = bf16_of(f4(e2m1(codes[i]) * scales[i]))


@jitable
def _look_up(stored: Array, table: Array, groups: Array) -> None:
    for i in range(groups.size):
        groups[i] = table[stored[i]]


@jitable
def _decode_wide(codes: Array, scratch: Scratch, code: int, tame: bool, out: Array) -> Triple:
    """Fill the bytes `out` and return the counts."""
    values, scales = scratch.values[: codes.size], scratch.scales[: codes.size]
    for i in range(codes.size):
        values[i] = e2m1(codes[i])
    return round_scaled(code, values, scales, scratch, out, tame)


@compiled((nb.UniTuple(BYTES_IN, 2), FLOATS_IN, BYTES_OUT, TRIPLE, JOB))
def _decode(
    stored: tuple[Array, Array], table: Array, out: Array, pitches: Triple, job: Job
) -> Triple:
    """Fill `out` and return the counts.

    stored: codes and scales; table: the values of scales; pitches: elements per row of codes,
    scales and out.
    """
    scratch, bits, room = new_scratch(), out.view(u2), np.empty(SPAN, np.uint8)
    nan = inf = over = 0
    for row in range(job.rows):
        for start in range(0, job.cols, SPAN):
            codes = room[: min(SPAN, job.cols - start)]
            at = row * pitches[0] + start // 2
            nibbles(stored[0][at : at + (codes.size + 1) // 2], codes)
            at = row * pitches[1] + start // GROUP
            groups = scratch.groups[: (codes.size + GROUP - 1) // GROUP]
            _look_up(stored[1][at : at + groups.size], table, groups)
            spread(groups, GROUP, 0, scratch.scales[: codes.size], scratch.spare)
            tame = are_tame(groups, job.low, job.high)
            first = row * pitches[2] + start
            if tame and job.code == BF16:
                _fast(codes, scratch.scales, bits[first : first + codes.size])
                continue
            given = out[first * job.width : (first + codes.size) * job.width]
            found = _decode_wide(codes, scratch, job.code, tame, given)
            nan, inf, over = nan + found[0], inf + found[1], over + found[2]
    return nan, inf, over


def _decode_checked(
    codes: Array, scales: Array, table: npt.NDArray[np.float32], out_dtype: str, out: Array
) -> Counts:
    """Fill `out` [R, C] from codes [R, ceil C/2] and scales [R, ceil C/16], whose values are
    in `table` [256].
    """
    rows, cols = out.shape
    check_array("out", out, ELEMENTS[out_dtype], (rows, cols))
    check_array("codes", codes, U8, (rows, -(-cols // 2)))
    check_array("scales", scales, U8, (rows, -(-cols // GROUP)))
    low, high = limits(E2M1[1], max(E2M1), out_dtype)
    job = Job(rows, cols, CODES[out_dtype], out.itemsize, low, high)
    taken, by, given = rows_of(codes), rows_of(scales), rows_of(out)
    pitches = (taken.pitch, by.pitch, given.pitch // out.itemsize)
    return Counts(*_decode((taken.memory, by.memory), table, given.memory, pitches, job))


def _whole_scale(parts: Mapping[str, Array], part: str) -> np.float32:
    """Return the one scale of a weight."""
    check_array(part, parts[part], ELEMENTS["F32"], (1, 1))
    found: np.float32 = parts[part][0, 0]
    return found


def decode_ct(
    parts: Mapping[str, Array], window: Window, params: Params, out_dtype: str, out: Array
) -> Counts:
    """Fill `out` [R, C]; the weight's scale divides.

    Equals codecs/nvfp4.py rounded once; tests/kernels/test_cpu_nvfp4.py holds it to that.
    """
    with np.errstate(all="ignore"):
        table = np.array(fp8_table("F8_E4M3"), f4) / _whole_scale(parts, "weight_global_scale")
    return _decode_checked(parts["weight_packed"], parts["weight_scale"], table, out_dtype, out)


def decode_modelopt(
    parts: Mapping[str, Array], window: Window, params: Params, out_dtype: str, out: Array
) -> Counts:
    """Fill `out` [R, C]; the weight's scale multiplies.

    Equals codecs/nvfp4.py rounded once; tests/kernels/test_cpu_nvfp4.py holds it to that.
    """
    with np.errstate(all="ignore"):
        table = np.array(fp8_table("F8_E4M3"), f4) * _whole_scale(parts, "weight_scale_2")
    return _decode_checked(parts["weight"], parts["weight_scale"], table, out_dtype, out)
