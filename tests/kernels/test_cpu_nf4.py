"""The NF4 kernel: codes under every kind of scale, blocks that cross rows, any window."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeconv.codecs.base import Window
from moeconv.errors import ShapeMismatch
from moeconv.kernels.cpu import KERNELS, Counts, nf4
from moeconv.kernels.cpu.cache import cpu_features
from tests.kernels.assembly import assembly_of, assert_one_run, nb
from tests.kernels.nf4_parts import STATE, TABLES, Nested, every_pair, made
from tests.kernels.oracle import check, decode

touching = partial(check, "nf4", decode=partial(decode, pad=0))
apart = partial(check, "nf4")


@pytest.mark.parametrize("compare", [touching, apart])
def test_every_code_under_every_kind_of_scale(compare: Any) -> None:
    compare(*every_pair())


@pytest.mark.parametrize("name", TABLES)
def test_any_table(name: str) -> None:
    touching(*every_pair(TABLES[name]))


@pytest.mark.parametrize("name", TABLES)
def test_scales_of_zero_alone(name: str) -> None:
    """They are tame themselves: what the table holds decides."""
    parts, params = every_pair(TABLES[name])
    touching({**parts, "weight.absmax": torch.zeros_like(parts["weight.absmax"])}, params)


def test_hand_computed() -> None:
    parts = {
        "weight": np.array([[0x01], [0x23], [0x45]], np.uint8),
        "weight.absmax": np.array([[2.0, 0.5]], np.float32),
        "weight.quant_map": np.arange(16, dtype=np.float32)[None] * 10,
        STATE: np.zeros((1, 1), np.uint8),
    }
    params = {
        "rows": 2, "cols": 3, "blocksize": 4, "nested_blocksize": 0, "nested_offset": 0.0
    }  # fmt: skip
    out = np.empty((2, 3), np.float32)
    assert KERNELS["nf4"](parts, Window(0, 2, 0, 3), params, "F32", out) == Counts(0, 0, 0)
    assert out.tolist() == [[0.0, 20.0, 40.0], [60.0, 20.0, 25.0]]
    parts["weight.absmax"][0, 1] = np.inf
    assert KERNELS["nf4"](parts, Window(0, 2, 0, 3), params, "F32", out) == Counts(0, 2, 0)
    parts["weight.absmax"][0, 1] = 1310.0  # times 50 is 65500, times 40 less
    half = np.empty((2, 3), np.uint16)
    assert KERNELS["nf4"](parts, Window(0, 2, 0, 3), params, "F16", half) == Counts(0, 0, 0)
    parts["weight.absmax"][0, 1] = 1311.0
    assert KERNELS["nf4"](parts, Window(0, 2, 0, 3), params, "F16", half) == Counts(0, 0, 1)


SIZES = [(1, 1), (1, 2), (3, 5), (7, 33), (64, 64), (5, 1000), (33, 4097), (40, 96)]


@pytest.mark.parametrize("nested", [None, Nested(256), Nested(3, -1.0)])
@pytest.mark.parametrize("blocksize", [64, 128, 4096, 24, 7, 1])
@pytest.mark.parametrize("size", SIZES)
def test_shapes(size: tuple[int, int], blocksize: int, nested: Nested | None) -> None:
    for wild in (0.0, 0.05):
        made_so = made(size, blocksize, nested, wild)
        touching(*made_so)
        apart(*made_so)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 200)),
    blocksize=st.sampled_from([64, 128, 16, 40, 5]),
    edges=st.tuples(*[st.floats(0, 1)] * 4),
    nested=st.sampled_from([None, Nested(16)]),
    wild=st.sampled_from([0.0, 0.1]),
)
def test_any_window(
    size: tuple[int, int], blocksize: int, edges: Any, nested: Nested | None, wild: float
) -> None:
    """Parts are whole, whatever the window."""
    parts, params = made(size, blocksize, nested, wild)
    spans = []
    for extent, (one, other) in zip(size, (edges[:2], edges[2:]), strict=True):
        first, last = sorted((round(one * (extent - 1)), round(other * (extent - 1))))
        spans += [first, last + 1]
    touching(parts, params, window=Window(*spans))
    apart(parts, params, window=Window(*spans))


def test_another_output_is_refused() -> None:
    tensors, params = made((2, 16), 8, Nested(2))
    parts = {name: tensor.numpy() for name, tensor in tensors.items()}
    with pytest.raises(ShapeMismatch, match="out is"):
        KERNELS["nf4"](parts, Window(0, 2, 0, 16), params, "BF16", np.empty((2, 17), np.uint16))


@pytest.mark.skipif("+ssse3" not in cpu_features(), reason="reads the assembly of a byte shuffle")
def test_loops_are_vectors() -> None:
    """Codes go through shuffles to whole vectors of outputs; tables are multiplied whole."""
    place, memory, floats = nb.UniTuple(nb.int64, 4), nb.uint8[::1], nb.float32[::1]
    for loop in (nf4._to_16, nf4._to_32):
        found = assembly_of(loop, memory, memory, memory, place, nb.int64)
        assert_one_run(found, (r"\s(?:v?pshufb|vpermw)\s", r"\sv?mov[du]\w+\s+%[xyz]mm\d+, \S*\("))
    filled = assembly_of(nf4._fill, floats, nb.int64, floats, memory, nb.int64)
    assert_one_run(filled, (r"\sv?mulps\s", r"\sv?psrld\s"))
