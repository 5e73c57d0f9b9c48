"""The NF4 kernel for GPUs: codes under every kind of scale, blocks that cross rows, any window."""

from __future__ import annotations

import pytest
import torch

from moeconv.codecs.base import Window
from moeconv.errors import ShapeMismatch
from tests.kernels.gpu_oracle import check, run
from tests.kernels.nf4_parts import TABLES, Nested, every_pair, made, of_bits


def test_every_code_under_every_kind_of_scale() -> None:
    check("nf4", *every_pair())


@pytest.mark.parametrize("name", TABLES)
def test_any_table(name: str) -> None:
    check("nf4", *every_pair(TABLES[name]))


@pytest.mark.parametrize("nested", [None, Nested(256), Nested(3, -1.0)])
@pytest.mark.parametrize("blocksize", [64, 4096, 24, 7])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (7, 33), (64, 64), (33, 1026), (40, 96)])
def test_shapes(size: tuple[int, int], blocksize: int, nested: Nested | None) -> None:
    check("nf4", *made(size, blocksize, nested, 0.02))


@pytest.mark.parametrize("cols", [320, 321])
@pytest.mark.parametrize(
    "window", [(3, 17, 64, 240), (0, 20, 1, 320), (5, 6, 7, 8), (2, 20, 0, 96)]
)
def test_windows(window: tuple[int, int, int, int], cols: int) -> None:
    """Parts are whole, whatever the window."""
    check("nf4", *made((20, cols), 64, Nested(16), 0.02), window=Window(*window))


@pytest.mark.parametrize("offset", [0.0, -0.0, 1e-45, -(2.0**-100), 0.1, 1e39])
def test_nested_scales_are_rounded_twice(offset: float) -> None:
    parts, params = made((16, 256), 16, Nested(8, offset))
    numbers = [0x00000001, 0x00800000, 0x3DCCCCCD, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0xBF800001]
    parts["weight.nested_quant_map"] = of_bits([*numbers, *[0x3F800001] * 249])
    blocks, groups = parts["weight.absmax"].numel(), parts["weight.nested_absmax"].numel()
    parts["weight.absmax"] = (torch.arange(blocks) % 8).to(torch.uint8)[None]
    parts["weight.nested_absmax"] = of_bits((numbers * groups)[:groups])
    check("nf4", parts, params)


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
def test_wrong_shapes_are_refused(part: str, shape: tuple[int, int]) -> None:
    parts, params = made((2, 16), 8, Nested(2))
    parts[part] = torch.zeros(shape, dtype=parts[part].dtype)
    with pytest.raises(ShapeMismatch, match="not"):
        run("nf4", parts, params, "BF16", torch.empty(2, 16, dtype=torch.int16))
