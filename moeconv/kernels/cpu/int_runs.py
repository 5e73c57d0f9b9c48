"""Tame integers to BF16, 16 columns of one group at a time.

Up to 4 bits have 16 outputs per group: they are computed once and looked up.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moeconv.codecs.bits import WORD_BITS
from moeconv.kernels.cpu.base import BYTES_OUT, Array, Pair, Triple
from moeconv.kernels.cpu.cache import compiled, jitable
from moeconv.kernels.cpu.copies import transpose
from moeconv.kernels.cpu.floats import u4
from moeconv.kernels.cpu.ints import (
    ACROSS,
    BYTES,
    COLUMNS,
    JOB,
    MEMORY,
    NIBBLES,
    NO_ZEROS,
    PACKED_ZEROS,
    PITCHES,
    Columns,
    Job,
    Memory,
    Pitches,
    across,
    are_near,
    i4,
    place_of,
    plain_zeros,
    read_codes,
    shift_zeros,
    u1,
)
from moeconv.kernels.cpu.scaled import are_tame, f4
from moeconv.kernels.cpu.shuffles import (
    WIDE,
    LookUp,
    codes_to_16,
    more_codes_to_16,
    more_nibbles_to_16,
    nibbles_to_16,
)
from moeconv.kernels.cpu.sixteens import (
    CODES,
    NO_OFFSET,
    TABLE_NBYTES,
    fill_table,
    scale_bytes,
    scale_signed_bytes,
)
from moeconv.kernels.cpu.vectors import LANES, Intrinsic

TURNED_ROWS = 128  # at a time: two lines of GPTQ's words, one of AWQ's
SPARE = 16  # words

# Functions of a row take its columns as: columns per group, how far into its group the first one
# lies, how many (a multiple of 16); and `places`: the first byte of codes and of the output.


def fits(job: Job) -> bool:
    """Return whether columns 16 i to 16 i + 15 are always of one group."""
    whole = job.groups == 1 or (job.group_cols % LANES == 0 and job.first % LANES == 0)
    return whole and job.cols % LANES == 0


@jitable
def _fill_tables(zeros: Array, scales: Array, tables: Array) -> None:
    """Fill tables [G * TABLE_NBYTES] with every code's output in every group."""
    for group in range(scales.size):
        by = (zeros[group], scales[group], NO_OFFSET)
        fill_table(CODES, tables, group * TABLE_NBYTES, by)


