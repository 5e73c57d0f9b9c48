"""Casts between plain floats on a GPU; a dtype to itself is a copy, NaN payloads included."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from moeconv.codecs.base import Window
from moeconv.kernels.gpu.base import MAGNITUDE, Output, Parts, counted
from moeconv.kernels.gpu.scaled import (
    OVERFLOWS,
    check_rows,
    corner,
    launch_of,
    place,
    place_checked,
    tile_of,
)
from moeconv.types import Params

# Stored dtype -> on the device, as the kernel loads it, and what SOURCE is.
SOURCES: Mapping[str, tuple[torch.dtype, torch.dtype, int]] = {
    "BF16": (torch.bfloat16, torch.int16, 0),
    "F16": (torch.float16, torch.int16, 1),
    "F32": (torch.float32, torch.int32, 2),
    "F64": (torch.float64, torch.float64, 3),
}
REGISTERS = 80  # with fewer, what is rare spills before it is known to be needed


@triton.jit
def _decode(
    source, out, counts, rows, cols, pitch, out_row, out_col,
    SOURCE: tl.constexpr, OVERFLOW: tl.constexpr, CODE: tl.constexpr, VEC: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Cast a tile of rows `pitch` elements apart."""
    top, left = corner(cols, ROWS, COLS)
    row = (top + tl.arange(0, ROWS)).to(tl.int64)
    col = tl.max_contiguous(left + tl.arange(0, COLS), VEC)
    mask = (row[:, None] < rows) & (col[None, :] < cols)
    stored = tl.load(source + row[:, None] * pitch + col[None, :], mask=mask, other=0)
    if SOURCE == 0:
        value = (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif SOURCE == 1:
        value = stored.to(tl.float16, bitcast=True).to(tl.float32)
    elif SOURCE == 2:
        value = stored.to(tl.float32, bitcast=True)
    else:
        value = stored.to(tl.float32)
    if SOURCE == CODE:
        place(stored, out, row, col, rows, cols, out_row, out_col, TURNED)
        if tl.max(value.to(tl.int32, bitcast=True) & MAGNITUDE) >= OVERFLOW:
            counted(value, stored, mask, counts, CODE)
    else:
        place_checked(
            value, out, counts, row, col, rows, cols, out_row, out_col, OVERFLOW, CODE, TURNED
        )  # fmt: skip


def decode(parts: Parts, window: Window, params: Params, out: Output) -> None:
    """Fill `out` [R, C] with the plain floats of `weight` [R, C].

    Equals codecs/floats.py rounded once; tests/kernels/test_gpu_floats.py holds it to that.
    """
    shape, weight = (window.rows, window.cols), parts["weight"]
    stored, loaded, source = SOURCES[str(params["dtype"])]
    check_rows("weight", weight, (stored,), shape)
    out.check(shape)
    tile = tile_of(out.bits)
    narrow = weight.element_size() == out.bits.element_size() == 2
    _decode[tile.grid(shape)](
        weight.view(loaded),
        out.bits,
        out.counts,
        *shape,
        weight.stride(0),
        *out.bits.stride(),
        SOURCE=source,
        OVERFLOW=OVERFLOWS[out.dtype],
        **{**launch_of(tile, out.dtype), "VEC": 8 if narrow else 4, "maxnreg": REGISTERS},
    )
