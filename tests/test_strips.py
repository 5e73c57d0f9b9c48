"""Strips of windows, and what decoding takes beside what it reads and writes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moeconv import strips
from moeconv.codecs import CODECS
from moeconv.codecs.base import Window, block_of
from moeconv.decoding import decode_window
from moeconv.kernels.cpu.copies import CLASHING_NBYTES
from moeconv.kernels.cpu.scratch import RULES
from moeconv.parts import part_reads
from moeconv.steps import _decoding_nbytes, _scratch_nbytes, lent_nbytes
from moeconv.strips import TILE_NBYTES, tile_of
from moeconv.types import Params, Weight
from tests.codecs.float_oracles import weight_of
from tests.kernels import fp8_parts
from tests.kernels.ggml_blocks import params_of, some_blocks
from tests.kernels.int_weights import awq, gptq, ordered, packed, plain
from tests.kernels.nf4_parts import Nested
from tests.kernels.nf4_parts import made as nf4
from tests.kernels.oracle import as_numpy, headers

Parts = dict[str, np.ndarray]
Size = tuple[int, int]
Made = tuple[Mapping[str, torch.Tensor], Params]
FP8 = fp8_parts.params_of("F8_E4M3", (48, 16))


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
        "weight_scale": torch.rand(grid, generator=generator),
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
    assert tile.pitch % CLASHING_NBYTES


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


def nested(size: Size, scale: str) -> Made:
    """Return NF4, whose scales are bytes: their own scales are float32 whatever is asked."""
    return nf4(size, 16, Nested(256))


def blocks_of(kind: str, size: Size) -> Made:
    params = params_of(kind)
    blocks = some_blocks(kind, size[0], size[1] // int(params["block_cols"]))
    return {"weight": torch.from_numpy(blocks)}, params


# Codec, and what makes its parts with such scales.
TAKING: Mapping[str, tuple[str, Callable[[Size, str], Made]]] = {
    "AWQ": ("awq", lambda size, scale: awq(size, 32, "packed", scale)),
    "GPTQ": ("gptq", lambda size, scale: gptq(size, 4, 32, "packed", scale)),
    "GPTQ, 8 bits": ("gptq", lambda size, scale: gptq(size, 8, 16, "packed", scale)),
    "GPTQ, in order": ("gptq", lambda size, scale: ordered(gptq(size, 4, 32, "packed", scale))),
    "NF4": ("nf4", nested),
    "packed": ("packed-int", lambda size, scale: packed(size, 4, 16, scale=scale)),
    "packed, zeros": ("packed-int", lambda size, scale: packed(size, 4, 16, "plain", scale=scale)),
    "packed, packed zeros, in order": (
        "packed-int",
        lambda size, scale: packed(size, 4, 16, "packed", scale=scale, order="given"),
    ),
    "INT8": ("int-quantized", lambda size, scale: plain(size, 16, None, False)),
    "INT8, zeros": ("int-quantized", lambda size, scale: plain(size, 16, torch.int8, False)),
    "INT8, zeros of 32 bits": (
        "int-quantized",
        lambda size, scale: plain(size, 16, torch.int32, False),
    ),
    "INT8, in order": ("int-quantized", lambda size, scale: plain(size, 16, torch.int8, True)),
    "ggml": ("ggml", lambda size, scale: blocks_of("Q4_K", size)),
    "ggml without a kernel": ("ggml", lambda size, scale: blocks_of("IQ3_S", size)),
}


def test_every_rule_is_held_to() -> None:
    assert {codec for codec, _ in TAKING.values()} == set(RULES)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("scale", ["F32", "BF16"])
@pytest.mark.parametrize("name", TAKING)
@pytest.mark.parametrize("size", [(1536, 1024), (256, 2048)])
def test_what_kernels_take_is_counted(name: str, scale: str, size: Size, dtype: str) -> None:
    """numpy tells tracemalloc what it allocates."""
    codec, make = TAKING[name]
    weight, parts = made(codec, *make(size, scale))
    window = Window(0, weight.rows, 0, weight.cols)
    out = np.empty((window.rows, window.cols), np.float32 if dtype == "F32" else np.uint16)
    decode_window(weight, parts, window, dtype, out)  # compiled, or loaded
    tracemalloc.start()
    decode_window(weight, parts, window, dtype, out)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    counted = _scratch_nbytes(weight, part_reads(weight, 0, window), window, dtype)
    small = 64 << 10
    assert counted / 4 - small < peak <= counted + small


def test_the_larger_tile_is_counted_where_two_dtypes_are_written() -> None:
    """A tile has whole blocks of lines: more of the shorter ones may fit."""
    weight, _ = blocks_of_fp8(300, 5200, turned=False)
    window, dtypes = Window(0, weight.rows, 0, weight.cols), ("BF16", "F32")
    tiles = [lent_nbytes(tile_of(weight, window, itemsize).nbytes) for itemsize in (2, 4)]
    outputs = [lent_nbytes(window.rows * window.cols * itemsize) for itemsize in (2, 4)]
    assert tiles[0] > tiles[1]
    work: Any = SimpleNamespace(transposed=True, dtypes=dtypes)
    counted = _decoding_nbytes(work, weight, window, part_reads(weight, 0, window))
    assert counted == sum(outputs) + max(tiles)
