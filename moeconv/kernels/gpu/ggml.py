"""ggml's block types on a GPU; device/ways.py leaves those without a kernel to the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from moeconv.codecs.base import Window
from moeconv.kernels.gpu.base import Output, Parts
from moeconv.kernels.gpu.ggml_values import group_offsets, group_scales, k_codes, simple_codes
from moeconv.kernels.gpu.scaled import (
    OVERFLOWS,
    check_rows,
    corner,
    launch_of,
    place_checked,
    spread,
    tile_of,
)
from moeconv.types import Params


class BlockType(NamedTuple):
    """A block of `nbytes` bytes for `cols` columns; `group` columns share a scale.

    codes, half: where the codes and the scale of the block begin; `offset`: what is added to a
    group, which follows the scale.
    """

    cols: int
    nbytes: int
    group: int
    codes: int
    half: int = 0
    offset: bool = False


BLOCK_TYPES: Mapping[str, BlockType] = {
    "Q4_0": BlockType(32, 18, 32, 2),
    "Q4_1": BlockType(32, 20, 32, 4, offset=True),
    "Q5_0": BlockType(32, 22, 32, 6),
    "Q5_1": BlockType(32, 24, 32, 8, offset=True),
    "Q8_0": BlockType(32, 34, 32, 2),
    "Q2_K": BlockType(256, 84, 16, 16, 80, offset=True),
    "Q3_K": BlockType(256, 110, 16, 32, 108),
    "Q4_K": BlockType(256, 144, 32, 16, offset=True),
    "Q5_K": BlockType(256, 176, 32, 48, offset=True),
    "Q6_K": BlockType(256, 210, 16, 0, 208),
    "IQ4_NL": BlockType(32, 18, 32, 2),
    "IQ4_XS": BlockType(256, 136, 32, 8),
    "MXFP4": BlockType(32, 17, 32, 1),
}


@triton.jit
def _decode(
    stored, out, counts, rows, cols, pitch, out_row, out_col,
    KIND: tl.constexpr, BLOCK: tl.constexpr, NBYTES: tl.constexpr, GROUP: tl.constexpr,
    CODES: tl.constexpr, HALF: tl.constexpr, OFFSET: tl.constexpr, OVERFLOW: tl.constexpr,
    CODE: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    TURNED: tl.constexpr,
):  # fmt: skip
    """Decode a tile of rows `pitch` bytes apart."""
    top, left = corner(cols, ROWS, COLS)
    row = (top + tl.arange(0, ROWS)).to(tl.int64)
    plain = left + tl.arange(0, COLS)  # the compiler knows less of remainders of the other
    col = tl.max_contiguous(left + tl.arange(0, COLS), VEC)
    begin = stored + row[:, None] * pitch
    mask = (row[:, None] < rows) & (col[None, :] < cols)
    at = begin + (plain // BLOCK * NBYTES)[None, :]
    if BLOCK == 32 or KIND == "IQ4_XS":
        number = simple_codes(at, (plain % BLOCK)[None, :], mask, KIND, CODES, VEC).to(tl.float32)
    else:
        number = k_codes(at, (plain % BLOCK)[None, :], mask, KIND, CODES, VEC).to(tl.float32)
    first = left + tl.arange(0, COLS // GROUP) * GROUP
    there = (row[:, None] < rows) & (first[None, :] < cols)
    at = begin + (first // BLOCK * NBYTES)[None, :]
    group = (first % BLOCK // GROUP)[None, :]
    scale = group_scales(at, group, there, KIND, HALF, BLOCK // GROUP)
    value = spread(scale, ROWS, COLS) * number
    if OFFSET:
        value = value + spread(group_offsets(at, group, there, KIND, HALF), ROWS, COLS)
    place_checked(
        value, out, counts, row, col, rows, cols, out_row, out_col, OVERFLOW, CODE, TURNED
    )  # fmt: skip


def decode(parts: Parts, window: Window, params: Params, out: Output) -> None:
    """Fill `out` [R, C] from the blocks [R, C / block_cols * block_nbytes] uint8.

    Equals gguf-py's float32 rounded once; tests/kernels/test_gpu_ggml.py holds it to that.
    """
    name, stored = str(params["type"]), parts["weight"]
    blocks = -(-window.cols // int(params["block_cols"]))
    shape = (window.rows, blocks * int(params["block_cols"]))
    check_rows("weight", stored, (torch.uint8,), (shape[0], blocks * int(params["block_nbytes"])))
    out.check(shape)
    kind, tile = BLOCK_TYPES[name], tile_of(out.bits)
    _decode[tile.grid(shape)](
        stored,
        out.bits,
        out.counts,
        *shape,
        stored.stride(0),
        *out.bits.stride(),
        KIND=name,
        BLOCK=kind.cols,
        NBYTES=kind.nbytes,
        GROUP=kind.group,
        CODES=kind.codes,
        HALF=kind.half,
        OFFSET=kind.offset,
        OVERFLOW=OVERFLOWS[out.dtype],
        **launch_of(tile, out.dtype),
    )
