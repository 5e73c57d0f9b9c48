"""Elements as bits: rounded by torch, one road apart from the kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moeconv.torch_dtypes import torch_dtype
from moeconv.types import DTYPE_BITS

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[Any]

BITS = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
CANONICAL_NAN = {"BF16": 0x7FC0, "F16": 0x7E00, "F32": 0x7FC00000}


def bits_of(tensor: torch.Tensor) -> Array:
    """Return the bits of a tensor's elements, [rows, cols] unsigned of the same width."""
    import torch

    signed = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    found = tensor.contiguous().view(signed[tensor.element_size()]).numpy()
    bits: Array = found.view(BITS[tensor.element_size() * 8])
    return bits


def rounded_bits(values: torch.Tensor, dtype: str) -> Array:
    """Return the bits of float32 values rounded once by torch, every NaN the canonical one."""
    import torch

    bits = bits_of(values.to(torch_dtype(dtype)))
    bits[torch.isnan(values).numpy()] = CANONICAL_NAN[dtype]
    return bits


def show(bits: int, dtype: str) -> str:
    """Return an element as number and bits: 1.5 (0x3FC0)."""
    import torch

    width = DTYPE_BITS[dtype]
    raw = np.array([bits], BITS[width]).view(np.uint8)
    value = torch.from_numpy(raw).view(torch_dtype(dtype))
    return f"{value.item()!r} (0x{bits:0{width // 4}X})"
