"""Strips of windows, and what decoding takes beside what it reads and writes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Mapping

import numpy as np
import pytest
import torch

from moeconv import strips
from moeconv.codecs import CODECS
from moeconv.codecs.base import Window, block_of
from moeconv.decoding import decode_window, part_reads
from moeconv.steps import _scratch_nbytes
from moeconv.strips import TILE_NBYTES, tile_of
from moeconv.types import Params, Weight
from tests.codecs.float_oracles import weight_of
from tests.kernels.int_weights import awq, gptq, ordered
from tests.kernels.nf4_parts import Nested
from tests.kernels.nf4_parts import made as nf4
from tests.kernels.oracle import as_numpy, headers

Parts = dict[str, np.ndarray]
FP8: Params = {
    "dtype": "F8_E4M3",
    "scale": "weight_scale_inv",
    "block_rows": 48,
    "block_cols": 16,
}


def made(
    codec: str, tensors: Mapping[str, torch.Tensor], params: Params, *, turned: bool = False
) -> tuple[Weight, Parts]:
    weight = weight_of(CODECS[codec], params, headers(tensors), turned)
    return weight, {part: as_numpy(tensor) for part, tensor in tensors.items()}


def blocks_of_fp8(rows: int, cols: int, *, turned: bool) -> tuple[Weight, Parts]:
    """Return a weight with a scale per 48 x 16 (16 x 48 where that is what is stored)."""
    generator = torch.Generator().manual_seed(1)
    stored = (cols, rows) if turned else (rows, cols)
    high, wide = (16, 48) if turned else (48, 16)
    codes = torch.randint(0, 255, stored, dtype=torch.uint8, generator=generator)
    grid = (-(-stored[0] // high), -(-stored[1] // wide))
    tensors = {
        "weight": codes.view(torch.float8_e4m3fn),
        "weight_scale_inv": torch.rand(grid, generator=generator),
    }
    return made("fp8-block", tensors, FP8, turned=turned)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("cols", [3, 1024, 40_000])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_strips_are_a_window_in_order_on_blocks(turned: bool, cols: int, itemsize: int) -> None:
    weight = blocks_of_fp8(1000, cols, turned=turned)[0]
    tiles = tuple(CODECS[weight.codec].tiles(weight.params).values())
    block = block_of(tiles, weight.rows, weight.cols)[turned]
    window = Window(0, weight.rows, 0, weight.cols)
    tile = tile_of(weight, window, itemsize)
    cut = list(strips.strips(weight, window, tile.lines))
    starts = [one.col_start if turned else one.row_start for one in cut]
    stops = [one.col_stop if turned else one.row_stop for one in cut]
    assert all(start % block == 0 for start in starts)
    assert starts == [0, *stops[:-1]]
    assert stops[-1] == (weight.cols if turned else weight.rows)
    assert max(b - a for a, b in zip(starts, stops, strict=True)) == tile.lines
    unit = np.lcm(block, strips.FEWEST_LINES)
    assert tile.nbytes <= max(TILE_NBYTES, unit * tile.pitch)
    assert tile.length * itemsize <= tile.pitch < tile.length * itemsize + 65
    assert tile.pitch % strips.CLASHING_NBYTES


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("window", [Window(0, 1930, 0, 1040), Window(96, 1930, 16, 1024)])
def test_more_than_a_tile_is_turned(turned: bool, dtype: str, window: Window) -> None:
    weight, parts = blocks_of_fp8(1930, 1040, turned=turned)
    given = strips.parts_of(weight, parts, Window(0, weight.rows, 0, weight.cols), window)
    bits = np.uint16 if dtype == "BF16" else np.float32
    rows = np.zeros((window.rows, window.cols), bits)
    columns = np.zeros((window.cols, window.rows), bits).T
    counts = decode_window(weight, given, window, dtype, rows)
    assert decode_window(weight, given, window, dtype, columns) == counts
    whole = f"u{rows.itemsize}"
    np.testing.assert_array_equal(columns.copy().view(whole), rows.view(whole))
    assert counts.nan
    assert tile_of(weight, window, rows.itemsize).lines < max(window.rows, window.cols)


@pytest.mark.parametrize("scale", ["F32", "BF16"])
@pytest.mark.parametrize("codec", ["awq", "gptq", "gptq in order", "nf4"])
@pytest.mark.parametrize("size", [(1536, 1024), (256, 2048)])
def test_what_kernels_take_is_counted(codec: str, scale: str, size: tuple[int, int]) -> None:
    """numpy tells tracemalloc what it allocates."""
    if codec == "awq":
        tensors, params = awq(size, 32, "packed", scale)
    elif codec == "nf4":
        tensors, params = nf4(size, 16, Nested(256))
    else:
        tensors, params = gptq(size, 4, 32, "packed")
        tensors, params = ordered((tensors, params)) if "order" in codec else (tensors, params)
    weight, parts = made(codec.split()[0], tensors, params)
    window = Window(0, weight.rows, 0, weight.cols)
    out = np.empty((window.rows, window.cols), np.float32)
    decode_window(weight, parts, window, "F32", out)  # compiled, or loaded
    tracemalloc.start()
    decode_window(weight, parts, window, "F32", out)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    counted = _scratch_nbytes(weight, window, part_reads(weight, 0, window))
    assert counted / 4 < peak <= counted + (64 << 10)
