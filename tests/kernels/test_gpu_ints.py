"""The GPU kernels of compressed-tensors integers, packed and plain, against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeconv.codecs.base import Window
from moeconv.errors import ShapeMismatch
from tests.kernels import gpu_oracle
from tests.kernels.gpu_oracle import DEVICE, check, run
from tests.kernels.test_cpu_ints import every_pair, packed, plain


@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_with_every_zero(bits: int) -> None:
    check("packed-int", *every_pair(bits))


@pytest.mark.parametrize("zeros", ["absent", "plain", "packed"])
@pytest.mark.parametrize(
    ("size", "bits", "group_size"),
    [
        ((9, 256), 4, 32),
        ((5, 260), 4, 128),  # a last group and a last word cut short
        ((3, 77), 4, 7),
        ((33, 264), 4, 32),  # more rows and columns than a program decodes
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
def test_shapes(size: tuple[int, int], bits: int, group_size: int, zeros: str) -> None:
    if zeros == "packed" and not group_size:
        pytest.skip("one number is never packed")
    check("packed-int", *packed(size, bits, group_size, zeros))


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 300)),
    bits=st.integers(2, 8),
    group_size=st.sampled_from([-1, 1, 5, 16, 32, 64]),
    zeros=st.sampled_from(["absent", "plain", "packed"]),
    scale=st.sampled_from(["F32", "BF16", "F16"]),
    how=st.tuples(st.sampled_from(["dense", "padded"]), st.sampled_from(["", "given"])),
)
def test_any_weight(
    size: tuple[int, int],
    bits: int,
    group_size: int,
    zeros: str,
    scale: str,
    how: tuple[str, str],
) -> None:
    made = packed(size, bits, group_size, zeros, scale=scale, packing=how[0], order=how[1])
    check("packed-int", *made, dtypes=("BF16", "F16"))


@pytest.mark.parametrize("zeros", ["absent", "packed"])
@pytest.mark.parametrize("given_order", ["", "given"])
def test_window_in_the_middle(zeros: str, given_order: str) -> None:
    parts, params = packed((48, 320), 4, 32, zeros, order=given_order)
    check("packed-int", parts, params, window=Window(16, 40, 64, 256))
    check("packed-int", parts, params, window=Window(16, 40, 72, 248))  # inside of groups


@pytest.mark.parametrize(
    ("part", "shape"),
    [("weight_packed", (4, 7)), ("weight_scale", (4, 1)), ("weight_scale", (3, 2))],
)
def test_wrong_shapes_are_refused(part: str, shape: tuple[int, int]) -> None:
    parts, params = packed((4, 64), 4, 32)
    parts[part] = torch.zeros(shape, dtype=parts[part].dtype)
    with pytest.raises(ShapeMismatch, match="not"):
        run("packed-int", parts, params, "BF16", torch.empty((4, 64), dtype=torch.int16))


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("given_order", [False, True])
@pytest.mark.parametrize("zeros", [None, torch.int8, torch.int32])
@pytest.mark.parametrize(
    ("size", "group_size"), [((7, 200), 32), ((3, 33), -1), ((5, 40), 0), ((4, 70), 9)]
)
def test_int_quantized(
    size: tuple[int, int],
    group_size: int,
    zeros: torch.dtype | None,
    given_order: bool,
    aligned: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bytes are read four at a time where they begin at a multiple of four."""
    if aligned:
        monkeypatch.setattr(gpu_oracle, "on_device", lambda tensor: tensor.to(DEVICE))
    check("int-quantized", *plain(size, group_size, zeros, given_order and group_size > 0))
