"""Kernels of GPTQ and AWQ, whose words are stored [cols, rows], on CPU and GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeconv.codecs import bits as b
from moeconv.codecs.base import Window
from moeconv.errors import ShapeMismatch
from tests.kernels.int_parts import with_params
from tests.kernels.int_weights import awq, every_gptq_pair, gptq, ordered
from tests.kernels.oracle import Side


@pytest.mark.parametrize("zeros", ["packed", "empty", "absent"])
@pytest.mark.parametrize(
    ("size", "bits", "group_size"),
    [
        ((64, 256), 4, 128),
        ((40, 272), 4, 48),  # more rows and columns than a GPU's program decodes
        ((8, 8), 4, -1),
        ((1, 40), 4, 16),
        ((40, 264), 8, 128),
        ((36, 36), 8, 5),
        ((64, 96), 3, 32),  # fields across words
        ((11, 64), 3, 32),  # the last zero point is in two words
        ((48, 64), 2, 16),
    ],
)
def test_gptq_shapes(
    size: tuple[int, int], bits: int, group_size: int, zeros: str, side: Side
) -> None:
    made = gptq(size, bits, group_size, zeros)
    side.check("gptq", *made)
    if group_size > 0:
        side.check("gptq", *ordered(made), dtypes=("BF16",))


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(1, 5), st.integers(1, 9)),
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([-1, 8, 24, 32]),
    offset=st.integers(0, 1),
    scale=st.sampled_from(["F32", "BF16", "F16"]),
)
def test_any_gptq(
    side: Side, size: tuple[int, int], bits: int, group_size: int, offset: int, scale: str
) -> None:
    rows, cols = (extent * b.dense_run(bits).elements for extent in size)
    parts, params = gptq((rows, cols), bits, group_size, "packed", scale)
    side.check_numbers("gptq", parts, with_params(params, zero_offset=offset))


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_every_code_with_every_zero(bits: int, offset: int, side: Side) -> None:
    """Zero points up to 2^bits among them."""
    parts, params = every_gptq_pair(bits)
    side.check_numbers("gptq", parts, with_params(params, zero_offset=offset))


def test_gptq_window_in_the_middle(side: Side) -> None:
    made = gptq((96, 320), 4, 32)
    side.check("gptq", *made, window=Window(32, 88, 64, 256))
    side.check("gptq", *ordered(made), window=Window(32, 88, 64, 256))


@pytest.mark.parametrize("zeros", ["packed", "absent"])
@pytest.mark.parametrize("scale", ["F16", "BF16", "F32"])
@pytest.mark.parametrize(
    ("size", "group_size"), [((64, 256), 128), ((40, 300), 32), ((8, 1), -1), ((24, 50), 7)]
)
def test_awq_shapes(
    size: tuple[int, int], group_size: int, scale: str, zeros: str, side: Side
) -> None:
    side.check("awq", *awq(size, group_size, zeros, scale))


def test_awq_every_code_with_every_zero(side: Side) -> None:
    """Each word's eight fields take every code over the columns, and every zero over the rows."""
    parts, params = awq((128, 16), 16)
    fields = (torch.arange(16)[:, None] * 0x11111111).to(torch.int64)
    signed = torch.where(fields >= 1 << 31, fields - (1 << 32), fields).to(torch.int32)
    parts["qweight"], parts["qzeros"] = signed.repeat(1, 16), signed.T.contiguous()
    side.check_numbers("awq", parts, params)


def test_awq_window_in_the_middle(side: Side) -> None:
    side.check("awq", *awq((96, 320), 32), window=Window(16, 88, 64, 256))


@pytest.mark.parametrize(
    ("codec", "part", "shape"),
    [
        ("gptq", "qweight", (7, 16)),
        ("gptq", "scales", (1, 16)),
        ("gptq", "scales", (2, 15)),
        ("gptq", "qzeros", (2, 1)),
        ("awq", "qweight", (64, 1)),
        ("awq", "scales", (2, 15)),
        ("awq", "qzeros", (1, 2)),
    ],
)
def test_wrong_shapes_are_refused(
    codec: str, part: str, shape: tuple[int, int], side: Side
) -> None:
    made = {"gptq": gptq((16, 64), 4, 32), "awq": awq((16, 64), 32, scale="F32")}
    parts, params = made[codec]
    side.run(codec, parts, params, "BF16", (16, 64))
    parts[part] = torch.zeros(shape, dtype=parts[part].dtype)
    with pytest.raises(ShapeMismatch, match="not"):
        side.run(codec, parts, params, "BF16", (16, 64))
