"""The NVFP4 kernels: every code under every scale of a group and kinds of scales of a weight."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeconv.codecs.base import Window
from moeconv.kernels.cpu import KERNELS, Counts
from tests.kernels.int_parts import WILD
from tests.kernels.nvfp4_parts import NAMES, every_pair, made
from tests.kernels.oracle import check


@pytest.mark.parametrize("codec", NAMES)
def test_every_code_under_every_scale(codec: str) -> None:
    """With scales of the weight that are ordinary, special, and at the edges of what is tame."""
    powers = [(exponent << 23) + 0x2AAAAA for exponent in range(1, 255, 9)]
    for bits in [0x3F800000, *powers, *WILD]:
        whole = torch.from_numpy(np.array([bits], np.uint32).view(np.float32))
        check(codec, every_pair(codec, whole), {})


@pytest.mark.parametrize("codec", NAMES)
def test_hand_computed(codec: str) -> None:
    # 0x72: 2 (1.0), then 7 (6.0); 0x8F: 15 (-6.0), then 8 (-0). Scale 0x40 is 2; 0.5 divides
    # to 4 or multiplies to 1.
    codes, factor = NAMES[codec]
    parts = {
        codes: np.array([[0x72, 0x8F]], np.uint8),
        "weight_scale": np.array([[0x40]], np.uint8),
        factor: np.array([[0.5]], np.float32),
    }
    out = np.empty((1, 4), np.float32)
    assert KERNELS[codec](parts, Window(0, 1, 0, 4), {}, "F32", out) == Counts(0, 0, 0)
    by = 4.0 if codec == "nvfp4-ct" else 1.0
    assert out.tolist() == [[by, 6 * by, -6 * by, 0.0]]
    assert np.signbit(out[0]).tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("whole", "dtype", "counts"),
    [
        (float("nan"), "BF16", (4, 0, 0)),
        (float("inf"), "BF16", (2, 2, 0)),  # 0 * Inf is NaN
        (24.5, "F16", (0, 0, 2)),  # 6 * 448 * 24.5 is past 65504
        (24.25, "F16", (0, 0, 0)),
        (2.0**118, "F32", (0, 2, 0)),
    ],
)
def test_counts_by_hand(whole: float, dtype: str, counts: tuple[int, int, int]) -> None:
    parts = {
        "weight": np.array([[0xF0, 0x70]], np.uint8),  # 0, -6, 0, 6
        "weight_scale": np.array([[0x7E]], np.uint8),  # 448
        "weight_scale_2": np.array([[whole]], np.float32),
    }
    out = np.empty((1, 4), np.float32 if dtype == "F32" else np.uint16)
    found = KERNELS["nvfp4-modelopt"](parts, Window(0, 1, 0, 4), {}, dtype, out)
    assert found == counts


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 150)),
    whole=st.floats(2.0**-20, 2.0**12, width=32),
    scale=st.sampled_from(["F32", "BF16", "F16"]),
    codec=st.sampled_from(list(NAMES)),
)
def test_any_weight(size: tuple[int, int], whole: float, scale: str, codec: str) -> None:
    check(codec, made(codec, (size[0], 2 * size[1]), whole, scale), {})


@pytest.mark.parametrize("codec", NAMES)
@pytest.mark.parametrize("size", [(300, 18), (2, 4096 + 2)])
def test_more_than_is_decoded_at_a_time(size: tuple[int, int], codec: str) -> None:
    check(codec, made(codec, size, 0.37), {})
