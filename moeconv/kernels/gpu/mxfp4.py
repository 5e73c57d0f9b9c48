"""MXFP4 on a GPU: pairs of codes times the group's power of two, which BF16 holds exactly."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moeconv.codecs.base import Window
from moeconv.codecs.mxfp4 import E2M1, GROUP, as_bytes
from moeconv.kernels.gpu.base import Output, Parts, e8m0
from moeconv.kernels.gpu.scaled import (
    are_tame,
    check_rows,
    corner,
    highest_tame,
    launch_of,
    load_e2m1,
    load_groups,
    place,
    place_counted,
    spread,
    tame,
    tile_of,
)
from moeconv.types import Params

PER_SCALE = tl.constexpr(GROUP)


@triton.jit
def _decode(
    codes, scales, out, counts, rows, cols, pairs, groups, code_pitch, scale_pitch,
    out_row, out_col,
    HIGH: tl.constexpr, CODE: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Decode a tile. pairs, groups: bytes per row of both parts; pitches: elements."""
    top, left = corner(cols, ROWS, COLS)
    row = (top + tl.arange(0, ROWS)).to(tl.int64)
    col = tl.max_contiguous(left + tl.arange(0, COLS), VEC)
    scale = e8m0(load_groups(scales, row, left, rows, groups, scale_pitch, PER_SCALE, COLS))
    number = load_e2m1(codes, row, left, rows, pairs, code_pitch, ROWS, COLS, VEC)
    value = number * spread(scale, ROWS, COLS)
    if are_tame(scale, HIGH):
        if CODE == 0:  # no more bits than BF16 has
            result = (value.to(tl.int32, bitcast=True) >> 16).to(tl.int16)
        else:
            result = tame(value, CODE)
        place(result, out, row, col, rows, cols, out_row, out_col, TURNED)
    else:
        place_counted(value, out, counts, row, col, rows, cols, out_row, out_col, CODE, TURNED)


def decode(parts: Parts, window: Window, params: Params, out: Output) -> None:
    """Fill `out` [R, C] from codes [R, C/2] and scales [R, ceil(C/32)], both uint8.

    Equals codecs/mxfp4.py rounded once; tests/kernels/test_gpu_mxfp4.py holds it to that.
    """
    shape = (window.rows, window.cols)
    codes, scales = (as_bytes(parts[str(params[part])]) for part in ("codes", "scales"))
    pairs, groups = -(-shape[1] // 2), -(-shape[1] // GROUP)
    check_rows("codes", codes, (torch.uint8,), (shape[0], pairs))
    check_rows("scales", scales, (torch.uint8,), (shape[0], groups))
    out.check(shape)
    tile = tile_of(out.bits)
    _decode[tile.grid(shape)](
        codes,
        scales,
        out.bits,
        out.counts,
        *shape,
        pairs,
        groups,
        codes.stride(0),
        scales.stride(0),
        *out.bits.stride(),
        HIGH=highest_tame(max(E2M1), out.dtype),
        **launch_of(tile, out.dtype),
    )
