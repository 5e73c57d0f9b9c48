"""Integers of 2 to 8 bits times scales: the rows of all integer codecs.

w = (code - (zero[g] + offset)) * scale[g]. Codes lie along a row (packed-int, a row of GPTQ's
words once these are turned) or across rows (AWQ), and so do the packed zero points.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeconv.kernels.cpu.base import (
    BYTES_IN,
    BYTES_OUT,
    FLOATS_IN,
    INT,
    TABLE,
    Array,
    Pair,
    Triple,
    nb,
)
from moeconv.kernels.cpu.cache import compiled, jitable
from moeconv.kernels.cpu.floats import BF16, u2, u4, u8
from moeconv.kernels.cpu.scaled import (
    Scratch,
    are_tame,
    bf16_of,
    f4,
    new_scratch,
    round_scaled,
    spread,
)

i4, i8, u1 = np.int32, np.int64, np.uint8
NIBBLES, BYTES, FIELDS, ACROSS = range(4)  # layouts of codes
NO_ZEROS, PLAIN_ZEROS, PACKED_ZEROS = range(3)
SPAN = 2048  # columns at a time; with their zeros and scales they fit into L1
FAR_ZERO = 1 << 10  # zero points beyond this are decoded with 64-bit integers
LARGEST = 2.0 * FAR_ZERO  # what |code - zero point| stays below otherwise


class Job(NamedTuple):
    """Numbers that say what to decode; extents are set by int_windows.decode_rows.

    A run of `elements` fields of `bits` fills `words` words. Codes are XORed with `flip`.
    `first`: how far into its group the first column lies.
    """

    layout: int
    bits: int
    elements: int = 1
    words: int = 1
    flip: int = 0
    zeros: int = NO_ZEROS
    offset: int = 0
    group_cols: int = 1
    first: int = 0
    groups: int = 1
    rows: int = 0
    cols: int = 0
    code: int = BF16  # of the output dtype
    width: int = 2  # of its elements, bytes
    low: int = 0  # see `limits`
    high: int = 0


# Bytes, and words where codes are read by words; scales; zeros as words: flat.
Memory = tuple[Array, Array, Array, Array]
MEMORY = nb.Tuple((BYTES_IN, TABLE, FLOATS_IN, TABLE))
# The group of each column, if they are not in order; word and shift of each row, if any lie across.
Columns = tuple[Array, Array]
COLUMNS = nb.UniTuple(nb.Array(nb.int32, 1, "C", readonly=True, aligned=False), 2)
Pitches = tuple[int, int, int, int]  # elements per row of codes, scales, zeros, output
PITCHES = nb.UniTuple(INT, 4)
JOB = nb.NamedUniTuple(INT, len(Job._fields), Job)


@jitable
def nibbles(stored: Array, codes: Array) -> None:
    """Fill uint8 codes [N] from ceil(N/2) bytes, the low nibble first."""
    for i in range(codes.size // 2):
        codes[2 * i] = stored[i] & u1(15)
        codes[2 * i + 1] = stored[i] >> u1(4)
    if codes.size % 2:
        codes[codes.size - 1] = stored[codes.size // 2] & u1(15)


@jitable
def _fields(words: Array, first: int, job: Job, codes: Array) -> None:
    """Fill codes [N] with the fields from `first` on; slow, for widths that cross words."""
    run, field = first // job.elements, first % job.elements
    mask = u8((1 << job.bits) - 1)
    for i in range(codes.size):
        bit = field * job.bits
        word = run * job.words + bit // 32
        found = u8(words[word])
        if bit % 32 + job.bits > 32:
            found |= u8(words[word + 1]) << u8(32)
        codes[i] = (found >> u8(bit % 32)) & mask
        field += 1
        if field == job.elements:
            run, field = run + 1, 0


@jitable
def across(words: Array, pitch: int, place: Pair, start: int, bits: int, out: Array) -> None:
    """Fill out [N] with the fields of a row in the words of N columns.

    place: the row's word and shift; start: the first column.
    """
    begin, shift = place[0] * pitch + start, u4(place[1])
    taken = words[begin : begin + out.size]
    mask = u4((1 << bits) - 1)
    if shift + bits <= 32:
        for i in range(out.size):
            out[i] = u4(taken[i] >> shift) & mask
    else:
        rest = u4(32 - shift)
        following = words[begin + pitch : begin + pitch + out.size]
        for i in range(out.size):
            out[i] = u4(u4(taken[i] >> shift) | u4(following[i] << rest)) & mask


@jitable
def place_of(places: Array, row: int) -> Pair:
    """Return the word and the shift of a row's field."""
    return int(places[2 * row]), int(places[2 * row + 1])


