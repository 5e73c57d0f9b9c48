"""FP8 and MXFP8 kernels on CPU and GPU: every byte under every kind of scale, any block."""

from __future__ import annotations

import pytest
import torch

from moeconv.codecs.base import Window
from moeconv.errors import ShapeMismatch
from tests.kernels.fp8_parts import (
    FORMATS,
    SCALES,
    check_blocks,
    check_shape,
    codes,
    every_byte,
    grid,
    params_of,
    scales,
    special_scales,
)
from tests.kernels.oracle import Side


@pytest.mark.parametrize("form", FORMATS)
def test_every_byte_under_special_scales(form: str, side: Side) -> None:
    by = special_scales()[:, None]
    tensors = {"weight": every_byte(by.shape[0], form), "weight_scale": by}
    side.check_numbers("fp8-channel", tensors, params_of(form))


@pytest.mark.parametrize("scale", ["F8_E8M0", "U8"])
@pytest.mark.parametrize("form", FORMATS)
def test_every_byte_under_every_exponent(form: str, scale: str, side: Side) -> None:
    by = torch.arange(256, dtype=torch.uint8).view(SCALES[scale])[:, None]
    tensors = {"weight": every_byte(256, form), "weight_scale": by}
    side.check_numbers("fp8-channel", tensors, params_of(form))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("form", FORMATS)
def test_kinds_of_scales(form: str, scale: str, side: Side) -> None:
    check_blocks((37, 300), (16, 48), (form, scale), check=side.check)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("size", "block"),
    [
        ((1, 1), (128, 128)),
        ((1, 257), (128, 128)),
        ((257, 1), (128, 128)),
        ((144, 160), (128, 128)),
        ((33, 600), (2, 128)),
        ((3, 100), (1, 16)),
        ((7, 11), (3, 5)),
        ((130, 70), (3, 5)),
        ((4, 64), (100, 1)),
    ],
)
def test_shapes(
    size: tuple[int, int], block: tuple[int, int], transposed: bool, side: Side
) -> None:
    check_shape(size, block, transposed=transposed, check=side.check)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("codec", "shape"), [("fp8-tensor", (1, 1)), ("fp8-channel", (50, 1)), ("mxfp8", (50, 9))]
)
def test_codecs(codec: str, shape: tuple[int, int], transposed: bool, side: Side) -> None:
    scale = "U8" if codec == "mxfp8" else "F32"
    tensors = {"weight": codes((50, 260), "F8_E4M3"), "weight_scale": scales(shape, scale)}
    if transposed:
        tensors = {part: tensor.T.contiguous() for part, tensor in tensors.items()}
    side.check(codec, tensors, params_of("F8_E4M3"), transposed=transposed)


@pytest.mark.parametrize("transposed", [False, True])
def test_window_in_the_middle(transposed: bool, side: Side) -> None:
    weight, by = codes((64, 200), "F8_E4M3"), scales((4, 7), "BF16")
    if transposed:
        weight, by = weight.T.contiguous(), by.T.contiguous()
    side.check(
        "fp8-block",
        {"weight": weight, "weight_scale": by},
        params_of("F8_E4M3", (16, 32)),
        window=Window(16, 48, 64, 200),
        transposed=transposed,
    )


@pytest.mark.parametrize("size", [(0, 64), (4, 0)])
def test_nothing(size: tuple[int, int], side: Side) -> None:
    parts = {
        "weight": torch.empty(size, dtype=torch.uint8),
        "weight_scale": torch.ones(grid(*size, (9, 9))),
    }
    assert side.run("fp8-block", parts, params_of("F8_E4M3", (9, 9)), "BF16", size) == (0, 0, 0)


@pytest.mark.parametrize(
    ("weight", "scale", "out"),
    [
        ((4, 63), (1, 1), (4, 64)),
        ((4, 64), (1, 2), (4, 64)),
        ((4, 64), (0, 1), (4, 64)),
        ((4, 64), (1, 1), (3, 64)),
    ],
)
def test_wrong_shapes_are_refused(
    weight: tuple[int, int], scale: tuple[int, int], out: tuple[int, int], side: Side
) -> None:
    parts = {"weight": torch.zeros(weight, dtype=torch.uint8), "weight_scale": torch.ones(scale)}
    with pytest.raises(ShapeMismatch, match="not"):
        side.run("fp8-block", parts, params_of("F8_E4M3", (128, 128)), "BF16", out)
