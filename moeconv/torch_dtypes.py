"""The names that torch has for the dtypes of safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from moeconv.errors import Refused

if TYPE_CHECKING:
    import torch

TORCH_NAMES: Mapping[str, str] = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "I64": "int64",
    "U64": "uint64",
    "F64": "float64",
}


def torch_dtype(dtype: str) -> torch.dtype:
    """Return torch's dtype; Refused for one of less than a byte, which torch does not have."""
    import torch

    name = TORCH_NAMES.get(dtype)
    found = None if name is None else getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise Refused(f"torch {torch.__version__} has no dtype for {dtype}")
    return found
