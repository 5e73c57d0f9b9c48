"""The FP8 and MXFP8 kernels for GPUs: every byte under every kind of scale, any block."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from moeconv.codecs.base import Window
from moeconv.errors import ShapeMismatch
from tests.kernels import fp8_parts
from tests.kernels.fp8_parts import (
    FORMATS,
    SCALES,
    codes,
    every_byte,
    finite_bytes,
    grid,
    params_of,
    scales,
    special_scales,
)
from tests.kernels.gpu_oracle import check, run

check_blocks = partial(fp8_parts.check_blocks, check=check)


@pytest.mark.parametrize("form", FORMATS)
def test_every_byte_under_special_scales(form: str) -> None:
    by = special_scales()[:, None]
    tensors = {"weight": every_byte(by.shape[0], form), "weight_scale": by}
    check("fp8-channel", tensors, params_of(form))


@pytest.mark.parametrize(
    ("form", "dtype", "exponent"),
    [
        ("F8_E4M3", "BF16", 118),
        ("F8_E4M3", "F16", 6),
        ("F8_E5M2", "F32", 111),
        ("F8_E5M2", "F16", -1),
    ],
)
def test_one_scale_at_the_edge_of_the_tame_ones(form: str, dtype: str, exponent: int) -> None:
    """Codes without NaN and Inf: the scale alone decides how the tile is rounded."""
    bits = (exponent + 127) << 23
    for one in (bits - 1, bits, bits + 1, bits + (2 << 23), 1, 0x7F800000, 0x7FC00000):
        by = torch.tensor([[one]], dtype=torch.int32).view(torch.float32)
        tensors = {"weight": finite_bytes(2, form), "weight_scale": by}
        check("fp8-tensor", tensors, params_of(form), dtypes=(dtype,))


@pytest.mark.parametrize("form", FORMATS)
def test_every_byte_under_every_exponent(form: str) -> None:
    by = torch.arange(256, dtype=torch.uint8)[:, None]
    check("fp8-channel", {"weight": every_byte(256, form), "weight_scale": by}, params_of(form))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("form", FORMATS)
def test_kinds_of_scales(form: str, scale: str) -> None:
    check_blocks((37, 300), (16, 48), (form, scale))


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
        ((130, 70), (3, 5)),
        ((4, 64), (100, 1)),
    ],
)
def test_shapes(size: tuple[int, int], block: tuple[int, int], transposed: bool) -> None:
    check_blocks(
        size,
        block,
        ("F8_E4M3", "F32"),
        transposed=transposed,
        dtypes=("BF16", "F16", "F32"),
    )


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("codec", "shape"), [("fp8-tensor", (1, 1)), ("fp8-channel", (50, 1)), ("mxfp8", (50, 9))]
)
def test_codecs(codec: str, shape: tuple[int, int], transposed: bool) -> None:
    scale = "U8" if codec == "mxfp8" else "F32"
    tensors = {"weight": codes((50, 260), "F8_E4M3"), "weight_scale": scales(shape, scale)}
    if transposed:
        tensors = {part: tensor.T.contiguous() for part, tensor in tensors.items()}
    check(codec, tensors, params_of("F8_E4M3"), transposed=transposed)


@pytest.mark.parametrize("transposed", [False, True])
def test_window_in_the_middle(transposed: bool) -> None:
    weight, by = codes((64, 200), "F8_E4M3"), scales((4, 7), "BF16")
    if transposed:
        weight, by = weight.T.contiguous(), by.T.contiguous()
    check(
        "fp8-block",
        {"weight": weight, "weight_scale": by},
        params_of("F8_E4M3", (16, 32)),
        window=Window(16, 48, 64, 200),
        transposed=transposed,
    )


@pytest.mark.parametrize("size", [(0, 64), (4, 0)])
def test_nothing(size: tuple[int, int]) -> None:
    parts = {
        "weight": torch.empty(size, dtype=torch.uint8),
        "weight_scale": torch.ones(grid(*size, (9, 9))),
    }
    params, bits = params_of("F8_E4M3", (9, 9)), torch.empty(size, dtype=torch.int16)
    assert run("fp8-block", parts, params, "BF16", bits) == (0, 0, 0)


@pytest.mark.parametrize(
    ("weight", "scale", "out"),
    [
        ((4, 63), (1, 1), (4, 64)),
        ((4, 64), (1, 2), (4, 64)),
        ((4, 64), (1, 1), (3, 64)),
    ],
)
def test_wrong_shapes_are_refused(
    weight: tuple[int, int], scale: tuple[int, int], out: tuple[int, int]
) -> None:
    parts = {"weight": torch.zeros(weight, dtype=torch.uint8), "weight_scale": torch.ones(scale)}
    refuse(parts, torch.empty(out, dtype=torch.int16))


def test_rows_that_are_not_contiguous_are_refused() -> None:
    parts = {
        "weight": torch.zeros(64, 4, dtype=torch.uint8).T,
        "weight_scale": torch.ones(1, 1),
    }
    refuse(parts, torch.empty(4, 64, dtype=torch.int16))


def refuse(parts: dict[str, torch.Tensor], out: torch.Tensor) -> None:
    with pytest.raises(ShapeMismatch, match="not"):
        run("fp8-block", parts, params_of("F8_E4M3", (128, 128)), "BF16", out)
