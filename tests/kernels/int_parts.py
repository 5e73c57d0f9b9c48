"""Random parts of integer weights, scales of every kind among them."""

from __future__ import annotations

import numpy as np
import torch

from moeconv.types import Params, element_count

FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# float32 bits at the edges of both ways through the kernel, and numbers that are not ordinary
WILD = [0, 1, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x7F800001]
WILD += [0x80000000, 0x80000001, 0x41800000, 0x41800001, 0x79800000, 0x79800001, 0xFF800000]


def draw(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def words(*shape: int, seed: int = 0) -> torch.Tensor:
    found = draw(seed).integers(0, 1 << 32, shape, dtype=np.uint32)
    return torch.from_numpy(found.view(np.int32))


def scales(*shape: int, dtype: str = "F32", wild: float = 0.05, seed: int = 1) -> torch.Tensor:
    """Return scales, a share of them `wild`: any bits, or a number at an edge."""
    rng = draw(seed)
    count = element_count(shape)
    plain = rng.uniform(1e-4, 1.0, count).astype(np.float32)
    bits = rng.integers(0, 1 << 32, count, dtype=np.uint32)
    edges = np.array(WILD, np.uint32)[rng.integers(0, len(WILD), count)]
    odd = np.where(rng.integers(0, 2, count) == 0, bits, edges).view(np.float32)
    chosen = np.where(rng.uniform(size=count) < wild, odd, plain)
    return torch.from_numpy(chosen.astype(np.float32)).to(FLOATS[dtype]).reshape(shape)


def order(cols: int, groups: int, seed: int = 2) -> torch.Tensor:
    return torch.from_numpy(draw(seed).integers(0, groups, cols).astype(np.int32))


def with_params(params: Params, **changed: int | str | bool) -> Params:
    return {**params, **changed}
