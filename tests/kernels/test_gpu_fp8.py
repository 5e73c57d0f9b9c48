"""What only the GPU kernels of FP8 do: tell tame tiles by their scales, ask for contiguous rows."""

from __future__ import annotations

import pytest
import torch

from moeconv.errors import ShapeMismatch
from tests.kernels.fp8_parts import finite_bytes, params_of
from tests.kernels.gpu_oracle import check_numbers, fill


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
        check_numbers("fp8-tensor", tensors, params_of(form), dtypes=(dtype,))


def test_rows_that_are_not_contiguous_are_refused() -> None:
    parts = {
        "weight": torch.zeros(64, 4, dtype=torch.uint8).T,
        "weight_scale": torch.ones(1, 1),
    }
    with pytest.raises(ShapeMismatch, match="not"):
        out = torch.empty(4, 64, dtype=torch.int16)
        fill("fp8-block", parts, params_of("F8_E4M3", (128, 128)), "BF16", out)
