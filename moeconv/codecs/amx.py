"""kt-kernel's packed forms of an expert slice: one scale per row, bytes in the order of AMX tiles.

As kt-kernel 0.7.2 writes them, byte for byte. Encoding alone: no checkpoint to read has them.
Order of the bytes, outer to inner: blocks of `block_rows` rows, blocks of 3584 columns, steps of
32 rows, tiles of `tile_cols` columns, 2 halves of 16 rows, 16 quads of columns, 16 rows, 4 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

BLOCK_COLS = 3584  # K_BLOCK
STEP_ROWS = 32
HALF_ROWS = 16  # rows of one AMX tile register
TILE_BYTES = 64  # per row of a tile register
LIFT = np.float32(2.0**64)

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


class AmxForm(NamedTuple):
    """One packed form: bits per value, rows per N_BLOCK, and the largest value of a row's code.

    `tile_cols`: columns per 64 bytes of a row; a slice's columns are a multiple of it.
    """

    name: str
    bits: int
    block_rows: int
    tile_cols: int
    levels: int

    def nbytes(self, rows: int, cols: int) -> int:
        """Return the bytes of the codes of [rows, cols]."""
        return rows * cols * self.bits // 8


FORMS: Mapping[str, AmxForm] = {
    "amxint8": AmxForm("amxint8", 8, 64, 64, 127),
    # 112 = 7 * 16: quantized to 8 bits first, of which the upper four are kept
    "amxint4": AmxForm("amxint4", 4, 128, 128, 112),
}


def packed_rows(name: str) -> int:
    """Return the rows whose bytes lie together in a form; 1 for "", which packs nothing."""
    return FORMS[name].block_rows if name else 1


def row_scales(values: Floats, form: AmxForm) -> Floats:
    """Return the float32 scales [R] of finite BF16 values [R, C] held as float32.

    INT8 multiplies by the float32 nearest 1/127: dividing is one ulp off in one row of twenty.
    INT4 multiplies by 1/112 in float64.
    """
    largest: Floats = np.abs(values).max(axis=1, initial=0.0)
    if form.bits == 8:
        return largest * (np.float32(1) / np.float32(form.levels))
    return np.asarray(largest.astype(np.float64) * (1.0 / form.levels), np.float32)


def quantize(values: Floats, scales: Floats, form: AmxForm) -> npt.NDArray[np.int8]:
    """Return the codes [R, C]: -128..127, or -7..7 for INT4; nearest even; rows of scale 0 are 0.

    Where 1 / scale is beyond float32 (rows below 1e-36) both are lifted first, which is exact.
    """
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        lift = np.where(np.isinf(np.float32(1) / scales), LIFT, np.float32(1))[:, None]
        inverse = np.float32(1) / (scales[:, None] * lift)
        scaled = (values * lift) * inverse
    scaled[scales == 0] = 0
    codes = np.clip(np.rint(scaled), -128, 127).astype(np.int32)
    if form.bits == 4:
        codes = np.sign(codes) * ((np.abs(codes) + 8) >> 4)
    return codes.astype(np.int8)


def pack(codes: npt.NDArray[np.int8], form: AmxForm) -> Bytes:
    """Return the bytes of codes [R, C] in kt-kernel's order."""
    rows, cols = codes.shape
    out = np.empty(form.nbytes(rows, cols), np.uint8)
    for step in _steps(rows, cols, form):
        out[step.start : step.stop] = _pack_tiles(codes[step.rows, step.cols], form)
    return out


def unpack(packed: Bytes, shape: tuple[int, int], form: AmxForm) -> npt.NDArray[np.int8]:
    """Return the codes [R, C] of bytes in kt-kernel's order."""
    codes = np.empty(shape, np.int8)
    for step in _steps(*shape, form):
        codes[step.rows, step.cols] = _unpack_tiles(packed[step.start : step.stop], form)
    return codes


class _Step(NamedTuple):
    """Bytes [start, stop): 32 rows of a block of columns."""

    start: int
    stop: int
    rows: slice
    cols: slice


def _steps(rows: int, cols: int, form: AmxForm) -> Iterator[_Step]:
    """Yield the steps of [rows, cols] in the order of their bytes."""
    at = 0
    for first in range(0, rows, form.block_rows):
        for left in range(0, cols, BLOCK_COLS):
            right = min(left + BLOCK_COLS, cols)
            for top in range(first, min(first + form.block_rows, rows), STEP_ROWS):
                stop = at + form.nbytes(STEP_ROWS, right - left)
                yield _Step(at, stop, slice(top, top + STEP_ROWS), slice(left, right))
                at = stop


def _pack_tiles(codes: npt.NDArray[np.int8], form: AmxForm) -> Bytes:
    """Return the bytes of codes [32, tiles * tile_cols]."""
    by_tile: Bytes = codes.view(np.uint8).reshape(STEP_ROWS, -1, form.tile_cols)
    if form.bits == 4:
        low, high = by_tile[..., :TILE_BYTES] & 15, by_tile[..., TILE_BYTES:] & 15
        by_tile = low | np.left_shift(high, 4, dtype=np.uint8)  # [32, tiles, 64]
    quads = by_tile.reshape(2, HALF_ROWS, -1, HALF_ROWS, 4)  # [half, row, tile, quad, byte]
    return quads.transpose(2, 0, 3, 1, 4).reshape(-1)


def _unpack_tiles(packed: Bytes, form: AmxForm) -> npt.NDArray[np.int8]:
    """Return the codes [32, tiles * tile_cols] of their bytes."""
    quads = packed.reshape(-1, 2, HALF_ROWS, HALF_ROWS, 4)  # [tile, half, quad, row, byte]
    by_tile = quads.transpose(1, 3, 0, 2, 4).reshape(STEP_ROWS, -1, TILE_BYTES).view(np.int8)
    if form.bits == 4:
        high, low = by_tile >> 4, (by_tile & 15 ^ 8) - 8
        by_tile = np.concatenate([low, high], axis=2)  # [32, tiles, 128]
    return by_tile.reshape(STEP_ROWS, -1)


def encode(values: Floats, form: AmxForm) -> tuple[Bytes, Floats]:
    """Return (bytes, scales [R]) of finite BF16 values [R, C] held as float32."""
    scales = row_scales(values, form)
    return pack(quantize(values, scales, form), form), scales


def decode(packed: Bytes, scales: Floats, cols: int, form: AmxForm) -> Floats:
    """Return the float32 [R, C] that bytes and scales stand for; an INT4 scale is a step / 16."""
    codes = unpack(packed, (scales.size, cols), form).astype(np.float32)
    return codes * np.float32(1 if form.bits == 8 else 16) * scales[:, None]
