"""kt-kernel's packed forms on a GPU: scales of rows, then codes in the order of AMX tiles."""

from __future__ import annotations

from struct import pack, unpack
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from moeconv.codecs.amx import BLOCK_COLS, FORMS, HALF_ROWS, LIFT, STEP_ROWS, TILE_BYTES, AmxForm
from moeconv.errors import ShapeMismatch
from moeconv.kernels.gpu.base import LAUNCH, check_part

SCALE_ROWS, SCALE_COLS = 4, 1024  # per program, and of them at a time
TILES = 4  # per program, side by side: 3584 columns are whole times as many
INF_BF16 = tl.constexpr(0x7F80)
INF = tl.constexpr(0x7F800000)
LIFTED = tl.constexpr(float(LIFT))
INVERSE_127 = tl.constexpr(float(np.float32(1) / np.float32(FORMS["amxint8"].levels)))
# 1 / 112 in float64, as bits: Triton makes float32 of a float.
INVERSE_112 = tl.constexpr(unpack("<q", pack("<d", 1.0 / FORMS["amxint4"].levels))[0])
# Adding 1.5 * 2^23 leaves the nearest even integer in the low bits.
ROUNDER, ROUNDER_BITS = tl.constexpr(12582912.0), tl.constexpr(0x4B400000)
BLOCK, STEP = tl.constexpr(BLOCK_COLS), tl.constexpr(STEP_ROWS)
HALF, QUADS = tl.constexpr(HALF_ROWS), tl.constexpr(TILE_BYTES // 4)
TILE_WORDS = tl.constexpr(STEP_ROWS * TILE_BYTES // 4)


@triton.jit
def _row_scales(
    values, scales, bad, rows, cols, row_stride, col_stride,
    BITS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Fill scales [R] of BF16 bits [R, C]; bad: uint64 [1], lowered to the first row not finite."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    line = values + row.to(tl.int64)[:, None] * row_stride
    top = tl.zeros((ROWS, COLS), tl.int32)
    for left in range(0, cols, COLS):
        col = (left + tl.arange(0, COLS))[None, :]
        there = (row < rows)[:, None] & (col < cols)
        stored = tl.load(line + col.to(tl.int64) * col_stride, mask=there, other=0)
        top = tl.maximum(top, stored.to(tl.int32) & 0x7FFF)
    highest = tl.max(top, axis=1)
    largest = (highest << 16).to(tl.float32, bitcast=True)
    if BITS == 8:
        scale = largest * INVERSE_127
    else:
        inverse = tl.full((ROWS,), INVERSE_112, tl.int64).to(tl.float64, bitcast=True)
        scale = (largest.to(tl.float64) * inverse).to(tl.float32)
    tl.store(scales + row, scale, mask=row < rows)
    tl.atomic_min(bad + tl.zeros_like(row), row.to(tl.uint64), mask=highest >= INF_BF16)


@triton.jit
def _codes(stored, scale, BITS: tl.constexpr):
    """Return int32 codes [R, C] of BF16 bits [R, C] and the float32 scales of their rows [R, 1]."""
    value = (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    beyond = inverse.to(tl.int32, bitcast=True) == INF
    lift = tl.where(beyond & (scale != 0), LIFTED, 1.0)
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale * lift)
    inverse = tl.where(scale == 0, 0.0, inverse)
    near = (value * lift) * inverse + ROUNDER
    code = near.to(tl.int32, bitcast=True) - ROUNDER_BITS
    if BITS == 4:
        magnitude = (tl.abs(code) + 8) >> 4
        code = tl.where(code < 0, -magnitude, magnitude)
    return code


@triton.jit
def _pack(
    values, scales, out, rows, cols, row_stride, col_stride,
    BITS: tl.constexpr, BLOCK_ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Fill int32 words of codes: of TILES tiles side by side in a step of rows."""
    TILE_COLS: tl.constexpr = 512 // BITS
    COLS: tl.constexpr = TILES * TILE_COLS
    across = tl.cdiv(cols, COLS)
    top, left = tl.program_id(0) // across * STEP, tl.program_id(0) % across * COLS
    row = tl.arange(0, STEP)
    col = (left + tl.arange(0, COLS))[None, :]
    at = values + (top + row).to(tl.int64)[:, None] * row_stride + col.to(tl.int64) * col_stride
    stored = tl.load(at, mask=col < cols, other=0)
    code = _codes(stored, tl.load(scales + top + row)[:, None], BITS)
    if BITS == 4:  # the second half of a tile's columns in the high nibbles
        halves = tl.permute(tl.reshape(code, (STEP, TILES, 2, COLS // TILES // 2)), (0, 1, 3, 2))
        low, high = tl.split(halves)
        code = (low & 15) | ((high & 15) << 4)
    even, odd = tl.split(tl.reshape(code, (STEP, TILES, QUADS, 2, 2)))
    low, high = tl.split((even & 255) | ((odd & 255) << 8))
    word = low | (high << 16)  # [STEP, TILES, QUADS]
    first = top // BLOCK_ROWS * BLOCK_ROWS
    height, start = tl.minimum(BLOCK_ROWS, rows - first), left // BLOCK * BLOCK
    width = tl.minimum(BLOCK, cols - start)
    codes = first.to(tl.int64) * cols + start.to(tl.int64) * height + (top - first) * width
    at = out + (codes + (left - start) * STEP) * BITS // 32
    tile, quad = tl.arange(0, TILES)[None, :, None], tl.arange(0, QUADS)[None, None, :]
    within = (row // HALF * (HALF * QUADS) + row % HALF)[:, None, None] + quad * HALF
    there = left + tile * TILE_COLS < cols
    tl.store(at + tile * TILE_WORDS + within, word, mask=there)


def _check(values: torch.Tensor, form: AmxForm, part: str, out: torch.Tensor) -> None:
    """Raise ShapeMismatch unless BF16 bits can be packed and `out` has just the room."""
    rows, cols = values.shape
    check_part("values", values, (torch.int16,), (rows, cols))
    room = 4 * rows if part == "scale" else form.nbytes(rows, cols)
    flat = out.dtype == torch.uint8 and out.is_contiguous() and out.numel() == room
    if rows % STEP_ROWS or cols % form.tile_cols or not flat:
        raise ShapeMismatch(
            f"cannot pack the {part} of [{rows}, {cols}] as {form.name} into "
            f"{out.dtype} {list(out.shape)}",
            hint=f"rows in steps of {STEP_ROWS}, columns in steps of {form.tile_cols}",
        )


def encode(
    values: torch.Tensor, form: str, part: str, out: torch.Tensor, bad: torch.Tensor
) -> None:
    """Fill the bytes `out` of a form's "weight" or "scale" from BF16 bits, int16 [R, C].

    bad: int64 [1] of -1, which becomes the first row that holds NaN or Inf. Takes 4 bytes of the
    device per row, and as many as `out` if that does not begin at a multiple of 4. Equals
    codecs/amx.py; tests/kernels/test_gpu_amx.py holds it to that.
    """
    kind = FORMS[form]
    _check(values, kind, part, out)
    check_part("bad", bad[None], (torch.int64,), (1, 1))
    rows, cols = values.shape
    aligned = out.data_ptr() % 4 == 0
    words = (out if aligned else torch.empty_like(out)).view(torch.int32)
    scales = words if part == "scale" else torch.empty(rows, dtype=torch.int32, device=out.device)
    extents: tuple[Any, ...] = (rows, cols, *values.stride())
    given = scales.view(torch.float32)
    _row_scales[(-(-rows // SCALE_ROWS),)](
        values,
        given,
        bad.view(torch.uint64),
        *extents,
        BITS=kind.bits,
        ROWS=SCALE_ROWS,
        COLS=SCALE_COLS,
        **LAUNCH,
    )
    if part == "weight":
        steps = rows // STEP_ROWS * -(-cols // (TILES * kind.tile_cols))
        _pack[(steps,)](
            values,
            given,
            words,
            *extents,
            BITS=kind.bits,
            BLOCK_ROWS=kind.block_rows,
            TILES=TILES,
            **LAUNCH,
        )
    if not aligned:
        out.copy_(words.view(torch.uint8))
