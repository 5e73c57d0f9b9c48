"""NVFP4 kernels on CPU and GPU: shapes, kinds of scales, windows, what is refused."""

from __future__ import annotations

import pytest
import torch

from moeconv.codecs.base import Window
from moeconv.errors import ShapeMismatch
from tests.kernels.nvfp4_parts import NAMES, made
from tests.kernels.oracle import Side


@pytest.mark.parametrize("codec", NAMES)
@pytest.mark.parametrize("size", [(1, 2), (1, 16), (9, 250), (130, 18), (3, 2048 + 48)])
def test_shapes(size: tuple[int, int], codec: str, side: Side) -> None:
    side.check(codec, made(codec, size, 0.37), {})


@pytest.mark.parametrize("codec", NAMES)
@pytest.mark.parametrize("scale", ["BF16", "F16"])
def test_kinds_of_scales(scale: str, codec: str, side: Side) -> None:
    side.check_numbers(codec, made(codec, (20, 64), 0.01, scale), {})


@pytest.mark.parametrize("codec", NAMES)
def test_window_in_the_middle(codec: str, side: Side) -> None:
    side.check(codec, made(codec, (20, 320), 0.01), {}, window=Window(3, 17, 64, 240))


@pytest.mark.parametrize(
    ("part", "shape"),
    [("weight", (2, 15)), ("weight_scale", (2, 1)), ("weight_scale_2", (1, 2))],
)
def test_wrong_shapes_are_refused(part: str, shape: tuple[int, int], side: Side) -> None:
    parts = made("nvfp4-modelopt", (2, 32), 0.37)
    side.run("nvfp4-modelopt", parts, {}, "BF16", (2, 32))
    parts[part] = torch.zeros(shape, dtype=parts[part].dtype)
    with pytest.raises(ShapeMismatch, match="not"):
        side.run("nvfp4-modelopt", parts, {}, "BF16", (2, 32))
