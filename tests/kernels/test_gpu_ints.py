"""What only the GPU kernels of integers do: read bytes four at a time where they are aligned."""

from __future__ import annotations

import pytest
import torch

from tests.kernels import gpu_oracle
from tests.kernels.gpu_oracle import DEVICE, check
from tests.kernels.int_weights import PLAIN_WEIGHTS, plain


@pytest.mark.parametrize("given_order", [False, True])
@pytest.mark.parametrize("zeros", [None, torch.int8, torch.int32])
@PLAIN_WEIGHTS
def test_int_quantized_at_a_multiple_of_four(
    size: tuple[int, int],
    group_size: int,
    zeros: torch.dtype | None,
    given_order: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu_oracle, "on_device", lambda tensor: tensor.to(DEVICE))
    check("int-quantized", *plain(size, group_size, zeros, given_order and group_size > 0))
