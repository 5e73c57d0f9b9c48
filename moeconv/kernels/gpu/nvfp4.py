"""NVFP4 on a GPU: pairs of codes times E4M3 scales, which one scale of the weight scales."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moeconv.codecs.base import Window
from moeconv.codecs.fp8 import FP8_FORMATS
from moeconv.codecs.mxfp4 import E2M1
from moeconv.codecs.nvfp4 import GROUP
from moeconv.kernels.gpu.base import Output, Parts
from moeconv.kernels.gpu.fp8 import numbers, special
from moeconv.kernels.gpu.scaled import (
    SCALE_KINDS,
    are_tame,
    check_rows,
    corner,
    highest_tame,
    launch_of,
    load_e2m1,
    load_groups,
    place,
    place_counted,
    scale_bits,
    scale_values,
    spread,
    tame,
    tile_of,
)
from moeconv.types import Params

PER_SCALE = tl.constexpr(GROUP)
E4M3 = FP8_FORMATS["F8_E4M3"]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _decode(
    codes, scales, whole, out, counts, rows, cols, pairs, groups, code_pitch, scale_pitch,
    out_row, out_col,
    SHIFT: tl.constexpr, BIAS: tl.constexpr, DIVIDES: tl.constexpr, KIND: tl.constexpr,
    HIGH: tl.constexpr, CODE: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Decode a tile. pairs, groups: bytes per row of codes and scales; pitches: elements."""
    top, left = corner(cols, ROWS, COLS)
    row = (top + tl.arange(0, ROWS)).to(tl.int64)
    col = tl.max_contiguous(left + tl.arange(0, COLS), VEC)
    stored = load_groups(scales, row, left, rows, groups, scale_pitch, PER_SCALE, COLS)
    scale = special(numbers(stored, SHIFT, BIAS), 480.0, False)
    by = scale_values(tl.load(whole), KIND)
    scale = tl.div_rn(scale, by) if DIVIDES else scale * by
    number = load_e2m1(codes, row, left, rows, pairs, code_pitch, ROWS, COLS, VEC)
    value = number * spread(scale, ROWS, COLS)
    if are_tame(scale, HIGH):
        place(tame(value, CODE), out, row, col, rows, cols, out_row, out_col, TURNED)
    else:
        place_counted(value, out, counts, row, col, rows, cols, out_row, out_col, CODE, TURNED)


def _decode_checked(
    stored: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    divides: bool,
    out: Output,
) -> None:
    """Fill `out` [R, C] from codes [R, ceil C/2], scales [R, ceil C/16] and one scale [1, 1]."""
    codes, scales, whole = stored
    rows, cols = out.bits.shape
    pairs, groups = -(-cols // 2), -(-cols // GROUP)
    out.check((rows, cols))
    check_rows("codes", codes, (torch.uint8,), (rows, pairs))
    check_rows("scales", scales, (torch.uint8,), (rows, groups))
    check_rows("the scale of the weight", whole, FLOATS, (1, 1))
    tile = tile_of(out.bits)
    _decode[tile.grid((rows, cols))](
        codes,
        scales.view(torch.int8),
        scale_bits(whole),
        out.bits,
        out.counts,
        rows,
        cols,
        pairs,
        groups,
        codes.stride(0),
        scales.stride(0),
        *out.bits.stride(),
        SHIFT=23 - E4M3.mantissa_bits,
        BIAS=E4M3.bias,
        DIVIDES=divides,
        KIND=SCALE_KINDS[whole.dtype],
        HIGH=highest_tame(max(E2M1), out.dtype),
        **launch_of(tile, out.dtype),
    )


def decode_ct(parts: Parts, window: Window, params: Params, out: Output) -> None:
    """Fill `out` [R, C]; the weight's scale divides.

    Equals codecs/nvfp4.py rounded once; tests/kernels/test_nvfp4.py holds it to that.
    """
    stored = (parts["weight_packed"], parts["weight_scale"], parts["weight_global_scale"])
    _decode_checked(stored, True, out)


def decode_modelopt(parts: Parts, window: Window, params: Params, out: Output) -> None:
    """Fill `out` [R, C]; the weight's scale multiplies.

    Equals codecs/nvfp4.py rounded once; tests/kernels/test_nvfp4.py holds it to that.
    """
    stored = (parts["weight"], parts["weight_scale"], parts["weight_scale_2"])
    _decode_checked(stored, False, out)
