"""FP8 on a GPU, with one scale per block, whatever the block."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl

from moeconv.codecs.base import Codec, Window
from moeconv.codecs.fp8 import FP8_FORMATS, Fp8Block, Fp8Channel, Fp8Tensor, fp8_table
from moeconv.codecs.mxfp8 import Mxfp8
from moeconv.kernels.gpu.base import Output, Parts
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


def _covered(codec: Codec, params: Params, turned: bool, shape: tuple[int, int]) -> tuple[int, int]:
    """Return the rows and columns under one scale, of a window of this shape as it is stored."""
    scale = codec.tiles(params)[str(params["scale"])]
    along = (scale.cols, scale.rows) if turned else (scale.rows, scale.cols)
    high, wide = (extent or max(all_of, 1) for extent, all_of in zip(along, shape, strict=True))
    return high, wide


def _decode_stored(
    parts: Parts,
    window: Window,
    params: Params,
    out: Output,
    *,
    codec: Codec,
    turned: bool = False,
) -> None:
    """Fill `out` [R, C] from codes uint8 [R, C] and scales [ceil R/block, ceil C/block].

    Scales are float32, BF16, F16 or E8M0 bytes. `turned`: parts, window and out are [cols, rows].
    Equals codecs/fp8.py and codecs/mxfp8.py rounded once; tests/kernels/test_fp8.py holds it to
    that.
    """
    rows, cols = shape = window.rows, window.cols
    dtype, codes, scales = str(params["dtype"]), parts["weight"], parts[str(params["scale"])]
    high, wide = _covered(codec, params, turned, shape)
    out.check(shape)
    check_rows("codes", codes, (torch.uint8,), shape)
    check_rows("scales", scales, tuple(SCALE_KINDS), (-(-rows // high), -(-cols // wide)))
    form, tile = FP8_FORMATS[dtype], tile_of(out.bits)
    finite = [abs(value) for value in fp8_table(dtype) if abs(value) < float("inf")]
    _decode[tile.grid(shape)](
        codes.view(torch.int8),
        scale_bits(scales),
        out.bits,
        out.counts,
        rows,
        cols,
        codes.stride(0),
        scales.stride(0),
        high,
        wide,
        *out.bits.stride(),
        SHIFT=23 - form.mantissa_bits,
        BIAS=form.bias,
        WILD=65536.0 if form.infinities else 480.0,  # what the last exponent begins with, or NaN
        INFINITIES=form.infinities,
        HIGH=highest_tame(max(finite), out.dtype),
        KIND=SCALE_KINDS[scales.dtype],
        ROWS_SHARED=shared_by(rows, high, tile.rows),
        COLS_SHARED=shared_by(cols, wide, tile.cols),
        **launch_of(tile, out.dtype),
    )


decode_block = partial(_decode_stored, codec=Fp8Block())
decode_channel = partial(_decode_stored, codec=Fp8Channel())
decode_tensor = partial(_decode_stored, codec=Fp8Tensor())
decode_mx = partial(_decode_stored, codec=Mxfp8())
decode_block_turned = partial(decode_block, turned=True)
decode_channel_turned = partial(decode_channel, turned=True)
decode_mx_turned = partial(decode_mx, turned=True)
