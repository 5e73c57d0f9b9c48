"""NF4 kernels on CPU and GPU: scales of scales, what is refused."""

from __future__ import annotations

import pytest
import torch

from moeconv.errors import ShapeMismatch
from tests.kernels.nf4_parts import Nested, made, of_bits
from tests.kernels.oracle import Side

NUMBERS = [0x00000001, 0x00800000, 0x00FFFFFF, 0x3DCCCCCD, 0x7F7FFFFF, 0x7F800000, 0x7FC00000]


@pytest.mark.parametrize("offset", [0.0, -0.0, 1e-45, 2.0**-126, -(2.0**-100), 0.1, 1e39, 3e38])
def test_nested_scales_are_rounded_twice(offset: float, side: Side) -> None:
    """As float32 is, of numbers of every kind; numbers that cancel are none but their difference.

    1e39 is Inf in float32.
    """
    parts, params = made((16, 256), 16, Nested(8, offset))
    signed = [*NUMBERS, *(bits | 1 << 31 for bits in NUMBERS)]
    parts["weight.nested_quant_map"] = of_bits([*signed, *[0x3F800001] * 242])
    blocks, groups = parts["weight.absmax"].numel(), parts["weight.nested_absmax"].numel()
    parts["weight.absmax"] = (torch.arange(blocks) % 16).to(torch.uint8)[None]
    parts["weight.nested_absmax"] = of_bits((signed * groups)[:groups])
    side.check_numbers("nf4", parts, params)


@pytest.mark.parametrize(
    ("part", "shape"),
    [
        ("weight", (15, 1)),
        ("weight.absmax", (1, 3)),
        ("weight.quant_map", (1, 15)),
        ("weight.nested_absmax", (1, 1)),
        ("weight.nested_quant_map", (1, 255)),
    ],
)
def test_wrong_shapes_are_refused(part: str, shape: tuple[int, int], side: Side) -> None:
    parts, params = made((2, 16), 8, Nested(2))
    side.run("nf4", parts, params, "BF16", (2, 16))
    parts[part] = torch.zeros(shape, dtype=parts[part].dtype)
    with pytest.raises(ShapeMismatch, match="not"):
        side.run("nf4", parts, params, "BF16", (2, 16))