@jitable
def read_codes(stored: Array, words: Array, at: int, start: int, job: Job, codes: Array) -> None:
    """Fill uint8 codes [N] of a row that begins at `at`; start: the first column."""
    if job.layout == NIBBLES:
        at += start // 2
        nibbles(stored[at : at + (codes.size + 1) // 2], codes)
    elif job.layout == BYTES:
        taken = stored[at + start : at + start + codes.size]
        flip = u1(job.flip)
        for i in range(codes.size):
            codes[i] = taken[i] ^ flip
    else:
        count = -(-job.cols * job.words // job.elements)
        _fields(words[at : at + count], start, job, codes)


@jitable
def plain_zeros(words: Array, raw: Array) -> None:
    """Fill int32 raw [N] from as many words."""
    for i in range(raw.size):
        raw[i] = i4(words[i])


@jitable
def shift_zeros(raw: Array, offset: int, shifted: Array) -> None:
    """Fill float32 shifted [N] with raw [N] plus the offset."""
    for i in range(raw.size):
        shifted[i] = f4(i4(raw[i] + i4(offset)))


@jitable
def are_near(zeros: Array) -> bool:
    """Return whether a code minus any of the zeros is exact in float32."""
    far = 0
    for i in range(zeros.size):
        far |= int((zeros[i] > FAR_ZERO) | (zeros[i] < -FAR_ZERO))
    return far == 0


@jitable
def _gather(groups: Array, order: Array, out: Array) -> None:
    """Fill out [N] with what columns [N] take of their groups."""
    for i in range(out.size):
        out[i] = groups[order[i]]


@jitable
def _fast(codes: Array, zeros: Array, scales: Array, out: Array) -> None:
    """Fill out [N] with BF16; codes minus zeros are exact in float32."""
    for i in range(codes.size):
        out[i] = bf16_of(f4(f4(f4(codes[i]) - zeros[i]) * scales[i]))


@jitable
def _tame_values(codes: Array, zeros: Array, values: Array) -> None:
    for i in range(codes.size):
        values[i] = f4(f4(codes[i]) - zeros[i])


@jitable
def _wild_values(
    codes: Array, raw: Array, order: Array, start: int, job: Job, values: Array
) -> None:
    """Fill float32 values [N], whatever the zeros are: they may be any int32."""
    for i in range(codes.size):
        zero = i8(job.offset)
        if job.zeros != NO_ZEROS:
            group = (job.first + start + i) // job.group_cols
            if order.size:
                group = int(order[start + i])
            zero += i8(raw[group])
        values[i] = f4(i8(codes[i]) - zero)


@jitable
def _decode_wide(codes: Array, scratch: Scratch, code: int, tame: bool, out: Array) -> Triple:
    """Fill the bytes `out` and return the counts; wild rows have their values in scratch."""
    values, scales = scratch.values[: codes.size], scratch.scales[: codes.size]
    if tame:
        _tame_values(codes, scratch.zeros, values)
    return round_scaled(code, values, scales, scratch, out, tame)


@jitable
def _of_columns(
    groups: Array, order: Array, first: int, job: Job, spare: Array, out: Array
) -> None:
    """Fill out [N] with what the columns from `first` on take of their groups."""
    if order.size:
        _gather(groups, order[first : first + out.size], out)
    else:
        spread(groups, job.group_cols, job.first + first, out, spare)


@compiled((MEMORY, COLUMNS, BYTES_OUT, PITCHES, JOB))
def decode(memory: Memory, columns: Columns, out: Array, pitches: Pitches, job: Job) -> Triple:
    """Fill `out` and return the counts.

    (What runs for every row takes no tuple of arrays: one costs as much as hundreds of columns.)
    """
    scratch, bits, room = new_scratch(), out.view(u2), np.empty(SPAN, u1)
    scratch.zeros[:] = f4(job.offset)  # and stay so where there are none
    raw, shifted = np.empty(job.groups, i4), np.empty(job.groups, f4)
    nan = inf = over = 0
    for row in range(job.rows):
        groups = memory[2][row * pitches[1] : row * pitches[1] + job.groups]
        tame = are_tame(groups, job.low, job.high)
        if job.zeros == PACKED_ZEROS:
            across(memory[3], pitches[2], place_of(columns[1], row), 0, job.bits, raw)
        elif job.zeros == PLAIN_ZEROS:
            plain_zeros(memory[3][row * pitches[2] : row * pitches[2] + job.groups], raw)
        if job.zeros != NO_ZEROS:
            tame &= are_near(raw)
            shift_zeros(raw, job.offset, shifted)
        for start in range(0, job.cols, SPAN):
            codes = room[: min(SPAN, job.cols - start)]
            if job.layout == ACROSS:
                place = place_of(columns[1], row)
                across(memory[1], pitches[0], place, start, job.bits, codes)
            else:
                read_codes(memory[0], memory[1], row * pitches[0], start, job, codes)
            scales, zeros = scratch.scales[: codes.size], scratch.zeros[: codes.size]
            _of_columns(groups, columns[0], start, job, scratch.spare, scales)
            if job.zeros != NO_ZEROS and tame:
                _of_columns(shifted, columns[0], start, job, scratch.spare, zeros)
            first = row * pitches[3] + start
            if tame and job.code == BF16:
                _fast(codes, zeros, scales, bits[first : first + codes.size])
                continue
            if not tame:
                _wild_values(codes, raw, columns[0], start, job, scratch.values)
            given = out[first * job.width : (first + codes.size) * job.width]
            found = _decode_wide(codes, scratch, job.code, tame, given)
            nan, inf, over = nan + found[0], inf + found[1], over + found[2]
    return nan, inf, over
