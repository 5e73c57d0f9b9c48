"""The MXFP4 kernel for GPUs: every scale with every byte, any window, against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moeconv.codecs.base import Window
from moeconv.errors import ShapeMismatch
from tests.kernels.gpu_oracle import check, check_numbers, run

PARAMS = {"codes": "blocks", "scales": "scales"}


def parts(rows: int, cols: int) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(rows * cols)
    blocks = rng.integers(0, 256, (rows, -(-cols // 32), 16), dtype=np.uint8)
    scales = rng.integers(0, 256, (rows, -(-cols // 32)), dtype=np.uint8)
    return {"blocks": torch.from_numpy(blocks), "scales": torch.from_numpy(scales)}


def test_every_scale_with_every_byte() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).repeat(256, 1).reshape(256, 16, 16)
    scales = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 16)
    check_numbers("mxfp4", {"blocks": blocks, "scales": scales}, PARAMS)


@pytest.mark.parametrize(("rows", "cols"), [(1, 32), (3, 64), (9, 544), (17, 1056)])
def test_any_shape(rows: int, cols: int) -> None:
    check("mxfp4", parts(rows, cols), PARAMS)


def test_a_window_inside() -> None:
    check("mxfp4", parts(9, 1056), PARAMS, window=Window(2, 7, 32, 1024))


def test_parts_of_another_window_are_refused() -> None:
    given = {"blocks": torch.zeros(2, 32, dtype=torch.uint8), "scales": torch.zeros(2, 2)}
    with pytest.raises(ShapeMismatch, match="scales"):
        run("mxfp4", given, PARAMS, "BF16", (2, 64))
