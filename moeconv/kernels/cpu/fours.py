"""Pairs of 4-bit codes with a one-byte scale per group, by a table of what every scale makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moeconv.codecs.mxfp4 import E2M1
from moeconv.kernels.cpu.base import (
    BYTES_IN,
    BYTES_OUT,
    ELEMENTS,
    FLOATS_IN,
    INT,
    PAIR,
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
from moeconv.kernels.cpu.floats import (
    CODES,
    INF,
    MAGNITUDE,
    as_u4,
    narrow,
    overflow_of,
    u2,
    u4,
    u8,
)
from moeconv.kernels.cpu.scaled import f4, products
from moeconv.kernels.cpu.shuffles import (
    STRIDE,
    UPPER,
    WIDE,
    LookUp,
    more_nibbles_to_16,
    more_nibbles_to_32,
    nibbles_to_16,
    nibbles_to_32,
)
from moeconv.kernels.cpu.vectors import LANES

U1, U8 = np.uint8, np.dtype(np.uint8)
STRETCH = 16  # scales whose outputs are made at a time
PAIRS = LANES // 2  # bytes that are looked up at a time
FOUR_BIT, ONE_BYTE = 16, 256  # how many codes and scales there are
ALL = FOUR_BIT * ONE_BYTE
FINE, NAN_KIND, INF_KIND, OVERFLOW_KIND = range(4)
VALUES = np.array(E2M1, f4)
# What 256 scales make of 16 codes, one behind the other in a uint8 array: planes [256, bytes per
# output, 16]; kinds [256, 16], FINE or what is to be counted; marks [256], whether a scale makes
# any that is. (Every array that a kernel takes costs time at each call.)
Tables = npt.NDArray[np.uint8]


class Job(NamedTuple):
    """Extents: rows, columns, bytes per output; columns per scale, 16 or 32."""

    rows: int
    cols: int
    width: int
    group_cols: int


Two = tuple[Array, Array]
TWO = nb.UniTuple(BYTES_IN, 2)
JOB = nb.NamedUniTuple(INT, len(Job._fields), Job)


@jitable
def _to_planes(outputs: Array, planes: Array) -> None:
    """Fill the planes of tables of 16 outputs, which are unsigned integers."""
    width = planes.size // outputs.size
    step, stride = (UPPER, STRIDE) if width == 2 else (FOUR_BIT, 1)
    for plane in range(width):
        shift = u4(8 * plane)
        for first in range(0, outputs.size, FOUR_BIT):
            begin = first * width + plane * step
            for i in range(FOUR_BIT):
                planes[begin + i * stride] = np.uint8(u4(outputs[first + i]) >> shift)


@jitable
def classify(wide: Array, overflow: np.uint32, kinds: Array, marks: Array) -> None:
    """Fill kinds [N * 16] and marks [N] of what N scales make, float32 bits [N * 16]."""
    for i in range(wide.size):
        magnitude = u4(wide[i] & MAGNITUDE)
        kind = OVERFLOW_KIND if magnitude >= overflow else FINE
        kind = INF_KIND if magnitude == INF else kind
        kinds[i] = NAN_KIND if magnitude > INF else kind
    for scale in range(marks.size):
        most = np.uint8(FINE)
        for i in range(FOUR_BIT):
            most = max(most, kinds[scale * FOUR_BIT + i])
        marks[scale] = most


class Room(NamedTuple):
    """Room for what STRETCH scales make of 16 codes, flat: see `fill_planes`."""

    each: Array  # float32, the codes' values
    by: Array  # float32, their scales
    exact: Array  # uint64
    wide: Array  # uint32, the products' bits
    outputs: Array  # uint8


@jitable
def new_room(values: Array, width: int) -> Room:
    """Return room for outputs of `width` bytes of float32 values [16]."""
    count = STRETCH * FOUR_BIT
    each = np.empty(count, f4)
    for i in range(count):
        each[i] = values[i % FOUR_BIT]
    by, exact, wide = np.empty(count, f4), np.empty(count, u8), np.empty(count, u4)
    return Room(each, by, exact, wide, np.empty(count * width, U1))


@jitable
def fill_planes(scales: Array, begin: int, room: Room, planes: Array, how: Triple) -> None:
    """Fill the planes of the tables of STRETCH float32 scales, which begin at `begin`.

    how: output dtype, its bytes, whether all products are tame. room.wide: the products' bits.
    """
    code, width, tame = how
    for i in range(room.by.size):
        room.by[i] = scales[begin + i // FOUR_BIT]
    if tame:
        for i in range(room.by.size):
            room.wide[i] = as_u4(f4(room.each[i] * room.by[i]))
    else:
        products(room.each, room.by, room.exact, room.wide)
    if width == STRIDE:  # outputs one after the other
        narrow(code, room.wide, planes)
        return
    narrow(code, room.wide, room.outputs)
    if width == 2:
        _to_planes(room.outputs.view(u2), planes)
    else:
        _to_planes(room.outputs.view(u4), planes)


@compiled((FLOATS_IN, BYTES_OUT, PAIR))
def _fill(scales: Array, tables: Array, how: Pair) -> None:
    """Fill the tables of e2m1 codes times float32 scales [256], rounded once.

    how: output dtype, its bytes. A few scales at a time: cold memory costs more than the products.
    """
    code, width = how
    count, room = STRETCH * FOUR_BIT, new_room(VALUES, width)
    for first in range(0, ONE_BYTE, STRETCH):
        begin = first * FOUR_BIT
        planes = tables[begin * width : (begin + count) * width]
        fill_planes(scales, first, room, planes, (code, width, 0))
        kinds = tables[ALL * width + begin : ALL * width + begin + count]
        marks = ALL * (width + 1) + first
        classify(room.wide, overflow_of(code), kinds, tables[marks : marks + STRETCH])


def tables_of(scales: npt.NDArray[np.float32], out_dtype: str) -> Tables:
    """Return the tables of e2m1 codes under float32 scales [256]."""
    width = ELEMENTS[out_dtype].itemsize
    tables = np.empty(ALL * (width + 1) + ONE_BYTE, U8)
    _fill(scales, tables, (CODES[out_dtype], width))
    return tables


def _rest_decoder(look_up: LookUp, width: int) -> Callable[..., None]:
    """Return a jitable function that decodes fewer columns than a group to `width` bytes each."""

    @jitable
    def decode_rest(
        codes: Array, planes: Array, table: int, out: Array, begin: Pair, cols: int
    ) -> None:
        """Fill the last columns of a row by way of whole vectors.

        begin: the bytes where they begin in codes and out.
        """
        spare, outputs = np.zeros(PAIRS, np.uint8), np.empty(LANES * width, np.uint8)
        for col in range(0, cols, LANES):
            at, out_at = begin[0] + col // 2, begin[1] + col * width
            left = min(LANES, cols - col)
            for i in range((left + 1) // 2):
                spare[i] = codes[at + i]
            look_up(spare, planes, outputs, (0, table, 0))
            for i in range(left * width):
                out[out_at + i] = outputs[i]

    found: Callable[..., None] = decode_rest
    return found


def _decoder(look_up: LookUp, rest: LookUp, width: int, cols: int) -> Callable[..., bool]:
    """Return a jitable function that decodes to outputs of `width` bytes.

    look_up: of `cols` codes, which are a group; rest: of 16.
    """
    nbytes, pairs, given = FOUR_BIT * width, cols // 2, cols * width
    decode_rest = _rest_decoder(rest, width)

    @jitable
    def decode(stored: Two, tables: Array, out: Array, pitches: Triple, job: Job) -> bool:
        """Fill `out`; return whether a scale is marked."""
        codes, scales = stored
        marked, marks = np.uint8(0), ALL * (width + 1)
        groups = job.cols // job.group_cols
        for row in range(job.rows):
            at, out_at = row * pitches[0], row * pitches[2]
            for group in range(groups):
                scale = int(scales[row * pitches[1] + group])
                marked |= tables[marks + scale]
                look_up(codes, tables, out, (at, scale * nbytes, out_at))
                at, out_at = at + pairs, out_at + given
            left = job.cols - groups * job.group_cols
            if left:
                scale = int(scales[row * pitches[1] + groups])
                marked |= tables[marks + scale]
                decode_rest(codes, tables, scale * nbytes, out, (at, out_at), left)
        return bool(marked != 0)

    found: Callable[..., bool] = decode
    return found


_one_to_16 = _decoder(nibbles_to_16, nibbles_to_16, 2, LANES)
_two_to_16 = _decoder(more_nibbles_to_16, nibbles_to_16, 2, WIDE)
_one_to_32 = _decoder(nibbles_to_32, nibbles_to_32, 4, LANES)
_two_to_32 = _decoder(more_nibbles_to_32, nibbles_to_32, 4, WIDE)


@compiled((TWO, BYTES_IN, BYTES_OUT, TRIPLE, JOB))
def _decode(stored: Two, tables: Array, out: Array, pitches: Triple, job: Job) -> bool:
    """Fill `out`; return whether a scale is marked.

    stored: codes and scales; pitches: bytes per row of codes, scales and out.
    """
    if job.width == 2:
        if job.group_cols == LANES:
            return _one_to_16(stored, tables, out, pitches, job)
        return _two_to_16(stored, tables, out, pitches, job)
    if job.group_cols == LANES:
        return _one_to_32(stored, tables, out, pitches, job)
    return _two_to_32(stored, tables, out, pitches, job)


@compiled((TWO, BYTES_IN, TRIPLE, JOB))
def _count(stored: Two, tables: Array, pitches: Triple, job: Job) -> Triple:
    """Return the counts."""
    codes, scales = stored
    kinds, marks = ALL * job.width, ALL * (job.width + 1)
    nan = inf = over = 0
    for row in range(job.rows):
        for group in range((job.cols + job.group_cols - 1) // job.group_cols):
            scale = np.int64(scales[row * pitches[1] + group])
            if not tables[marks + scale]:
                continue
            first = group * job.group_cols
            for col in range(first, min(first + job.group_cols, job.cols)):
                pair = codes[row * pitches[0] + col // 2]
                code = pair & np.uint8(15) if col % 2 == 0 else pair >> np.uint8(4)
                kind = tables[kinds + scale * FOUR_BIT + np.int64(code)]
                nan += int(kind == NAN_KIND)
                inf += int(kind == INF_KIND)
                over += int(kind == OVERFLOW_KIND)
    return nan, inf, over


def decode(codes: Array, scales: Array, tables: Tables, group_cols: int, out: Array) -> Counts:
    """Fill `out` [R, C] from codes [R, ceil C/2] and scales [R, ceil C/group_cols], uint8."""
    rows, cols = out.shape
    check_array("codes", codes, U8, (rows, -(-cols // 2)))
    check_array("scales", scales, U8, (rows, -(-cols // group_cols)))
    taken, by, given = rows_of(codes), rows_of(scales), rows_of(out)
    job = Job(rows, cols, out.itemsize, group_cols)
    stored, pitches = (taken.memory, by.memory), (taken.pitch, by.pitch, given.pitch)
    if not _decode(stored, tables, given.memory, pitches, job):
        return Counts(0, 0, 0)
    return Counts(*_count(stored, tables, pitches, job))
