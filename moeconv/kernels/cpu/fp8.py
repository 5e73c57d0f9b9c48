"""FP8 with one scale per block, whatever the block: integer arithmetic, then one product."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moeconv.codecs.base import Window
from moeconv.codecs.fp8 import fp8_table
from moeconv.kernels.cpu.base import (
    BYTES_IN,
    BYTES_OUT,
    ELEMENTS,
    FLOATS_IN,
    INT,
    TRIPLE,
    Array,
    Counts,
    Pair,
    Triple,
    check_array,
    nb,
    rows_of,
)
from moeconv.kernels.cpu.cache import compiled, jitable
from moeconv.kernels.cpu.eights import (
    E4M3,
    E5M2,
    TABLE,
    Place,
    are_finite,
    decode_e4m3,
    decode_e5m2,
    fill_table,
)
from moeconv.kernels.cpu.floats import BF16, CODES, as_f32, as_u4, u2, u4
from moeconv.kernels.cpu.scaled import (
    CHUNK,
    Scratch,
    are_tame,
    bf16_of,
    e8m0_table,
    f4,
    limits,
    new_scratch,
    round_scaled,
    spread,
)
from moeconv.types import Params

FORMATS = {"F8_E4M3": E4M3, "F8_E5M2": E5M2}
SHORT = 16  # columns of a block below which its scale is not worth a table
U8 = np.dtype(np.uint8)
SIGN = u4(0x80000000)
NO_BYTES: npt.NDArray[np.uint8] = np.empty(0, np.uint8)
NO_FLOATS: npt.NDArray[np.float32] = np.empty(0, np.float32)


class Job(NamedTuple):
    """Numbers that say what to decode; a block is block_rows x block_cols elements per scale.

    `wild`: the lowest magnitude of a byte that is Inf or NaN; `low`, `high`: see `limits`.
    """

    rows: int
    cols: int
    block_rows: int
    block_cols: int
    form: int
    code: int  # of the output dtype
    width: int  # of its elements, bytes
    wild: int
    low: int
    high: int


# E8M0 scales, float32 scales, the values of E8M0 or nothing: what is not there is empty.
Scales = tuple[Array, Array, Array]
SCALES = nb.Tuple((BYTES_IN, FLOATS_IN, FLOATS_IN))
JOB = nb.NamedUniTuple(INT, len(Job._fields), Job)


@jitable
def e4m3(byte: np.uint8) -> np.float32:
    """Return the value of a finite E4M3 byte.

    Below 2^-6 it is what it exceeds the exponent 1 by: there that is the smaller of the two.
    """
    normal = u4(u4(u4(u4(byte) << u4(20)) & u4(0x07F00000)) + u4(120 << 23))
    above = as_u4(f4(as_f32(u4(normal + u4(1 << 23))) - f4(2.0**-6)))
    return as_f32(u4(min(normal, above) | u4(u4(u4(byte) << u4(24)) & SIGN)))


@jitable
def e5m2(byte: np.uint8) -> np.float32:
    """Return the value of a finite E5M2 byte."""
    normal = u4(u4(u4(u4(byte) << u4(21)) & u4(0x0FE00000)) + u4(112 << 23))
    above = as_u4(f4(as_f32(u4(normal + u4(1 << 23))) - f4(2.0**-14)))
    return as_f32(u4(min(normal, above) | u4(u4(u4(byte) << u4(24)) & SIGN)))


@jitable
def _fast_e4m3(codes: Array, scales: Array, out: Array) -> None:
    for i in range(codes.size):
        out[i] = bf16_of(f4(e4m3(codes[i]) * scales[i]))


@jitable
def _fast_e5m2(codes: Array, scales: Array, out: Array) -> None:
    for i in range(codes.size):
        out[i] = bf16_of(f4(e5m2(codes[i]) * scales[i]))


@jitable
def _decode_wide(codes: Array, table: Array, scratch: Scratch, how: Pair, out: Array) -> Triple:
    """Fill the bytes `out` and return the counts. how: output dtype; whether all is tame."""
    values, scales = scratch.values[: codes.size], scratch.scales[: codes.size]
    for i in range(codes.size):
        values[i] = table[codes[i]]
    return round_scaled(how[0], values, scales, scratch, out, how[1] != 0)


@jitable
def _spread_band(scales: Scales, at: int, scratch: Scratch, job: Job, cols: Pair) -> None:
    """Fill scratch.scales with the scales of columns `cols`; at: where the band's begin."""
    stored, floats, table = scales
    start, stop = cols
    first = start // job.block_cols
    groups = scratch.groups[: -(-stop // job.block_cols) - first]
    for i in range(groups.size):
        groups[i] = table[stored[at + first + i]] if table.size else floats[at + first + i]
    columns = scratch.scales[: stop - start]
    spread(groups, job.block_cols, start - first * job.block_cols, columns, scratch.spare)


@jitable
def _are_bytes_tame(stored: Array, at: int, groups: Array, job: Job) -> bool:
    """Return whether E8M0 scales from `at` on are tame; fill where their tables begin."""
    least, most = np.uint8(255), np.uint8(0)
    for i in range(groups.size):
        scale = stored[at + i]
        least, most = min(least, scale), max(most, scale)
        groups[i] = np.int64(scale) * TABLE
    return bool((least >= job.low >> 23) and (most <= job.high >> 23))


@jitable
def _are_floats_tame(floats: Array, at: int, groups: Array, job: Job) -> bool:
    """Return whether float scales from `at` on are tame; fill where their tables begin."""
    for i in range(groups.size):
        groups[i] = i * TABLE
    return are_tame(floats[at : at + groups.size], job.low, job.high)


@jitable
def _fill_tables(floats: Array, at: int, groups: Array, form: int, tables: Array) -> bool:
    """Fill the tables of float scales from `at` on; return False if one is 0, which has none."""
    for i in range(groups.size):
        if floats[at + i] == f4(0):
            return False
        fill_table(form, floats[at + i], tables, groups[i])
    return True


@jitable
def _new_tables(scales: Scales, job: Job) -> Array:
    """Return room for the tables of a band; of E8M0 scales the tables of all tame ones met."""
    stored, _, values = scales
    room = np.empty((max(256, CHUNK // SHORT + 2) + 1) * TABLE, np.uint8)
    tables = room[-room.ctypes.data % TABLE :]  # none lies across two lines of the cache
    if values.size:
        least, most = np.uint8(255), np.uint8(0)
        for i in range(stored.size):
            least, most = min(least, stored[i]), max(most, stored[i])
        for scale in range(max(job.low >> 23, int(least)), min(job.high >> 23, int(most)) + 1):
            fill_table(job.form, values[scale], tables, scale * TABLE)
    return tables


@jitable
def _decode_slow(
    codes: Array, table: Array, scratch: Scratch, out: Array, job: Job, fine: bool
) -> Triple:
    """Fill the bytes `out` with a row whose scales are in scratch; return the counts."""
    if not fine or job.code != BF16:
        return _decode_wide(codes, table, scratch, (job.code, int(fine)), out)
    if job.form == E4M3:
        _fast_e4m3(codes, scratch.scales, out.view(u2))
    else:
        _fast_e5m2(codes, scratch.scales, out.view(u2))
    return 0, 0, 0


@jitable
def _look_up(
    codes: Array, tables: Array, groups: Array, out: Array, place: Place, job: Job
) -> bool:
    """Fill a row by its tables; return whether all codes are finite."""
    if job.form == E4M3:
        return bool(decode_e4m3(codes, tables, groups, out, place, job.block_cols))
    return bool(decode_e5m2(codes, tables, groups, out, place, job.block_cols))


@compiled((BYTES_IN, SCALES, FLOATS_IN, BYTES_OUT, TRIPLE, JOB))
def _decode(
    codes: Array, scales: Scales, table: Array, out: Array, pitches: Triple, job: Job
) -> Triple:
    """Fill `out` and return the counts.

    table: the values of the codes; pitches: elements per row of codes, scales and out.
    """
    stored, floats, values = scales
    scratch, tables, room = new_scratch(), _new_tables(scales, job), np.empty(CHUNK, np.int64)
    tame = by_tables = is_spread = False
    nan = inf = over = 0
    for start in range(0, job.cols, CHUNK):
        stop = min(start + CHUNK, job.cols)
        group = start // job.block_cols
        groups = room[: -(-stop // job.block_cols) - group]
        for row in range(job.rows):
            at = row // job.block_rows * pitches[1]
            if row % job.block_rows == 0:
                if values.size:
                    tame = _are_bytes_tame(stored, at + group, groups, job)
                else:
                    tame = _are_floats_tame(floats, at + group, groups, job)
                by_tables = tame and job.code == BF16 and job.block_cols >= SHORT
                if by_tables and not values.size:
                    by_tables = _fill_tables(floats, at + group, groups, job.form, tables)
                is_spread = False
            first = row * pitches[2] + start
            if by_tables:
                place = (row * pitches[0] + start, first, stop - start, start % job.block_cols)
                if _look_up(codes, tables, groups, out, place, job):
                    continue
            taken = codes[row * pitches[0] + start : row * pitches[0] + stop]
            fine = tame and not by_tables and are_finite(taken, job.wild)
            if not is_spread:
                _spread_band(scales, at, scratch, job, (start, stop))
                is_spread = True
            given = out[first * job.width : (first + taken.size) * job.width]
            found = _decode_slow(taken, table, scratch, given, job, fine)
            nan, inf, over = nan + found[0], inf + found[1], over + found[2]
    return nan, inf, over


@cache
def _values(dtype: str) -> npt.NDArray[np.float32]:
    return np.array(fp8_table(dtype), f4)


@cache
def _job(dtype: str, out_dtype: str) -> Job:
    """Return a job that has all but its extents."""
    magnitudes = np.abs(_values(dtype))
    found = magnitudes[np.isfinite(magnitudes) & (magnitudes > 0)]
    low, high = limits(float(found.min()), float(found.max()), out_dtype)
    wild = int(np.argmin(np.isfinite(magnitudes)))
    width = ELEMENTS[out_dtype].itemsize
    return Job(0, 0, 1, 1, FORMATS[dtype], CODES[out_dtype], width, wild, low, high)


def decode_blocks(
    parts: Mapping[str, Array], params: Params, block: Pair, out_dtype: str, out: Array
) -> Counts:
    """Fill `out` [R, C] from codes [R, C] and scales [ceil R/block, ceil C/block].

    Scales are float32, or E8M0 bytes. Equals codecs/fp8.py and codecs/mxfp8.py rounded once;
    tests/kernels/test_fp8.py holds it to that.
    """
    rows, cols = out.shape
    dtype, codes, scales = str(params["dtype"]), parts["weight"], parts[str(params["scale"])]
    block_rows, block_cols = (max(extent, 1) for extent in block)
    bytewise = scales.itemsize == 1
    check_array("out", out, ELEMENTS[out_dtype], (rows, cols))
    check_array("codes", codes, U8, (rows, cols))
    kind = U8 if bytewise else ELEMENTS["F32"]
    check_array("scales", scales, kind, (-(-rows // block_rows), -(-cols // block_cols)))
    given, taken, scale = rows_of(out), rows_of(codes), rows_of(scales)
    job = _job(dtype, out_dtype)._replace(
        rows=rows, cols=cols, block_rows=block_rows, block_cols=block_cols
    )
    by: Scales = (scale.memory, NO_FLOATS, e8m0_table())
    if not bytewise:
        by = (NO_BYTES, scale.memory.view(f4), NO_FLOATS)
    pitches = (taken.pitch, scale.pitch // scales.itemsize, given.pitch // out.itemsize)
    return Counts(*_decode(taken.memory, by, _values(dtype), given.memory, pitches, job))


def decode_block(
    parts: Mapping[str, Array], window: Window, params: Params, out_dtype: str, out: Array
) -> Counts:
    """Fill `out` [R, C]; one scale per block_rows x block_cols."""
    block = (int(params["block_rows"]), int(params["block_cols"]))
    return decode_blocks(parts, params, block, out_dtype, out)


def decode_channel(
    parts: Mapping[str, Array], window: Window, params: Params, out_dtype: str, out: Array
) -> Counts:
    """Fill `out` [R, C]; one scale per row."""
    return decode_blocks(parts, params, (1, window.cols), out_dtype, out)


def decode_tensor(
    parts: Mapping[str, Array], window: Window, params: Params, out_dtype: str, out: Array
) -> Counts:
    """Fill `out` [R, C]; one scale."""
    return decode_blocks(parts, params, (window.rows, window.cols), out_dtype, out)


def decode_block_turned(
    parts: Mapping[str, Array], window: Window, params: Params, out_dtype: str, out: Array
) -> Counts:
    """Fill `out` from parts stored [cols, rows]: out, window and blocks are turned, too."""
    block = (int(params["block_cols"]), int(params["block_rows"]))
    return decode_blocks(parts, params, block, out_dtype, out)


def decode_channel_turned(
    parts: Mapping[str, Array], window: Window, params: Params, out_dtype: str, out: Array
) -> Counts:
    """Fill `out` from parts stored [cols, rows], like out and window; one scale per column."""
    return decode_blocks(parts, params, (window.rows, 1), out_dtype, out)
