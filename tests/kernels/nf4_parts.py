"""NF4 weights for tests of kernels: plain and nested scales, of every kind."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from moeconv.codecs.nf4 import STATE
from moeconv.types import Params
from tests.kernels.int_parts import WILD, draw, scales

Made = tuple[dict[str, torch.Tensor], Params]
# bitsandbytes 0.47, functional.py: get_4bit_type("nf4")
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


class Nested(NamedTuple):
    """Scales that are quantized in turn."""

    blocksize: int
    offset: float = 0.03


def made(
    size: tuple[int, int], blocksize: int = 64, nested: Nested | None = None, wild: float = 0.0
) -> Made:
    """Return random codes; a share `wild` of the scales is of any kind."""
    rows, cols = size
    count = rows * cols
    blocks = -(-count // blocksize)
    pairs = draw(3).integers(0, 256, (-(-count // 2), 1), dtype=np.uint8)
    params: Params = {
        "rows": rows,
        "cols": cols,
        "blocksize": blocksize,
        "nested_blocksize": nested.blocksize if nested else 0,
        "nested_offset": nested.offset if nested else 0.0,
        "state_nbytes": 5,
    }
    parts = {
        "weight": torch.from_numpy(pairs),
        "weight.absmax": scales(1, blocks, wild=wild),
        "weight.quant_map": torch.tensor([NF4]),
        STATE: torch.zeros(1, 5, dtype=torch.uint8),
    }
    if nested:
        stored = draw(4).integers(0, 256, (1, blocks), dtype=np.uint8)
        parts["weight.absmax"] = torch.from_numpy(stored)
        parts["weight.nested_absmax"] = scales(1, -(-blocks // nested.blocksize), wild=wild)
        parts["weight.nested_quant_map"] = torch.linspace(-1, 1, 256)[None]
    return parts, params


def of_bits(bits: list[int]) -> torch.Tensor:
    """Return float32 [1, N] of these bits."""
    return torch.from_numpy(np.array([bits], np.uint32).view(np.float32).copy())


def every_pair(table: torch.Tensor | None = None) -> Made:
    """Return a weight of blocks of 16: every code under scales of every kind, one per row."""
    powers = [(exponent << 23) + 0x2AAAAA for exponent in range(0, 255, 3)]
    found = of_bits([*WILD, *powers, *(power | 1 << 31 for power in powers)])
    parts, params = made((found.numel(), 16), 16)
    line = torch.tensor([0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF], dtype=torch.uint8)
    parts["weight"] = line.repeat(found.numel())[:, None]
    parts["weight.absmax"] = found
    if table is not None:
        parts["weight.quant_map"] = table
    return parts, params


# Tables that no writer makes: what kernels know of a table, they take from it.
ODD = [0, 1 << 31, 1, 0x80000001, 0x00800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x3F800000]
TABLES = {
    "specials": of_bits([*ODD, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, *[0x40000000] * 4]),
    "subnormal": of_bits([1, *[0x3F800000] * 15]),
    "large": of_bits([0x7F000000, 0xFF7FFFFF, *[0x3F800000] * 14]),
    "small": of_bits([0x00800000, 0x80800000, *[0] * 14]),
    "zeros": of_bits([0, 1 << 31] * 8),
    "NaN": of_bits([0x7FC00000] * 16),
}
