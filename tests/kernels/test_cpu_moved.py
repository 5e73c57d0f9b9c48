"""Repeated scales and integers as floats, against the reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from moeconv.codecs import CODECS
from moeconv.codecs.base import Window
from moeconv.codecs.floats import RAW_DTYPES
from moeconv.decoding import decode_window
from moeconv.errors import ShapeMismatch
from moeconv.kernels.cpu import KERNELS, TURNED_KERNELS, Counts, Kernel
from moeconv.torch_dtypes import torch_dtype
from moeconv.types import Params
from tests.codecs.float_oracles import weight_of
from tests.kernels.int_parts import draw, scales
from tests.kernels.oracle import OUTPUTS, as_numpy, headers, rounded


def check(kernel: Kernel, stored: np.ndarray, params: Params, values: torch.Tensor) -> None:
    """Compare bits and counts of every output dtype."""
    rows, cols = values.shape
    for dtype, (kind, *_) in OUTPUTS.items():
        wanted, counts = rounded(values, dtype)
        out = np.full((rows, cols + 3), 7, kind)
        given = out[:, :cols]
        assert kernel({"weight": stored}, Window(0, rows, 0, cols), params, dtype, given) == counts
        assert (np.ascontiguousarray(given).view(wanted.dtype) == wanted).all()
        assert (out[:, cols:] == 7).all()


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("block", [(1, 1), (2, 4), (4, 1), (3, 5)])
@pytest.mark.parametrize("size", [(1, 1), (7, 11), (300, 650)])
def test_repeated(size: tuple[int, int], block: tuple[int, int], dtype: str) -> None:
    """A block at an edge may be cut, and many rows come in several runs."""
    stored = scales(-(-size[0] // block[0]), -(-size[1] // block[1]), dtype=dtype, wild=0.2)
    params: Params = {"dtype": dtype, "rows": block[0], "cols": block[1]}
    window = Window(0, size[0], 0, size[1])
    values = CODECS["repeated"].decode({"weight": stored}, window, params)
    check(KERNELS["repeated"], as_numpy(stored), params, values)
    check(TURNED_KERNELS["repeated"], as_numpy(stored.T), params, values.T)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("along", ["rows", "columns"])
@pytest.mark.parametrize("turned", [False, True])
def test_repeated_of_a_weight(turned: bool, along: str, dtype: str) -> None:
    """What kernels of other codecs take in float32 comes to this one as it is stored."""
    params: Params = {"dtype": dtype, "rows": 2, "cols": 4}
    stored = scales(4, 3, dtype=dtype, wild=0.2)
    given = stored.T.contiguous() if turned else stored
    weight = weight_of(CODECS["repeated"], params, headers({"weight": given}), turned)
    weight = replace(weight, rows=8, cols=12)
    window = Window(0, 8, 0, 12)
    values = CODECS["repeated"].decode({"weight": stored}, window, params)
    for out_dtype, (kind, *_) in OUTPUTS.items():
        wanted, counts = rounded(values, out_dtype)
        out = np.empty((8, 12), kind) if along == "rows" else np.empty((12, 8), kind).T
        assert decode_window(weight, {"weight": as_numpy(given)}, window, out_dtype, out) == counts
        np.testing.assert_array_equal(np.ascontiguousarray(out).view(wanted.dtype), wanted)


@pytest.mark.parametrize("dtype", [one for one in RAW_DTYPES if one != "BOOL"])
@pytest.mark.parametrize("size", [(1, 1), (300, 650)])
def test_integers(size: tuple[int, int], dtype: str) -> None:
    """Large ones are rounded to float32 first, to nearest even."""
    kind = torch_dtype(dtype)
    nbytes = size[1] * torch.iinfo(kind).bits // 8
    stored = draw(0).integers(0, 256, (size[0], nbytes), dtype=np.uint8)
    tensor = torch.from_numpy(stored).view(kind)
    window = Window(0, size[0], 0, size[1])
    values = CODECS["raw"].decode({"weight": tensor}, window, {"dtype": dtype})
    check(KERNELS["raw"], tensor.numpy(), {"dtype": dtype}, values)


def test_truth_values() -> None:
    out = np.empty((1, 2), np.float32)
    parts = {"weight": np.array([[1, 0]], np.uint8)}
    found = KERNELS["raw"](parts, Window(0, 1, 0, 2), {"dtype": "BOOL"}, "F32", out)
    assert (out.tolist(), found) == ([[1.0, 0.0]], Counts(0, 0, 0))


@pytest.mark.parametrize("codec", ["raw", "repeated"])
def test_wrong_shapes_are_refused(codec: str) -> None:
    params: Params = {"dtype": "I32" if codec == "raw" else "F32", "rows": 2, "cols": 2}
    for stored, out in (((2, 3), (4, 4)), ((4, 4), (4, 5))):
        parts = {"weight": np.zeros(stored, np.int32 if codec == "raw" else np.float32)}
        with pytest.raises(ShapeMismatch, match="not"):
            KERNELS[codec](parts, Window(0, 4, 0, 4), params, "F32", np.zeros(out, np.float32))
