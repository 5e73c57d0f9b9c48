"""What the kernels share that multiply numbers by scales: tiles, scales, where results go.

A memory-bound kernel on an H200 has about 11 integer instructions per element. So whether a tile
can hold NaN, Inf or overflows is asked of its scales (and of the largest code), once per tile:
a tame tile is rounded without a look at NaN, and not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import floor, log2
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from moeconv.errors import ShapeMismatch
from moeconv.kernels.gpu.base import CODES, LAUNCH, MAGNITUDE, check_part, counted, e8m0, rounded

# 32 elements for each thread of eight warps; more would leave registers for few warps.
TILE_ELEMENTS = 8192
TILE_ROWS = 32
LEAST_COLS = 64
TURNED_TILE = (128, 64)
STEPPED_TILE = (64, 64)  # each element has an address of its own
# Registers that what is rare would take from what is not.
RESOURCES: Mapping[str, int] = {"num_warps": 8, "maxnreg": 64}
# Results below which nothing rounds to Inf, by output dtype.
HIGHEST: Mapping[str, float] = {"BF16": 2.0**127, "F16": 2.0**15, "F32": 2.0**127}
# The bits of the smallest float32 that rounds to Inf.
OVERFLOWS: Mapping[str, int] = {"BF16": 0x7F7F8000, "F16": 0x477FF000, "F32": 0x7F800000}
# What a scale is stored as: E8M0 bytes, BF16 bits, float numbers.
SCALE_KINDS: Mapping[torch.dtype, int] = {
    torch.uint8: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float32: 2,
}


class Tile(NamedTuple):
    """What one program decodes; `turned`: the output's rows lie closer together than its cols."""

    rows: int
    cols: int
    turned: bool

    def grid(self, shape: tuple[int, int]) -> tuple[int]:
        """Return the grid of programs that cover a matrix, row after row of tiles."""
        return (-(-shape[0] // self.rows) * -(-shape[1] // self.cols),)


def tile_of(out: torch.Tensor) -> Tile:
    """Return the tile for an output: wide enough for whole cache lines on both sides."""
    rows, cols = out.shape
    if rows > 1 and out.stride(0) < out.stride(1):
        return Tile(*(TURNED_TILE if out.stride(0) == 1 else STEPPED_TILE), True)
    tall = min(TILE_ROWS, triton.next_power_of_2(max(rows, 1)))
    wide = min(TILE_ELEMENTS // tall, triton.next_power_of_2(max(cols, LEAST_COLS)))
    return Tile(tall, wide, False)


def launch_of(tile: Tile, out_dtype: str) -> dict[str, Any]:
    """Return the constants that every kernel here takes.

    VEC: neighbours that a thread takes, so that it stores 16 bytes at once.
    """
    return {
        "CODE": CODES[out_dtype],
        "VEC": 4 if out_dtype == "F32" else 8,
        "ROWS": tile.rows,
        "COLS": tile.cols,
        "TURNED": tile.turned,
        **RESOURCES,
        **LAUNCH,
    }


def highest_tame(largest: float, out_dtype: str) -> int:
    """Return the bits of the largest scale that makes no Inf of numbers up to `largest`."""
    return (floor(log2(HIGHEST[out_dtype] / largest)) + 127) << 23


def shared_by(extent: int, block: int, tile: int) -> int:
    """Return how many neighbours in a tile have one scale for sure: a power of two.

    extent, block, tile: along one axis, of the weight, of what a scale covers and of the tile.
    """
    return tile if block >= extent else min(block & -block, tile)


def check_rows(
    name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, int]
) -> None:
    """Raise ShapeMismatch unless a part is [rows, cols] of one of `dtypes`, rows contiguous."""
    check_part(name, tensor, dtypes, shape)
    if shape[1] > 1 and tensor.stride(1) != 1:
        raise ShapeMismatch(
            f"{name} has strides {tensor.stride()}, its rows are not contiguous",
            hint="pass the elements as stored",
        )


def scale_bits(scales: torch.Tensor) -> torch.Tensor:
    """Return scales as kernels load them: BF16 as int16."""
    return scales.view(torch.int16) if scales.dtype == torch.bfloat16 else scales


@triton.jit
def corner(cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return the first row and the first column of this program's tile."""
    across = tl.cdiv(cols, COLS)
    return tl.program_id(0) // across * ROWS, tl.program_id(0) % across * COLS


@triton.jit
def scale_values(stored, KIND: tl.constexpr):
    """Return float32 of stored scales; KIND as in SCALE_KINDS."""
    if KIND == 0:
        found = e8m0(stored)
    elif KIND == 1:
        found = (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        found = stored.to(tl.float32)
    return found


@triton.jit
def are_tame(scales, HIGH: tl.constexpr):
    """Return whether no float32 scale is NaN or above HIGH (bits)."""
    return tl.max(scales.to(tl.int32, bitcast=True) & MAGNITUDE) <= HIGH


@triton.jit
def spread(scales, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return scales [R, C] repeated to [ROWS, COLS]."""
    wide = tl.broadcast_to(
        scales[:, None, :, None],
        (scales.shape[0], ROWS // scales.shape[0], scales.shape[1], COLS // scales.shape[1]),
    )
    return tl.reshape(wide, (ROWS, COLS))


@triton.jit
def e2m1_pairs(packed, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return float32 [ROWS, COLS] of uint8 pairs [ROWS, COLS / 2], the low nibble first.

    The three bits of a magnitude are those of a float32 that is 2^126 times too small.
    """
    word = packed.to(tl.int32)
    low = ((word & 0x07) << 22) | ((word & 0x08) << 28)
    high = ((word & 0x70) << 18) | ((word & 0x80) << 24)
    bits = tl.reshape(tl.join(low, high), (ROWS, COLS))
    return bits.to(tl.float32, bitcast=True) * (2.0**126)


@triton.jit
def load_e2m1(
    codes, row, left, rows, pairs, pitch, ROWS: tl.constexpr, COLS: tl.constexpr, VEC: tl.constexpr
):  # fmt: skip
    """Return float32 [ROWS, COLS] of the tile that begins at column `left`.

    codes: uint8 pairs, `pairs` a row, rows `pitch` apart.
    """
    pair = tl.max_contiguous(left // 2 + tl.arange(0, COLS // 2), VEC // 2)
    there = (row[:, None] < rows) & (pair[None, :] < pairs)
    packed = tl.load(codes + row[:, None] * pitch + pair[None, :], mask=there, other=0)
    return e2m1_pairs(packed, ROWS, COLS)


@triton.jit
def load_groups(scales, row, left, rows, groups, pitch, GROUP: tl.constexpr, COLS: tl.constexpr):
    """Return the stored scales [ROWS, COLS / GROUP] of the tile that begins at column `left`.

    scales: `groups` a row, rows `pitch` apart.
    """
    group = left // GROUP + tl.arange(0, COLS // GROUP)
    there = (row[:, None] < rows) & (group[None, :] < groups)
    return tl.load(scales + row[:, None] * pitch + group[None, :], mask=there, other=0)


@triton.jit
def tame(value, CODE: tl.constexpr):
    """Return what `rounded` does, of numbers that are finite before and after."""
    bits = value.to(tl.int32, bitcast=True)
    if CODE == 0:
        result = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)
    elif CODE == 1:
        result = value.to(tl.float16).to(tl.int16, bitcast=True)
    else:
        result = bits
    return result


@triton.jit
def place(result, out, row, col, rows, cols, out_row, out_col, TURNED: tl.constexpr):
    """Store bits [ROWS, COLS] where they belong; neighbouring threads write neighbours."""
    wide = col.to(tl.int64)
    if TURNED:
        at = out + wide[:, None] * out_col + row[None, :] * out_row
        tl.store(at, tl.trans(result), mask=(col[:, None] < cols) & (row[None, :] < rows))
    else:
        at = out + row[:, None] * out_row + wide[None, :] * out_col
        tl.store(at, result, mask=(row[:, None] < rows) & (col[None, :] < cols))


@triton.jit
def place_counted(
    value, out, counts, row, col, rows, cols, out_row, out_col, CODE: tl.constexpr,
    TURNED: tl.constexpr,
):  # fmt: skip
    """Round float32 values that may be anything, store and count them."""
    result = rounded(value, CODE)
    place(result, out, row, col, rows, cols, out_row, out_col, TURNED)
    counted(value, result, (row[:, None] < rows) & (col[None, :] < cols), counts, CODE)


@triton.jit
def place_checked(
    value, out, counts, row, col, rows, cols, out_row, out_col, OVERFLOW: tl.constexpr,
    CODE: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Round and store float32 values of which no scale says whether they are tame; count them."""
    top = tl.max(value.to(tl.int32, bitcast=True) & MAGNITUDE)
    if top < OVERFLOW:
        place(tame(value, CODE), out, row, col, rows, cols, out_row, out_col, TURNED)
    else:
        place_counted(value, out, counts, row, col, rows, cols, out_row, out_col, CODE, TURNED)
