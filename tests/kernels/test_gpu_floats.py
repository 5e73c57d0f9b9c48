"""Casts between plain floats on a GPU: every 16-bit code and the edges of the wide ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moeconv.errors import ShapeMismatch
from moeconv.kernels.cpu import Counts
from moeconv.kernels.gpu import KERNELS, TURNED_KERNELS
from moeconv.kernels.gpu.base import OUT_DTYPES
from tests.kernels.float_parts import BITS, NAN, PAIRS, as_torch, expected, samples
from tests.kernels.gpu_oracle import DEVICE, fill, on_device

PADDING = 5


def cast(bits: np.ndarray, stored: str, dtype: str, pad: int = 0) -> tuple[np.ndarray, Counts]:
    """Return the bits [rows, cols] and counts that the kernel gives; `pad` elements lie between."""
    rows, cols = bits.shape
    wide = torch.full((rows, cols + pad), PADDING, dtype=OUT_DTYPES[dtype], device=DEVICE)
    parts = {"weight": on_device(as_torch(bits, stored))}
    counts = fill("float", parts, {"dtype": stored}, dtype, wide[:, :cols])
    assert bool((wide[:, cols:] == PADDING).all())
    found = np.ascontiguousarray(wide[:, :cols].cpu().numpy()).view(BITS[dtype])
    return found, counts


def compare(bits: np.ndarray, stored: str, dtype: str, pad: int = 0) -> None:
    found, counts = cast(bits, stored, dtype, pad=pad)
    wanted, wanted_counts = expected(bits, stored, dtype)
    wrong = np.argwhere(found != wanted)[:5]
    assert [(hex(bits[*at]), hex(found[*at])) for at in wrong] == []
    assert counts == wanted_counts


@pytest.mark.parametrize(("stored", "dtype"), PAIRS)
def test_equals_torch(stored: str, dtype: str) -> None:
    compare(samples(stored), stored, dtype)


@pytest.mark.parametrize(("stored", "dtype"), PAIRS)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (7, 1), (35, 300)])
def test_ordinary_numbers(rows: int, cols: int, stored: str, dtype: str) -> None:
    """Tiles that hold neither NaN, Inf nor overflows, with rows that lie apart."""
    values = np.random.default_rng(3).normal(size=(rows, cols)) * 0.02
    as_stored = torch.from_numpy(values).to(as_torch(np.zeros(1, BITS[stored]), stored).dtype)
    bits = as_stored.view(torch.uint8).numpy().view(BITS[stored])
    compare(bits.reshape(rows, cols), stored, dtype, pad=3)


@pytest.mark.parametrize("dtype", NAN)
def test_one_number_at_the_edge_of_overflow(dtype: str) -> None:
    edge = {"BF16": 0x7F7F8000, "F16": 0x477FF000, "F32": 0x7F800000}[dtype]
    for bits in (edge - 1, edge, edge + 1, 0x7F7FFFFF, 0x7F800000, 0x7F800001):
        for sign in (0, 1 << 31):
            compare(np.array([[bits | sign, 0]], np.uint32), "F32", dtype)


def test_turned_is_the_same() -> None:
    assert TURNED_KERNELS["float"] == KERNELS["float"]


def test_another_dtype_is_refused() -> None:
    parts = {"weight": torch.zeros(1, 4, dtype=torch.float64)}
    with pytest.raises(ShapeMismatch, match="weight"):
        fill("float", parts, {"dtype": "F32"}, "BF16", torch.empty(1, 4, dtype=torch.int16))
