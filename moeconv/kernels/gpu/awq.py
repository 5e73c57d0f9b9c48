"""AWQ on a GPU: words across eight rows, stored [cols, rows]."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moeconv.codecs.awq import PER_WORD
from moeconv.codecs.base import Window
from moeconv.kernels.gpu import ints
from moeconv.kernels.gpu.base import Output, Parts, check_part
from moeconv.kernels.gpu.fields import EXPONENT, lifted, woven
from moeconv.kernels.gpu.scaled import (
    SCALE_KINDS,
    Tile,
    corner,
    highest_tame,
    launch_of,
    scale_bits,
    scale_values,
    spread,
    tile_of,
)
from moeconv.types import Params

NO_ZEROS = tl.constexpr(-0x77777778)  # a word of eights
ACROSS = tl.constexpr(PER_WORD)
TILE = Tile(64, 128, turned=False)  # words of 64 rows fill a sector of 32 bytes


@triton.jit
def _rows_of(word, exponent, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return float32 [ROWS, COLS] of int32 words [ROWS / 8, COLS], in the ORDER of codecs/awq.py.

    They are lifted: row by row by the same amount.
    """
    high = word >> 16
    eight = woven(
        lifted(word, exponent, 0, 4),
        lifted(high, exponent, 0, 4),
        lifted(word, exponent, 4, 4),
        lifted(high, exponent, 4, 4),
        lifted(word, exponent, 8, 4),
        lifted(high, exponent, 8, 4),
        lifted(word, exponent, 12, 4),
        lifted(high, exponent, 12, 4),
    )
    return tl.reshape(tl.permute(eight, (0, 2, 3, 4, 1)), (ROWS, COLS))


@triton.jit(do_not_specialize=["codes", "scales", "zeros", "counts", "first", "exponent"])
def _decode(
    codes, scales, zeros, out, counts, rows, cols, code_pitch, scale_pitch, zero_pitch, first,
    exponent, out_row, out_col,
    PACKED: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr, HIGH: tl.constexpr,
    KIND: tl.constexpr, CODE: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Decode a tile; GROUP: columns per scale, of which SHARED or more in a tile are neighbours."""
    top, left = corner(cols, ROWS, COLS)
    row = (top + tl.arange(0, ROWS)).to(tl.int64)
    col = tl.max_contiguous(left + tl.arange(0, COLS), VEC)
    unit = top // ACROSS + tl.arange(0, ROWS // ACROSS)[:, None]
    here = unit * ACROSS < rows
    first_col = left + tl.arange(0, COLS // SHARED) * SHARED
    group = ((first + first_col) // GROUP).to(tl.int64)[None, :]
    there = (first_col < cols)[None, :]
    at = scales + group * scale_pitch + row[:, None]
    scale = tl.load(at, mask=there & (row < rows)[:, None], other=0)
    at = codes + col[None, :].to(tl.int64) * code_pitch + unit
    word = tl.load(at, mask=here & (col < cols)[None, :], other=0)
    if PACKED:
        zero = tl.load(zeros + group * zero_pitch + unit, mask=here & there, other=0)
    else:
        zero = tl.full((ROWS // ACROSS, COLS // SHARED), NO_ZEROS, tl.int32)
    zero = spread(_rows_of(zero, exponent, ROWS, COLS // SHARED), ROWS, COLS)
    ints.store_scaled(
        _rows_of(word, exponent, ROWS, COLS) - zero, scale_values(scale, KIND), out, counts, row,
        col, rows, cols, out_row, out_col, HIGH, CODE, ROWS, COLS, TURNED,
    )  # fmt: skip


def decode(parts: Parts, window: Window, params: Params, out: Output) -> None:
    """Fill `out` [R, C] from int32 words [C, R/8], scales [G, R] and zero points [G, R/8].

    Equals codecs/awq.py rounded once; tests/kernels/test_turned_ints.py holds it to that.
    """
    rows, cols = window.rows, window.cols
    codes, scales, packed = parts["qweight"], parts["scales"], params["zeros"] == "packed"
    zeros = parts["qzeros"] if packed else codes
    groups = ints.groups_of(window, params, len(scales))
    out.check((rows, cols))
    units = -(-rows // PER_WORD)
    check_part("words", codes, (torch.int32,), (cols, units))
    check_part("scales", scales, ints.FLOATS, (groups.total, rows))
    check_part("zeros", zeros, (torch.int32,), (groups.total if packed else cols, units))
    tile = tile_of(out.bits)
    tile = tile if tile.turned else TILE
    _decode[tile.grid((rows, cols))](
        codes,
        scale_bits(scales),
        zeros,
        out.bits,
        out.counts,
        rows,
        cols,
        codes.stride(0),
        scales.stride(0),
        zeros.stride(0),
        groups.first,
        EXPONENT,
        *out.bits.stride(),
        PACKED=packed,
        GROUP=groups.group_cols,
        SHARED=groups.shared(tile.cols),
        HIGH=highest_tame(ints.LARGEST, out.dtype),
        KIND=SCALE_KINDS[scales.dtype],
        **launch_of(tile, out.dtype),
    )
