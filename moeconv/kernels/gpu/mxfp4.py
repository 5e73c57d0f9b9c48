"""MXFP4 on a GPU: each byte becomes two float32 bit patterns, times the group's power of two."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from moeconv.codecs.base import Window
from moeconv.codecs.mxfp4 import GROUP, as_bytes
from moeconv.kernels.gpu.base import CODES, LAUNCH, blocks_of, check_out, check_part, e8m0, finish
from moeconv.types import Params

BLOCK_ROWS, BLOCK_COLS = 8, 512
PER_SCALE = tl.constexpr(GROUP)


@triton.jit
def e2m1(code):
    """Return the float32 of int32 codes 0..15 (OCP MX v1.0, table 5): bits put together."""
    magnitude = code & 7
    normal = (((magnitude >> 1) + 126) << 23) | ((magnitude & 1) << 22)
    bits = tl.where(magnitude > 1, normal, tl.where(magnitude == 1, 126 << 23, 0))
    return (bits | ((code & 8) << 28)).to(tl.float32, bitcast=True)


@triton.jit
def pairs_of(packed, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return int32 codes [ROWS, COLS] of uint8 pairs [ROWS, COLS / 2], the low nibble first."""
    wide = packed.to(tl.int32)
    return tl.reshape(tl.join(wide & 15, wide >> 4), (ROWS, COLS))


@triton.jit
def _decode(
    codes,
    scales,
    out,
    counts,
    rows,
    cols,
    code_pitch,
    scale_pitch,
    out_row,
    out_col,
    CODE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Decode a block of ROWS x COLS; pitches and strides in elements."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    pair = tl.program_id(1) * (COLS // 2) + tl.arange(0, COLS // 2)[None, :]
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    mask = (row < rows) & (col < cols)
    there = (row < rows) & (pair * 2 < cols)
    packed = tl.load(codes + row * code_pitch + pair, mask=there, other=0)
    scale = tl.load(scales + row * scale_pitch + col // PER_SCALE, mask=mask, other=127)
    value = e2m1(pairs_of(packed, ROWS, COLS)) * e8m0(scale)
    finish(value, mask, out + row * out_row + col.to(tl.int64) * out_col, counts, CODE)


def decode(
    parts: Mapping[str, torch.Tensor],
    window: Window,
    params: Params,
    out_dtype: str,
    out: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """Fill `out` [R, C] from codes [R, C/2] and scales [R, ceil(C/32)], both uint8.

    Equals codecs/mxfp4.py rounded once; tests/kernels/test_gpu_mxfp4.py holds it to that.
    """
    shape = (window.rows, window.cols)
    codes, scales = (as_bytes(parts[str(params[part])]) for part in ("codes", "scales"))
    check_part("codes", codes, (torch.uint8,), (shape[0], -(-shape[1] // 2)))
    check_part("scales", scales, (torch.uint8,), (shape[0], -(-shape[1] // GROUP)))
    check_out(out_dtype, out, shape)
    _decode[blocks_of(shape, BLOCK_ROWS, BLOCK_COLS)](
        codes,
        scales,
        out,
        counts,
        *shape,
        codes.stride(0),
        scales.stride(0),
        *out.stride(),
        CODE=CODES[out_dtype],
        ROWS=BLOCK_ROWS,
        COLS=BLOCK_COLS,
        **LAUNCH,
    )
