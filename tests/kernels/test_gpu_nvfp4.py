"""The NVFP4 kernels for GPUs: every code under every scale of a group and of a weight."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.kernels.gpu_oracle import check_numbers
from tests.kernels.int_parts import WILD
from tests.kernels.nvfp4_parts import NAMES, every_pair


@pytest.mark.parametrize("codec", NAMES)
@pytest.mark.parametrize("bits", [0x3F800000, 0x2AAAAAAA, 0x00400001, 0x7D2AAAAA, *WILD])
def test_every_code_under_every_scale(bits: int, codec: str) -> None:
    """With scales of the weight that are ordinary, special, and at the edges of what is tame."""
    whole = torch.from_numpy(np.array([bits], np.uint32).view(np.float32))
    check_numbers(codec, every_pair(codec, whole), {})


@pytest.mark.parametrize(("dtype", "top"), [("BF16", 124), ("F16", 12), ("F32", 124)])
def test_one_scale_at_the_edge_of_the_tame_ones(dtype: str, top: int) -> None:
    """No code is NaN: the scale alone decides how the tile is rounded."""
    for whole in (2.0**top, 2.0**top * 1.0625, 2.0 ** (top + 1), 2.0 ** (top + 2)):
        parts = every_pair("nvfp4-modelopt", torch.tensor(whole))
        one = {part: parts[part][0x38:0x39] for part in ("weight", "weight_scale")}  # 1.0
        check_numbers("nvfp4-modelopt", {**parts, **one}, {}, dtypes=(dtype,))
