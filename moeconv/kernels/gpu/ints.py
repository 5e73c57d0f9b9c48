"""Integers of 2 to 8 bits times scales on a GPU: w = (code - zero) * scale, tile by tile."""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from moeconv.codecs import bits as b
from moeconv.codecs.base import Window
from moeconv.kernels.gpu.base import Output, check_part
from moeconv.kernels.gpu.fields import EXPONENT, UNIT, fields, unit_codes
from moeconv.kernels.gpu.scaled import (
    SCALE_KINDS,
    are_tame,
    corner,
    highest_tame,
    launch_of,
    place,
    place_counted,
    scale_bits,
    scale_values,
    spread,
    tame,
    tile_of,
)
from moeconv.types import Params

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INDICES = (torch.int32, torch.int64)
LARGEST = 512.0  # what |code - zero| stays below, unless zeros are 32 bits wide
NEVER_TAME = -1
COLUMN_REGISTERS = 128  # where each column has a scale of its own, which a thread holds
ALL_COLS = 1 << 30  # of one group
UNITS, FIELDS, BYTES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
NO_ZEROS, PLAIN_ZEROS, WIDE_ZEROS, PACKED_ZEROS = (tl.constexpr(kind) for kind in range(4))


class Groups(NamedTuple):
    """The groups of a window: columns per group, and how far into its group the first one is."""

    group_cols: int
    first: int
    total: int

    def shared(self, tile_cols: int) -> int:
        """Return how many neighbours in a tile have one scale for sure: a power of two."""
        common = gcd(self.group_cols, self.first)
        return min(common & -common, tile_cols)


