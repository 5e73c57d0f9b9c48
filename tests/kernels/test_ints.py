"""Kernels of compressed-tensors integers, packed and plain, on CPU and GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeconv.codecs.base import Window
from moeconv.errors import ShapeMismatch
from tests.kernels.int_weights import PLAIN_WEIGHTS, every_packed_pair, packed, plain
from tests.kernels.oracle import Side


@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_with_every_zero(bits: int, side: Side) -> None:
    side.check_numbers("packed-int", *every_packed_pair(bits))


@pytest.mark.parametrize("zeros", ["absent", "plain", "packed"])
@pytest.mark.parametrize(
    ("size", "bits", "group_size"),
    [
        ((9, 256), 4, 32),
        ((5, 260), 4, 128),  # a last group and a last word cut short
        ((3, 77), 4, 7),
        ((33, 264), 4, 32),  # more rows and columns than a GPU's program decodes
        ((4, 48), 4, 16),
        ((1, 1), 4, -1),
        ((9, 130), 8, 32),
        ((6, 33), 8, -1),
        ((33, 1), 8, 0),
        ((35, 99), 3, 32),
        ((11, 40), 2, 8),
        ((2, 67), 7, 4),
    ],
)
def test_shapes(size: tuple[int, int], bits: int, group_size: int, zeros: str, side: Side) -> None:
    if zeros == "packed" and not group_size:
        pytest.skip("one number is never packed")
    side.check("packed-int", *packed(size, bits, group_size, zeros))


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 300)),
    kind=st.tuples(st.integers(2, 8), st.sampled_from([-1, 1, 5, 16, 32, 64])),
    zeros=st.sampled_from(["absent", "plain", "packed"]),
    scale=st.sampled_from(["F32", "BF16", "F16"]),
    how=st.tuples(st.sampled_from(["dense", "padded"]), st.sampled_from(["", "given"])),
)
def test_any_weight(
    side: Side,
    size: tuple[int, int],
    kind: tuple[int, int],
    zeros: str,
    scale: str,
    how: tuple[str, str],
) -> None:
    """kind: bits, group size; how: packing, activation order."""
    made = packed(size, *kind, zeros, scale=scale, packing=how[0], order=how[1])
    side.check_numbers("packed-int", *made)


@pytest.mark.parametrize("zeros", ["absent", "packed"])
@pytest.mark.parametrize("given_order", ["", "given"])
def test_window_in_the_middle(zeros: str, given_order: str, side: Side) -> None:
    parts, params = packed((48, 320), 4, 32, zeros, order=given_order)
    side.check("packed-int", parts, params, window=Window(16, 40, 64, 256))
    side.check("packed-int", parts, params, window=Window(16, 40, 72, 248))  # inside of groups


@pytest.mark.parametrize(
    ("part", "shape"),
    [("weight_packed", (4, 7)), ("weight_scale", (4, 1)), ("weight_scale", (3, 2))],
)
def test_wrong_shapes_are_refused(part: str, shape: tuple[int, int], side: Side) -> None:
    parts, params = packed((4, 64), 4, 32)
    side.run("packed-int", parts, params, "BF16", (4, 64))
    parts[part] = torch.zeros(shape, dtype=parts[part].dtype)
    with pytest.raises(ShapeMismatch, match="not"):
        side.run("packed-int", parts, params, "BF16", (4, 64))


@pytest.mark.parametrize("given_order", [False, True])
@pytest.mark.parametrize("zeros", [None, torch.int8, torch.int32])
@PLAIN_WEIGHTS
def test_int_quantized(
    size: tuple[int, int],
    group_size: int,
    zeros: torch.dtype | None,
    given_order: bool,
    side: Side,
) -> None:
    side.check("int-quantized", *plain(size, group_size, zeros, given_order and group_size > 0))
