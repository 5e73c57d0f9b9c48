"""NF4: 4-bit codes in one flat run, looked up in the 16 outputs of every block of the run.

A window is one run where it has all columns and its output's rows touch, else a run per row. Runs
begin and end anywhere in blocks, and in the middle of a byte.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moeconv.codecs.base import Window
from moeconv.codecs.nf4 import NESTED_CODES, NF4_CODES
from moeconv.kernels.cpu.base import (
    BYTES_IN,
    BYTES_OUT,
    ELEMENTS,
    FLOATS_IN,
    FLOATS_OUT,
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
from moeconv.kernels.cpu.floats import CODES, F16, as_f32, as_u8, overflow_of, u4, u8, widen_f64
from moeconv.kernels.cpu.fours import (
    FOUR_BIT,
    INF_KIND,
    NAN_KIND,
    OVERFLOW_KIND,
    STRETCH,
    U1,
    U8,
    classify,
    fill_planes,
    new_room,
)
from moeconv.kernels.cpu.scaled import LOWEST, are_tame, as_f8, f4, f8, limits, products
from moeconv.kernels.cpu.shuffles import STRIDE, UPPER, LookUp, turned_to_16, turned_to_32
from moeconv.kernels.cpu.sixteens import NO_OFFSET, NO_ZERO, fill_table, fill_wide_table
from moeconv.kernels.cpu.vectors import LANES
from moeconv.types import Params

FLOATS = ELEMENTS["F32"]
LEAST, MOST = 77 << 23, 187 << 23  # the bits of 2^-50 and 2^60
ALIKE = STRETCH * FOUR_BIT  # products of a stretch of blocks


class Job(NamedTuple):
    """Numbers that say what to decode. `first`: the place of the first element in the flat run.

    rows: runs, of `run` elements each, `pitch` elements apart in the flat run and `out_pitch` bytes
    apart in the output; code, width: of the output dtype; low, high: see `limits`, low > high
    where no product is tame; scales begin with that of block `first_block`.
    """

    first: int
    rows: int
    run: int
    pitch: int
    out_pitch: int
    blocksize: int
    first_block: int
    code: int
    width: int
    low: int
    high: int


JOB = nb.NamedUniTuple(INT, len(Job._fields), Job)
Place = tuple[int, int, int, int]  # elements begin and stop in the flat run, output byte, block


@jitable
def _one(codes: Array, tables: Array, out: Array, at: int, place: Pair, width: int) -> None:
    """Write the element at `at` of the flat run; place: bytes where its table and output begin."""
    byte = codes[at // 2]
    code = int(byte & U1(15)) if at % 2 else int(byte >> U1(4))
    step, stride = (UPPER, STRIDE) if width == 2 else (FOUR_BIT, 1)
    for plane in range(width):
        out[place[1] + plane] = tables[place[0] + plane * step + code * stride]


def _decoder(look_up: LookUp, width: int) -> Callable[..., None]:
    """Return a jitable function that looks a stretch of blocks up, outputs of `width` bytes."""
    nbytes, given = FOUR_BIT * width, LANES * width

    @jitable
    def decode(codes: Array, tables: Array, out: Array, place: Place, blocksize: int) -> None:
        """Fill the elements of a run; tables: from that of the block on in which it begins."""
        at, stop, out_at, block = place
        table = 0
        while at < stop:
            block += 1
            end = min(block * blocksize, stop)
            if at % 2:
                _one(codes, tables, out, at, (table, out_at), width)
                at, out_at = at + 1, out_at + width
            for _ in range((end - at) // LANES):
                look_up(codes, tables, out, (at // 2, table, out_at))
                at, out_at = at + LANES, out_at + given
            while at < end:
                _one(codes, tables, out, at, (table, out_at), width)
                at, out_at = at + 1, out_at + width
            table += nbytes

    found: Callable[..., None] = decode
    return found


_to_16, _to_32 = _decoder(turned_to_16, 2), _decoder(turned_to_32, 4)


@jitable
def _fill(scales: Array, begin: int, values: Array, tables: Array, width: int) -> None:
    """Fill the tables of a stretch of blocks, whose products are tame, for BF16 or float32."""
    for i in range(STRETCH):
        by = (NO_ZERO, scales[begin + i], NO_OFFSET)
        if width == 2:
            fill_table(values, tables, i * 2 * LANES, by)
        else:
            fill_wide_table(values, tables, i * 4 * LANES, by)


@jitable
def _count(codes: Array, kinds: Array, place: Place, blocksize: int) -> Triple:
    """Return the counts of the elements of a run; kinds: as `tables` of `decode`."""
    at, stop, _, block = place
    nan = inf = over = 0
    for i in range(at, stop):
        byte = codes[i // 2]
        code = int(byte & U1(15)) if i % 2 else int(byte >> U1(4))
        kind = kinds[(i // blocksize - block) * FOUR_BIT + code]
        nan += int(kind == NAN_KIND)
        inf += int(kind == INF_KIND)
        over += int(kind == OVERFLOW_KIND)
    return nan, inf, over


@compiled((BYTES_IN, FLOATS_IN, FLOATS_IN, BYTES_OUT, JOB))
def _decode(codes: Array, scales: Array, values: Array, out: Array, job: Job) -> Triple:
    """Fill `out` and return the counts.

    scales: of the blocks that are touched, and room for a stretch behind them; values [16].
    """
    tables, room = np.empty(ALIKE * job.width, U1), new_room(values, job.width)
    kinds, marks, wild = np.empty(ALIKE, U1), np.empty(STRETCH, U1), overflow_of(job.code)
    nan = inf = over = 0
    for row in range(job.rows):
        at, out_at = job.first + row * job.pitch, row * job.out_pitch
        stop = at + job.run
        while at < stop:
            block = at // job.blocksize
            end, begin = min((block + STRETCH) * job.blocksize, stop), block - job.first_block
            place = (at, end, out_at, block)
            taken = scales[begin : begin + STRETCH]
            tame = job.low <= job.high and are_tame(taken, job.low, job.high)
            if tame and job.code != F16:
                _fill(scales, begin, values, tables, job.width)
            else:
                fill_planes(scales, begin, room, tables, (job.code, job.width, int(tame)))
            if job.width == 2:
                _to_16(codes, tables, out, place, job.blocksize)
            else:
                _to_32(codes, tables, out, place, job.blocksize)
            if not tame:
                classify(room.wide, wild, kinds, marks)
                found = _count(codes, kinds, place, job.blocksize)
                nan, inf, over = nan + found[0], inf + found[1], over + found[2]
            out_at += (end - at) * job.width
            at = end
    return nan, inf, over


@jitable
def _sums(stored: Array, values: Array, scale: np.float32, offset: np.float32, out: Array) -> None:
    """Fill `out` [B] with values[stored[b]] * scale + offset, each step rounded."""
    for b in range(out.size):
        out[b] = f4(f4(values[int(stored[b])] * scale) + offset)


@jitable
def _careful_sums(
    stored: Array, values: Array, scale: np.float32, offset: np.float32, out: Array
) -> None:
    """Fill `out` as _sums does, of whatever numbers.

    By way of float64: it holds the product of two float32, and rounds a sum as float32 would.
    """
    each, by, exact, wide = np.empty(1, f4), np.empty(1, f4), np.empty(1, u8), np.empty(1, u4)
    by[0] = scale
    for b in range(out.size):
        each[0] = values[int(stored[b])]
        products(each, by, exact, wide)
        exact[0] = as_u8(f8(as_f8(as_f32(wide[0])) + as_f8(offset)))
        widen_f64(exact, wide)
        out[b] = as_f32(wide[0])


@compiled((BYTES_IN, FLOATS_IN, FLOATS_IN, FLOATS_OUT, TRIPLE))
def _unnest(stored: Array, values: Array, scales: Array, out: Array, how: Triple) -> None:
    """Fill the scales `out` [B] of stored codes, their values [256] and scales of so many codes.

    how: the block that out begins with, blocks per scale, the bits of the offset.
    """
    first, blocksize, bits = how
    offset, begin = as_f32(u4(bits)), 0
    # Of mild numbers neither a product nor a sum, which has no places below 2^-123, is subnormal.
    mild = offset == f4(0) or f4(2.0**-50) <= abs(offset) <= f4(2.0**60)
    mild = mild and are_tame(values, LEAST, MOST) and are_tame(scales, LEAST, MOST)
    while begin < out.size:
        block = first + begin
        end = min((block // blocksize + 1) * blocksize - first, out.size)
        codes, scale = stored[block : first + end], scales[block // blocksize]
        if mild:
            _sums(codes, values, scale, offset, out[begin:end])
        else:
            _careful_sums(codes, values, scale, offset, out[begin:end])
        begin = end


def _scales(parts: Mapping[str, Array], params: Params, span: Pair) -> npt.NDArray[np.float32]:
    """Return the float32 scales of blocks span[0] to span[1], and zeros for a stretch more."""
    count = -(-int(params["rows"]) * int(params["cols"]) // int(params["blocksize"]))
    stored, nested = parts["weight.absmax"], int(params["nested_blocksize"])
    found = np.zeros(span[1] - span[0] + STRETCH, np.float32)
    wanted = found[: span[1] - span[0]]
    check_array("absmax", stored, U8 if nested else FLOATS, (1, count))
    if not nested:
        wanted[:] = stored[0, span[0] : span[1]]
        return found
    values, scales = parts["weight.nested_quant_map"], parts["weight.nested_absmax"]
    check_array("nested_quant_map", values, FLOATS, (1, NESTED_CODES))
    check_array("nested_absmax", scales, FLOATS, (1, -(-count // nested)))
    with np.errstate(over="ignore"):
        offset = np.array(float(params["nested_offset"])).astype(np.float32)
    how = (span[0], nested, int(offset.view(np.uint32)))
    _unnest(stored.reshape(-1), values.reshape(-1), scales.reshape(-1), wanted, how)
    return found


def _limits(values: npt.NDArray[np.float32], out_dtype: str) -> Pair:
    """Return the limits of scales with which no product needs a second look; none: (1, 0)."""
    magnitudes = np.abs(values[values != 0])
    if not len(magnitudes) or not LOWEST <= magnitudes.min() <= magnitudes.max() < np.inf:
        return 1, 0
    return limits(min(float(magnitudes.min()), 1.0), max(float(magnitudes.max()), 1.0), out_dtype)


def decode(
    parts: Mapping[str, Array], window: Window, params: Params, out_dtype: str, out: Array
) -> Counts:
    """Fill `out` [R, C] from whole parts: codes [N*K/2, 1] and scales [1, blocks].

    Equals codecs/nf4.py rounded once; tests/kernels/test_cpu_nf4.py holds it to that.
    """
    count, cols = int(params["rows"]) * int(params["cols"]), int(params["cols"])
    codes, values = parts["weight"], parts["weight.quant_map"]
    check_array("weight", codes, U8, (-(-count // 2), 1))
    check_array("quant_map", values, FLOATS, (1, NF4_CODES))
    check_array("out", out, ELEMENTS[out_dtype], (window.rows, window.cols))
    if not out.size:
        return Counts(0, 0, 0)
    first = window.row_start * cols + window.col_start
    last = (window.row_stop - 1) * cols + window.col_stop
    blocksize, given = int(params["blocksize"]), rows_of(out)
    blocks = (first // blocksize, -(-last // blocksize))
    rows, run = window.rows, window.cols
    if run == cols and given.touching:
        rows, run = 1, rows * run
    low, high = _limits(values[0], out_dtype)
    job = Job(
        first, rows, run, cols, given.pitch, blocksize, blocks[0], CODES[out_dtype],
        out.itemsize, low, high,
    )  # fmt: skip
    scales = _scales(parts, params, blocks)
    found = _decode(codes.reshape(-1), scales, values.reshape(-1), given.memory, job)
    return Counts(*found)