def groups_of(window: Window, params: Params, count: int) -> Groups:
    """Return the groups of a window: those of its columns, or all `count` in activation order."""
    group_size = int(params["group_size"])
    if params.get("act_order"):
        return Groups(1, 0, count)
    if group_size == b.ONE_GROUP:
        return Groups(ALL_COLS, 0, 1)
    first = window.col_start % group_size
    return Groups(group_size, first, -(-(first + window.cols) // group_size))


class Job(NamedTuple):
    """How parts are read: codes of `bits` that lie in `run`s, XORed with `flip`; zeros plus
    `offset`, which is the zero point where there are none."""

    bits: int
    run: b.Run
    groups: Groups
    form: int = UNITS
    flip: int = 0
    zeros: int = NO_ZEROS
    offset: int = 0


class Stored(NamedTuple):
    """The parts of a window, turned so that rows come first, whatever way they are stored.

    codes: int32 words [R, W] or int8 numbers [R, C]; scales [R or 1, G]; zeros: int8 or int32
    numbers like the scales, or int32 words packed along the rows [W, G]; order: the group of each
    column [1, C].
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    order: torch.Tensor | None = None

    def check(self, job: Job, shape: tuple[int, int]) -> None:
        """Raise ShapeMismatch for parts that are not those of a window [R, C]."""
        rows, cols = shape
        count, lines = job.groups.total, 1 if len(self.scales) == 1 else rows
        if job.form == BYTES:
            check_part("codes", self.codes, (torch.int8,), shape)
        else:
            check_part("words", self.codes, (torch.int32,), (rows, b.words_for(cols, job.run)))
        check_part("scales", self.scales, FLOATS, (lines, count))
        if self.zeros is not None and job.zeros == PACKED_ZEROS:
            check_part("zeros", self.zeros, (torch.int32,), (b.words_for(rows, job.run), count))
        elif self.zeros is not None:
            check_part("zeros", self.zeros, (torch.int8, torch.int32), (lines, count))
        if self.order is not None:
            check_part("g_idx", self.order, INDICES, (1, cols))


@triton.jit
def _zero_points(
    zeros, row, group, there, zero_row, zero_group, offset,
    ZEROS: tl.constexpr, BITS: tl.constexpr, ELEMENTS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Return zero points [R, G]: float32, which holds them exactly, or int64 if they are wide."""
    at = zeros + group * zero_group
    if ZEROS == PACKED_ZEROS:
        found = fields(at, row, zero_row, there, BITS, ELEMENTS, WORDS)
    else:
        found = tl.load(at + row * zero_row, mask=there, other=0)
    if ZEROS == WIDE_ZEROS:
        shifted = found.to(tl.int64) + offset
    else:
        shifted = (found.to(tl.int32) + offset).to(tl.float32)
    return shifted


@triton.jit
def _codes(
    line, left, stride, here, words, cols, zero, exponent,
    FORM: tl.constexpr, BITS: tl.constexpr, ELEMENTS: tl.constexpr, WORDS: tl.constexpr,
    FLIP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Return float32 code - zero [ROWS, COLS]; zero: per unit if codes are read by units."""
    if FORM == UNITS:
        unit = left // UNIT + tl.arange(0, COLS // UNIT)[None, :]
        found = unit_codes(line, unit, stride, here, words, zero, exponent, BITS, FLIP)
        number = tl.reshape(found, (ROWS, COLS))
    else:
        col = left + tl.arange(0, COLS)[None, :]
        there = here & (col < cols)
        if FORM == FIELDS:
            code = fields(line, col, stride, there, BITS, ELEMENTS, WORDS)
        else:
            stored = tl.load(line + col.to(tl.int64) * stride, mask=there, other=0)
            code = stored.to(tl.int32) + 128
        number = code.to(tl.float32) - zero
    return number


@triton.jit
def store_scaled(
    number, scale, out, counts, row, col, rows, cols, out_row, out_col,
    HIGH: tl.constexpr, CODE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    TURNED: tl.constexpr,
):  # fmt: skip
    """Store float32 numbers [ROWS, COLS] times scales that neighbours share."""
    value = number * spread(scale, ROWS, COLS)
    if are_tame(scale, HIGH):
        place(tame(value, CODE), out, row, col, rows, cols, out_row, out_col, TURNED)
    else:
        place_counted(value, out, counts, row, col, rows, cols, out_row, out_col, CODE, TURNED)


# A thread takes one word of a row, whatever its address: if it took more, knowing that addresses
# are multiples of 16, it would store its codes in more pieces.
AS_THEY_ARE = [
    "codes",
    "scales",
    "zeros",
    "order",
    "counts",
    "words",
    "first",
    "offset",
    "exponent",
]


@triton.jit(do_not_specialize=AS_THEY_ARE)
def _decode(
    codes, scales, zeros, order, out, counts, rows, cols, words, code_row, code_word,
    scale_row, scale_group, zero_row, zero_group, first, offset, exponent, out_row, out_col,
    FORM: tl.constexpr, BITS: tl.constexpr, ELEMENTS: tl.constexpr, WORDS: tl.constexpr,
    FLIP: tl.constexpr, ZEROS: tl.constexpr, ORDERED: tl.constexpr, GROUP: tl.constexpr,
    SHARED: tl.constexpr, HIGH: tl.constexpr, KIND: tl.constexpr, CODE: tl.constexpr,
    VEC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Decode a tile; GROUP: columns per scale, of which SHARED or more in a tile are neighbours.

    Strides are in elements.
    """
    top, left = corner(cols, ROWS, COLS)
    row = (top + tl.arange(0, ROWS)).to(tl.int64)
    col = tl.max_contiguous(left + tl.arange(0, COLS), VEC)
    here, line = (row < rows)[:, None], codes + row[:, None] * code_row
    first_col = left + tl.arange(0, COLS // SHARED) * SHARED
    if ORDERED:
        group = tl.load(order + first_col, mask=first_col < cols, other=0).to(tl.int64)[None, :]
    else:
        group = ((first + first_col) // GROUP).to(tl.int64)[None, :]
    there = here & (first_col < cols)[None, :]
    scale = tl.load(scales + row[:, None] * scale_row + group * scale_group, mask=there, other=0)
    folded = offset.to(tl.float32)
    if ZEROS != NO_ZEROS:
        zero = _zero_points(
            zeros, row[:, None], group, there, zero_row, zero_group, offset,
            ZEROS, BITS, ELEMENTS, WORDS,
        )  # fmt: skip
        folded = 0.0
        if (FORM == UNITS) & (SHARED >= UNIT) & (ZEROS != WIDE_ZEROS):
            folded = spread(zero, ROWS, COLS // UNIT)
    number = _codes(
        line, left, code_word, here, words, cols, folded, exponent,
        FORM, BITS, ELEMENTS, WORDS, FLIP, ROWS, COLS,
    )  # fmt: skip
    if ZEROS == WIDE_ZEROS:
        exact = number.to(tl.int32).to(tl.int64) - spread(zero, ROWS, COLS)
        number = exact.to(tl.float32)
    elif (ZEROS != NO_ZEROS) & ((FORM != UNITS) | (SHARED < UNIT)):
        number -= spread(zero, ROWS, COLS)
    store_scaled(
        number, scale_values(scale, KIND), out, counts, row, col, rows, cols, out_row, out_col,
        HIGH, CODE, ROWS, COLS, TURNED,
    )  # fmt: skip


def decode_rows(stored: Stored, job: Job, out: Output) -> None:
    """Fill `out` [R, C] and add to its counts."""
    rows, cols = out.bits.shape
    out.check((rows, cols))
    stored.check(job, (rows, cols))
    scales, one_line = scale_bits(stored.scales), len(stored.scales) == 1  # for every row
    zeros, order = (scales if part is None else part for part in (stored.zeros, stored.order))
    tile, ordered = tile_of(out.bits), stored.order is not None
    shared, launch = 1 if ordered else job.groups.shared(tile.cols), launch_of(tile, out.dtype)
    if shared < UNIT.value:
        launch["maxnreg"] = COLUMN_REGISTERS
    _decode[tile.grid((rows, cols))](
        stored.codes,
        scales,
        zeros,
        order,
        out.bits,
        out.counts,
        rows,
        cols,
        stored.codes.shape[1],
        *stored.codes.stride(),
        0 if one_line else scales.stride(0),
        scales.stride(1),
        0 if one_line and job.zeros != PACKED_ZEROS else zeros.stride(0),
        zeros.stride(1),
        job.groups.first,
        job.offset,
        EXPONENT,
        *out.bits.stride(),
        FORM=job.form,
        BITS=job.bits,
        ELEMENTS=job.run.elements,
        WORDS=job.run.words,
        FLIP=job.flip,
        ZEROS=job.zeros,
        ORDERED=ordered,
        GROUP=job.groups.group_cols,
        SHARED=shared,
        HIGH=NEVER_TAME if job.zeros == WIDE_ZEROS else highest_tame(LARGEST, out.dtype),
        KIND=SCALE_KINDS[stored.scales.dtype],
        **launch,
    )
