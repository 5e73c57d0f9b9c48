"""What references hold while they decode: every allocation of torch, or of numpy for ggml."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from moeconv.codecs import CODECS
from moeconv.codecs.base import Window
from moeconv.kernels.gpu.base import OUT_DTYPES, Output
from moeconv.kernels.gpu.rounding import round_on_device
from moeconv.measure.cases import Case, Tile, cases
from moeconv.rederive import NBYTES_PER_ELEMENT
from moeconv.torch_dtypes import torch_dtype
from moeconv.types import Params
from tests.kernels.int_variants import int_variants

Parts = dict[str, torch.Tensor]
Given = tuple[str, Parts, Params]
TILES = (Tile(256, 1024), Tile(32, 4096), Tile(8, 256))
BYTES = {"fp8": "weight", "mxfp8": "weight", "nvfp4": "weight_scale"}  # that are E4M3


def peak(run: Callable[[], Any], numpy: bool = False) -> int:
    """Return the most bytes that a run has allocated at one time."""
    if numpy:
        tracemalloc.start()
        try:
            run()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    profiler: Any = seen.profiler
    events = [one for one in profiler.kineto_results.events() if one.name() == "[memory]"]
    held = [one.nbytes() for one in sorted(events, key=lambda one: one.start_ns())]
    return int(np.cumsum(held, dtype=np.int64).max(initial=0))


def parts_of(case: Case) -> Parts:
    """Return the parts as references take them."""
    found = {}
    for part, array in case.parts.items():
        tensor = torch.from_numpy(
            array.view(f"i{array.itemsize}") if array.itemsize == 2 else array
        )
        if any(case.kernel.startswith(codec) and BYTES[codec] == part for codec in BYTES):
            tensor = tensor.view(torch.float8_e4m3fn)
        if case.kernel == "float":
            tensor = tensor.view(torch_dtype(str(case.params["dtype"])))
        found[part] = tensor
    return found


def weights(tile: Tile) -> Iterator[Given]:
    """Yield codec, parts and params: of every case, of integers also what is read otherwise."""
    for case in cases(tile):
        yield case.kernel, parts_of(case), case.params
        for _, (parts, params) in int_variants(case.title, tile):
            yield case.kernel, parts, params
        if case.kernel == "nf4":
            plain = {**parts_of(case), "weight.absmax": case.parts["weight.absmax"]}
            scales = torch.from_numpy(plain["weight.absmax"]).float()
            yield "nf4", {**plain, "weight.absmax": scales}, {**case.params, "nested_blocksize": 0}
    grid = {"weight": torch.ones(tile.rows // 4, tile.cols)}
    yield "repeated", grid, {"dtype": "F32", "rows": 4, "cols": 1}
    yield "raw", {"weight": torch.ones(tile, dtype=torch.int64)}, {"dtype": "I64"}


def held(codec: str, parts: Parts, params: Params, tile: Tile) -> int:
    """Return the bytes that a reference holds while it decodes parts in memory of their own."""
    window = Window(0, tile.rows, 0, tile.cols)

    def run() -> torch.Tensor:
        return CODECS[codec].decode(parts, window, params).float()

    run()  # tables that are made once are not counted
    return peak(run, codec == "ggml")


@pytest.mark.parametrize("tile", TILES)
def test_what_a_reference_holds_is_no_more_than_is_said(tile: Tile) -> None:
    """Also of parts that lie turned. In a large window what is said is no tenth more, either."""
    most: dict[str, float] = {}
    for codec, parts, params in weights(tile):
        turned = {part: stored.T.contiguous().T for part, stored in parts.items()}
        for given in (parts, turned):
            found = held(codec, given, params, tile)
            said = CODECS[codec].reference_nbytes * (tile.rows + 1) * (tile.cols + 1)
            assert found <= said, (codec, params, found / tile.rows / tile.cols)
            most[codec] = max(most.get(codec, 0.0), found / said)
    assert set(most) == set(CODECS)
    if tile == TILES[0]:
        assert {codec for codec, share in most.items() if share < 0.9} == {"ggml"}


@pytest.mark.parametrize("dtype", OUT_DTYPES)
def test_rounding_on_a_device_holds_no_more_than_any_reference_there(dtype: str) -> None:
    values = torch.ones(256, 1024)
    least = min(
        CODECS[codec].reference_nbytes
        for codec in CODECS
        if codec not in ("float", "raw", "repeated", "ggml")
    )
    for turned in (False, True):
        room = torch.zeros(1024, 256, dtype=OUT_DTYPES[dtype])
        bits = room.T if turned else room.reshape(256, 1024)
        out = Output(dtype, bits, torch.zeros(3, dtype=torch.int64))
        found = values.nbytes + peak(lambda out=out: round_on_device(values, out))
        assert found <= least * values.numel()


def test_what_is_derived_again_fits_with_its_parts_and_results() -> None:
    parts = results = 4
    most = max(codec.reference_nbytes for codec in CODECS.values())
    assert most + parts + results <= NBYTES_PER_ELEMENT
