"""FP8 on a GPU, with one scale per block, whatever the block."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from moeconv.codecs.base import Window
from moeconv.codecs.fp8 import FP8_FORMATS, fp8_table
from moeconv.kernels.gpu.base import check_out
from moeconv.kernels.gpu.scaled import (
    SCALE_KINDS,
    are_tame,
    check_rows,
    corner,
    highest_tame,
    launch_of,
    place,
    place_counted,
    scale_bits,
    scale_values,
    shared_by,
    spread,
    tame,
    tile_of,
)
from moeconv.types import Params


@triton.jit
def numbers(stored, SHIFT: tl.constexpr, BIAS: tl.constexpr):
    """Return float32 of int8 codes as if the last exponent were one like any other.

    The bits of a magnitude are those of a float32 that is 2^(127 - bias) times too small.
    """
    bits = (stored.to(tl.int32) << SHIFT) & ((0x7F << SHIFT) - 0x80000000)
    return bits.to(tl.float32, bitcast=True) * (2.0 ** (127 - BIAS))


@triton.jit
def special(number, WILD: tl.constexpr, INFINITIES: tl.constexpr):
    """Return numbers whose last exponent means what it does: NaN, or Inf just at WILD."""
    magnitude = tl.abs(number)
    found = tl.where(magnitude < WILD, number, float("nan"))
    if INFINITIES:
        found = tl.where(magnitude == WILD, number * float("inf"), found)
    return found


@triton.jit
def _decode(
    codes, scales, out, counts, rows, cols, code_pitch, scale_pitch, block_rows, block_cols,
    out_row, out_col,
    SHIFT: tl.constexpr, BIAS: tl.constexpr, WILD: tl.constexpr, INFINITIES: tl.constexpr,
    HIGH: tl.constexpr, KIND: tl.constexpr, ROWS_SHARED: tl.constexpr, COLS_SHARED: tl.constexpr,
    CODE: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    TURNED: tl.constexpr,
):  # fmt: skip
    """Decode a tile; a scale covers block_rows x block_cols, so at least *_SHARED of the tile.

    Pitches and strides are in elements.
    """
    top, left = corner(cols, ROWS, COLS)
    row = (top + tl.arange(0, ROWS)).to(tl.int64)
    col = tl.max_contiguous(left + tl.arange(0, COLS), VEC)
    mask = (row[:, None] < rows) & (col[None, :] < cols)
    stored = tl.load(codes + row[:, None] * code_pitch + col[None, :], mask=mask, other=0)
    first_row = top + tl.arange(0, ROWS // ROWS_SHARED) * ROWS_SHARED
    first_col = left + tl.arange(0, COLS // COLS_SHARED) * COLS_SHARED
    at = (first_row // block_rows).to(tl.int64)[:, None] * scale_pitch
    there = (first_row < rows)[:, None] & (first_col < cols)[None, :]
    scale = tl.load(scales + at + (first_col // block_cols)[None, :], mask=there, other=0)
    scale = scale_values(scale, KIND)
    number = numbers(stored, SHIFT, BIAS)
    wide = spread(scale, ROWS, COLS)
    if (tl.max(tl.abs(number)) < WILD) & are_tame(scale, HIGH):
        result = tame(number * wide, CODE)
        place(result, out, row, col, rows, cols, out_row, out_col, TURNED)
    else:
        value = special(number, WILD, INFINITIES) * wide
        place_counted(value, out, counts, row, col, rows, cols, out_row, out_col, CODE, TURNED)


def decode_blocks(
    parts: Mapping[str, torch.Tensor],
    params: Params,
    block: tuple[int, int],
    out_dtype: str,
    out: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """Fill `out` [R, C] from codes uint8 [R, C] and scales [ceil R/block, ceil C/block].

    Scales are float32, BF16, F16 or E8M0 bytes. Equals codecs/fp8.py and codecs/mxfp8.py rounded
    once; tests/kernels/test_gpu_fp8.py holds it to that.
    """
    rows, cols = out.shape
    dtype, codes, scales = str(params["dtype"]), parts["weight"], parts[str(params["scale"])]
    high, wide = (max(extent, 1) for extent in block)
    check_out(out_dtype, out, (rows, cols))
    check_rows("codes", codes, (torch.uint8,), (rows, cols))
    check_rows("scales", scales, tuple(SCALE_KINDS), (-(-rows // high), -(-cols // wide)))
    form, tile = FP8_FORMATS[dtype], tile_of(out)
    finite = [abs(value) for value in fp8_table(dtype) if abs(value) < float("inf")]
    _decode[tile.grid((rows, cols))](
        codes.view(torch.int8),
        scale_bits(scales),
        out,
        counts,
        rows,
        cols,
        codes.stride(0),
        scales.stride(0),
        high,
        wide,
        *out.stride(),
        SHIFT=23 - form.mantissa_bits,
        BIAS=form.bias,
        WILD=65536.0 if form.infinities else 480.0,  # what the last exponent begins with, or NaN
        INFINITIES=form.infinities,
        HIGH=highest_tame(max(finite), out_dtype),
        KIND=SCALE_KINDS[scales.dtype],
        ROWS_SHARED=shared_by(rows, high, tile.rows),
        COLS_SHARED=shared_by(cols, wide, tile.cols),
        **launch_of(tile, out_dtype),
    )


def decode_block(
    parts: Mapping[str, torch.Tensor],
    window: Window,
    params: Params,
    out_dtype: str,
    out: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """Fill `out` [R, C]; one scale per block_rows x block_cols."""
    block = (int(params["block_rows"]), int(params["block_cols"]))
    decode_blocks(parts, params, block, out_dtype, out, counts)


def decode_channel(
    parts: Mapping[str, torch.Tensor],
    window: Window,
    params: Params,
    out_dtype: str,
    out: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """Fill `out` [R, C]; one scale per row."""
    decode_blocks(parts, params, (1, window.cols), out_dtype, out, counts)


def decode_tensor(
    parts: Mapping[str, torch.Tensor],
    window: Window,
    params: Params,
    out_dtype: str,
    out: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """Fill `out` [R, C]; one scale."""
    decode_blocks(parts, params, (window.rows, window.cols), out_dtype, out, counts)


def decode_block_turned(
    parts: Mapping[str, torch.Tensor],
    window: Window,
    params: Params,
    out_dtype: str,
    out: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """Fill `out` from parts stored [cols, rows]: out, window and blocks are turned, too."""
    block = (int(params["block_cols"]), int(params["block_rows"]))
    decode_blocks(parts, params, block, out_dtype, out, counts)


def decode_channel_turned(
    parts: Mapping[str, torch.Tensor],
    window: Window,
    params: Params,
    out_dtype: str,
    out: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """Fill `out` from parts stored [cols, rows], like out and window; one scale per column."""
    decode_blocks(parts, params, (window.rows, 1), out_dtype, out, counts)
