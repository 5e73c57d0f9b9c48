"""NVFP4 weights for tests of kernels: every code, every scale."""

from __future__ import annotations

import numpy as np
import torch

from tests.kernels.int_parts import FLOATS, draw

# codec: its codes, its scale of the whole weight
NAMES = {
    "nvfp4-ct": ("weight_packed", "weight_global_scale"),
    "nvfp4-modelopt": ("weight", "weight_scale_2"),
}


def made(
    codec: str, size: tuple[int, int], whole: float | torch.Tensor, scale: str = "F32"
) -> dict[str, torch.Tensor]:
    rows, cols = size
    codes, factor = NAMES[codec]
    rng = draw(1)
    scales = rng.integers(0, 127, (rows, -(-cols // 16)), dtype=np.uint8)
    wild = rng.integers(0, 256, scales.shape, dtype=np.uint8)
    scales = np.where(rng.uniform(size=scales.shape) < 0.05, wild, scales)
    stored = rng.integers(0, 256, (rows, cols // 2), dtype=np.uint8)
    return {
        codes: torch.from_numpy(stored),
        "weight_scale": torch.from_numpy(scales).view(torch.float8_e4m3fn),
        factor: torch.as_tensor(whole, dtype=torch.float32).to(FLOATS[scale]).reshape(1, 1),
    }


def every_pair(codec: str, whole: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a weight whose row s has scale s, and every code in its columns."""
    parts = made(codec, (256, 16), whole)
    line = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], dtype=torch.uint8)
    parts[NAMES[codec][0]] = line.repeat(256, 1)
    scales = torch.arange(256, dtype=torch.uint8)[:, None]
    parts["weight_scale"] = scales.view(torch.float8_e4m3fn)
    return parts
