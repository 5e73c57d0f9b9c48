"""MXFP8 on a GPU: FP8 whose blocks are 1 x 32."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moeconv.codecs.base import Window
from moeconv.codecs.mxfp4 import GROUP
from moeconv.kernels.gpu.fp8 import decode_blocks
from moeconv.types import Params


def decode(
    parts: Mapping[str, torch.Tensor],
    window: Window,
    params: Params,
    out_dtype: str,
    out: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """Fill `out` [R, C] from codes [R, C] and exponents [R, ceil C/32].

    Equals codecs/mxfp8.py rounded once; tests/kernels/test_gpu_fp8.py holds it to that.
    """
    decode_blocks(parts, params, (1, GROUP), out_dtype, out, counts)


def decode_turned(
    parts: Mapping[str, torch.Tensor],
    window: Window,
    params: Params,
    out_dtype: str,
    out: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """Fill `out` [C, R] from codes [C, R] and exponents [ceil C/32, R]."""
    decode_blocks(parts, params, (GROUP, 1), out_dtype, out, counts)
