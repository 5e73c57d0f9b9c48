"""The NVFP4 kernels for GPUs: every code under every scale of a group and of a weight."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moeconv.codecs.base import Window
from moeconv.errors import ShapeMismatch
from tests.kernels.gpu_oracle import check, run
from tests.kernels.int_parts import WILD
from tests.kernels.nvfp4_parts import NAMES, every_pair, made


@pytest.mark.parametrize("codec", NAMES)
@pytest.mark.parametrize("bits", [0x3F800000, 0x2AAAAAAA, 0x00400001, 0x7D2AAAAA, *WILD])
def test_every_code_under_every_scale(bits: int, codec: str) -> None:
    """With scales of the weight that are ordinary, special, and at the edges of what is tame."""
    whole = torch.from_numpy(np.array([bits], np.uint32).view(np.float32))
    check(codec, every_pair(codec, whole), {})


@pytest.mark.parametrize(("dtype", "top"), [("BF16", 124), ("F16", 12), ("F32", 124)])
def test_one_scale_at_the_edge_of_the_tame_ones(dtype: str, top: int) -> None:
    """No code is NaN: the scale alone decides how the tile is rounded."""
    for whole in (2.0**top, 2.0**top * 1.0625, 2.0 ** (top + 1), 2.0 ** (top + 2)):
        parts = every_pair("nvfp4-modelopt", torch.tensor(whole))
        one = {part: parts[part][0x38:0x39] for part in ("weight", "weight_scale")}  # 1.0
        check("nvfp4-modelopt", {**parts, **one}, {}, dtypes=(dtype,))


@pytest.mark.parametrize("codec", NAMES)
@pytest.mark.parametrize("size", [(1, 2), (1, 16), (9, 250), (130, 18), (3, 2048 + 48)])
def test_shapes(size: tuple[int, int], codec: str) -> None:
    check(codec, made(codec, size, 0.37), {})


@pytest.mark.parametrize("codec", NAMES)
@pytest.mark.parametrize("scale", ["BF16", "F16"])
def test_kinds_of_scales(scale: str, codec: str) -> None:
    check(codec, made(codec, (20, 64), 0.01, scale), {})


@pytest.mark.parametrize("codec", NAMES)
def test_window_in_the_middle(codec: str) -> None:
    check(codec, made(codec, (20, 320), 0.01), {}, window=Window(3, 17, 64, 240))


@pytest.mark.parametrize(
    ("part", "shape"),
    [("weight", (2, 15)), ("weight_scale", (2, 1)), ("weight_scale_2", (1, 2))],
)
def test_wrong_shapes_are_refused(part: str, shape: tuple[int, int]) -> None:
    found = {
        "weight": torch.zeros(2, 16, dtype=torch.uint8),
        "weight_scale": torch.zeros(2, 2, dtype=torch.uint8),
        "weight_scale_2": torch.ones(1, 1),
    }
    found[part] = torch.zeros(shape, dtype=found[part].dtype)
    with pytest.raises(ShapeMismatch, match="not"):
        run("nvfp4-modelopt", found, {}, "BF16", torch.empty(2, 32, dtype=torch.int16))
