"""NF4 on a GPU: codes and scales found by their place in the flat run, values in a table."""

from __future__ import annotations

from math import gcd

import numpy as np
import torch
import triton
import triton.language as tl

from moeconv.codecs.base import Window
from moeconv.codecs.nf4 import NESTED_CODES, NF4_CODES
from moeconv.kernels.gpu.base import Output, Parts, check_part
from moeconv.kernels.gpu.scaled import (
    OVERFLOWS,
    corner,
    launch_of,
    place_checked,
    spread,
    tile_of,
)
from moeconv.types import Params


@triton.jit
def _load_codes(
    codes, begin, left, row, rows, cols, PAIRED: tl.constexpr, VEC: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Return int32 codes [ROWS, COLS] of the tile that begins at column `left`.

    begin: int64 [ROWS, 1], the place of each row's first column in the flat run. PAIRED: all are
    even, so that neighbours share a byte.
    """
    here = row[:, None] < rows
    if PAIRED:
        pair = tl.max_contiguous(left // 2 + tl.arange(0, COLS // 2), VEC // 2)[None, :]
        packed = tl.load(codes + begin // 2 + pair, mask=here & (pair * 2 < cols), other=0)
        word = packed.to(tl.int32)
        found = tl.reshape(tl.join(word >> 4, word & 15), (ROWS, COLS))
    else:
        col = (left + tl.arange(0, COLS))[None, :]
        at = begin + col
        word = tl.load(codes + at // 2, mask=here & (col < cols), other=0).to(tl.int32)
        found = (word >> ((1 - at % 2) * 4).to(tl.int32)) & 15
    return found


@triton.jit
def _load_scales(scales, values, outer, block, there, offset, NESTED: tl.constexpr):
    """Return the float32 scales of blocks; NESTED: blocks per outer scale, 0 without."""
    stored = tl.load(scales + block, mask=there, other=0)
    if NESTED:
        by = tl.load(outer + block // NESTED, mask=there, other=0)
        found = tl.load(values + stored.to(tl.int32)) * by + offset.to(tl.float32, bitcast=True)
    else:
        found = stored
    return found


@triton.jit(do_not_specialize=["offset", "first"])
def _decode(
    codes, scales, table, values, outer, out, counts, rows, cols, pitch, first, offset,
    out_row, out_col,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, PAIRED: tl.constexpr, SHARED: tl.constexpr,
    OVERFLOW: tl.constexpr, CODE: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Decode a tile; SHARED neighbours of a tile or more are of one block.

    first, pitch: the first element's place in the flat run, and places from row to row; offset: the
    bits of a float32.
    """
    top, left = corner(cols, ROWS, COLS)
    row = (top + tl.arange(0, ROWS)).to(tl.int64)
    col = tl.max_contiguous(left + tl.arange(0, COLS), VEC)
    begin = row[:, None] * pitch + first
    code = _load_codes(codes, begin, left, row, rows, cols, PAIRED, VEC, ROWS, COLS)
    first_col = (left + tl.arange(0, COLS // SHARED) * SHARED)[None, :]
    there = (row[:, None] < rows) & (first_col < cols)
    block = (begin + first_col) // BLOCK
    scale = _load_scales(scales, values, outer, block, there, offset, NESTED)
    value = tl.load(table + code) * spread(scale, ROWS, COLS)
    place_checked(
        value, out, counts, row, col, rows, cols, out_row, out_col, OVERFLOW, CODE, TURNED
    )  # fmt: skip


def _nested_parts(parts: Parts, params: Params, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the values of the codes of scales and the scales of those; stand-ins without."""
    nested, table = int(params["nested_blocksize"]), parts["weight.quant_map"]
    check_part(
        "absmax", parts["weight.absmax"], (torch.uint8 if nested else torch.float32,), (1, blocks)
    )
    if not nested:
        return table, table
    values, outer = parts["weight.nested_quant_map"], parts["weight.nested_absmax"]
    check_part("nested_quant_map", values, (torch.float32,), (1, NESTED_CODES))
    check_part("nested_absmax", outer, (torch.float32,), (1, -(-blocks // nested)))
    return values, outer


def decode(parts: Parts, window: Window, params: Params, out: Output) -> None:
    """Fill `out` [R, C] from whole parts: codes [N*K/2, 1] and scales [1, blocks].

    Equals codecs/nf4.py rounded once; tests/kernels/test_gpu_nf4.py holds it to that.
    """
    shape, pitch = (window.rows, window.cols), int(params["cols"])
    count, blocksize = int(params["rows"]) * pitch, int(params["blocksize"])
    codes, table = parts["weight"], parts["weight.quant_map"]
    out.check(shape)
    check_part("weight", codes, (torch.uint8,), (-(-count // 2), 1))
    check_part("quant_map", table, (torch.float32,), (1, NF4_CODES))
    values, outer = _nested_parts(parts, params, -(-count // blocksize))
    first, tile = window.row_start * pitch + window.col_start, tile_of(out.bits)
    common = gcd(blocksize, pitch, first)
    with np.errstate(over="ignore"):
        offset = np.array(float(params["nested_offset"])).astype(np.float32)
    _decode[tile.grid(shape)](
        codes,
        parts["weight.absmax"],
        table,
        values,
        outer,
        out.bits,
        out.counts,
        *shape,
        pitch,
        first,
        int(offset.view(np.int32)),
        *out.bits.stride(),
        BLOCK=blocksize,
        NESTED=int(params["nested_blocksize"]),
        PAIRED=pitch % 2 == first % 2 == 0,
        SHARED=min(common & -common, tile.cols),
        OVERFLOW=OVERFLOWS[out.dtype],
        **launch_of(tile, out.dtype),
    )
