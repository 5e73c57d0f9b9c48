"""The kernels of compressed-tensors integers, packed and plain, against the readable reference."""

from __future__ import annotations

import platform

import numpy as np
import pytest
import torch

from moeconv.codecs.base import Window
from moeconv.errors import BadSource, ShapeMismatch
from moeconv.kernels.cpu import KERNELS, Counts, ints
from moeconv.types import Params
from tests.kernels.assembly import assembly_of, assert_one_run, nb
from tests.kernels.int_parts import scales
from tests.kernels.int_weights import packed
from tests.kernels.oracle import check


@pytest.mark.parametrize("zeros", ["absent", "plain", "packed"])
def test_more_columns_than_are_decoded_at_a_time(zeros: str) -> None:
    check("packed-int", *packed((17, 4096 + 40), 4, 32, zeros))


def test_hand_computed() -> None:
    # 0x0000000F, lowest nibble first: 15 - 8 = 7, then 0 - 8; 3 * 7 = 21, 3 * -8 = -24
    parts = {
        "weight_packed": np.array([[0xF]], np.int32),
        "weight_scale": np.array([[3.0]], np.float32),
    }
    out = np.empty((1, 8), np.float32)
    params = packed((1, 8), 4, 8)[1]
    assert KERNELS["packed-int"](parts, Window(0, 1, 0, 8), params, "F32", out) == (0, 0, 0)
    assert out.tolist() == [[21.0] + [-24.0] * 7]


@pytest.mark.parametrize(
    ("scale", "dtype", "counts"),
    [
        (float("nan"), "BF16", (8, 0, 0)),
        (float("inf"), "BF16", (1, 7, 0)),  # 0 * Inf is NaN
        (8200.0, "F16", (0, 0, 7)),  # 8 * 8200 is past 65504
        (8180.0, "F16", (0, 0, 0)),
        (2.0**126, "F32", (0, 7, 0)),
    ],
)
def test_counts_by_hand(scale: float, dtype: str, counts: tuple[int, int, int]) -> None:
    parts = {
        "weight_packed": np.array([[0x8]], np.int32),  # a zero, then seven times -8
        "weight_scale": np.array([[scale]], np.float32),
    }
    out = np.empty((1, 8), np.float32 if dtype == "F32" else np.uint16)
    params = packed((1, 8), 4, 8)[1]
    found = KERNELS["packed-int"](parts, Window(0, 1, 0, 8), params, dtype, out)
    assert found == Counts(*counts)


def test_group_outside() -> None:
    parts, params = packed((2, 64), 4, 32, order="given")
    parts["weight_g_idx"][5] = 2
    with pytest.raises(BadSource, match=r"group index 0\.\.2 of a column is outside"):
        check("packed-int", parts, params)
    given_parts = {part: tensor.numpy() for part, tensor in parts.items()}
    with pytest.raises(BadSource, match=r"group index 0\.\.2 of a column is outside"):
        KERNELS["packed-int"](
            given_parts, Window(0, 2, 0, 64), params, "BF16", np.empty((2, 64), np.uint16)
        )


def test_wrong_weight_shape() -> None:
    parts, params = packed((2, 64), 4, 32)
    found = {part: tensor.numpy() for part, tensor in parts.items()}
    found["weight_shape"] = np.array([[2, 63]])
    out = np.empty((2, 64), np.uint16)
    with pytest.raises(ShapeMismatch, match=r"weight_shape says \[2, 63\]"):
        KERNELS["packed-int"](found, Window(0, 2, 0, 64), params, "BF16", out)


def test_every_byte_is_exact() -> None:
    codes = torch.arange(-128, 128, dtype=torch.int8).repeat(64, 1)
    parts = {"weight": codes, "weight_scale": scales(64, 1, wild=0.5)}
    params: Params = {"strategy": "channel", "group_size": -1, "groups": 1}
    check("int-quantized", parts, {**params, "act_order": False, "zeros": False})


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86-64 assembly")
def test_inner_loop_is_vectorised() -> None:
    """One run without a jump or call takes codes to packed products to 16 bits."""
    wanted = (r"\sv?cvtdq2ps\s", r"\sv?subps\s", r"\sv?mulps\s", r"\sv?psrld\s")
    assert_one_run(
        assembly_of(ints._fast, nb.uint8[::1], nb.float32[::1], nb.float32[::1], nb.uint16[::1]),
        wanted,
    )