def _looked_up(look_up: LookUp, more: LookUp, per_byte: int) -> Callable[..., None]:
    """Return a jitable function that looks a row of codes up, `per_byte` of them in a byte.

    look_up: of 16 codes; more: of 32.
    """

    @jitable
    def decode(stored: Array, tables: Array, columns: Triple, out: Array, places: Pair) -> None:
        """Fill the output."""
        group_cols, first, cols = columns
        col, stop, table = 0, group_cols - first, 0
        while col < cols:
            end = min(stop, cols)
            read, write = places[0] + col // per_byte, places[1] + col * 2
            for _ in range((end - col) // WIDE):
                more(stored, tables, out, (read, table, write))
                read, write = read + WIDE // per_byte, write + WIDE * 2
            if (end - col) % WIDE:
                look_up(stored, tables, out, (read, table, write))
            col, stop, table = stop, stop + group_cols, table + TABLE_NBYTES

    found: Callable[..., None] = decode
    return found


def _scaled(scale_16: Intrinsic) -> Callable[..., None]:
    """Return a jitable function that scales a row of codes, each of them a byte."""

    @jitable
    def decode(
        stored: Array, zeros: Array, scales: Array, columns: Triple, out: Array, places: Pair
    ) -> None:
        """Fill the output."""
        group_cols, first, cols = columns
        col, stop, group = 0, group_cols - first, 0
        while col < cols:
            by = (zeros[group], scales[group], NO_OFFSET)
            for begin in range(col, min(stop, cols), LANES):
                scale_16(stored, out, (places[0] + begin, places[1] + begin * 2), by)
            col, stop, group = stop, stop + group_cols, group + 1

    found: Callable[..., None] = decode
    return found


_look_up_nibbles = _looked_up(nibbles_to_16, more_nibbles_to_16, 2)
_look_up_bytes = _looked_up(codes_to_16, more_codes_to_16, 1)
_scale, _scale_signed = _scaled(scale_bytes), _scaled(scale_signed_bytes)


@jitable
def _zeros_of(stored: Array, pitch: int, place: Pair, job: Job, raw: Array, zeros: Array) -> bool:
    """Fill a row's zeros [G] and return whether all are near; place: (row, -1) if not packed."""
    if place[1] >= 0:
        across(stored, pitch, place, 0, job.bits, raw)
    else:
        plain_zeros(stored[place[0] * pitch : place[0] * pitch + job.groups], raw)
    shift_zeros(raw, job.offset - job.flip, zeros)
    return are_near(raw)


@jitable
def _decode_rows(
    memory: Memory, columns: Columns, out: Array, pitches: Pitches, job: Job, span: Triple
) -> bool:
    """Fill rows of `out` and return whether all are tame; if not, they are not full.

    span: the first row, how many, and the word across rows that memory begins with.
    """
    stored, words, scales, stored_zeros = memory
    raw, codes = np.empty(job.groups, i4), np.empty(job.cols, u1)
    zeros = np.full(job.groups, f4(job.offset - job.flip))  # flipped codes are read as signed ones
    tables, runs = np.empty(job.groups * TABLE_NBYTES, u1), (job.group_cols, job.first, job.cols)
    for row in range(span[1]):
        groups = scales[row * pitches[1] : row * pitches[1] + job.groups]
        tame = are_tame(groups, job.low, job.high)
        place = (row, -1)
        if job.layout == ACROSS or job.zeros == PACKED_ZEROS:
            place = place_of(columns[1], span[0] + row)
        if job.zeros != NO_ZEROS:
            at = place if job.zeros == PACKED_ZEROS else (row, -1)
            tame &= _zeros_of(stored_zeros, pitches[2], at, job, raw, zeros)
        if not tame:
            return False
        places = (row * pitches[0], (span[0] + row) * pitches[3] * 2)
        if job.bits <= 4:
            _fill_tables(zeros, groups, tables)
        if job.layout == NIBBLES:
            _look_up_nibbles(stored, tables, runs, out, places)
        elif job.layout == BYTES and job.flip:
            _scale_signed(stored, zeros, groups, runs, out, places)
        elif job.layout == BYTES:
            _scale(stored, zeros, groups, runs, out, places)
        else:
            if job.layout == ACROSS:
                across(words, pitches[0], (place[0] - span[2], place[1]), 0, job.bits, codes)
            else:
                read_codes(stored, words, places[0], 0, job, codes)
            if job.bits <= 4:
                _look_up_bytes(codes, tables, runs, out, (0, places[1]))
            else:
                _scale(codes, zeros, groups, runs, out, (0, places[1]))
    return True


@compiled((MEMORY, COLUMNS, BYTES_OUT, PITCHES, JOB))
def decode(memory: Memory, columns: Columns, out: Array, pitches: Pitches, job: Job) -> bool:
    """Fill `out` as ints.decode does and return whether all rows are tame; if not, it is not full.

    For jobs that fit and give BF16.
    """
    return _decode_rows(memory, columns, out, pitches, job, (0, job.rows, 0))


@jitable
def _words_across(places: Array, row: int, bits: int) -> int:
    """Return how many words across rows hold the fields of the rows up to this one."""
    word, shift = place_of(places, row)
    return word + 1 + int(shift + bits > WORD_BITS)


@jitable
def _turn_zeros(stored: Array, pitch: int, places: Array, job: Job) -> Array:
    """Return packed zeros, flat [W, G], of ones that are stored [G, W]."""
    if job.zeros != PACKED_ZEROS:
        return np.empty(1, u4)
    shape = (_words_across(places, job.rows - 1, job.bits), job.groups)
    found = np.empty(shape[0] * shape[1], u4)
    transpose(stored, found, (pitch, job.groups), shape)
    return found


@compiled((MEMORY, COLUMNS, BYTES_OUT, PITCHES, JOB))
def decode_turned(memory: Memory, columns: Columns, out: Array, pitches: Pitches, job: Job) -> bool:
    """As `decode`, of words, scales and packed zeros with the rows along the minor axis."""
    words, scales, lying = memory[1], memory[2].view(u4), job.layout == ACROSS
    zeros = _turn_zeros(memory[3], pitches[2], columns[1], job)
    high = job.cols if lying else -(-job.cols * job.words // job.elements)
    # A power of two from row to row would make lines share few places in the cache.
    pitch = high + SPARE
    turned, groups = np.empty(TURNED_ROWS * pitch, u4), np.empty(TURNED_ROWS * job.groups, u4)
    tile = (turned.view(u1), turned, groups.view(f4), zeros)
    by_bytes = job.layout in (NIBBLES, BYTES)
    steps = (4 * pitch if by_bytes else pitch, job.groups, job.groups, pitches[3])
    for start in range(0, job.rows, TURNED_ROWS):
        count = min(TURNED_ROWS, job.rows - start)
        first, wide = start, count
        if lying:
            first = place_of(columns[1], start)[0]
            wide = _words_across(columns[1], start + count - 1, job.bits) - first
        transpose(words[first:], turned, (pitches[0], pitch), (wide, high))
        transpose(scales[start:], groups, (pitches[1], job.groups), (count, job.groups))
        if not _decode_rows(tile, columns, out, steps, job, (start, count, first)):
            return False
    return True
