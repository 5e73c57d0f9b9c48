"""MXFP8: FP8 whose blocks are 1 x 32."""

from __future__ import annotations

from collections.abc import Mapping

from moeconv.codecs.base import Window
from moeconv.codecs.mxfp4 import GROUP
from moeconv.kernels.cpu.base import Array, Counts
from moeconv.kernels.cpu.fp8 import decode_blocks
from moeconv.types import Params


def decode(
    parts: Mapping[str, Array], window: Window, params: Params, out_dtype: str, out: Array
) -> Counts:
    """Fill `out` [R, C] from codes [R, C] and exponents [R, ceil C/32].

    Equals codecs/mxfp8.py rounded once; tests/kernels/test_fp8.py holds it to that.
    """
    return decode_blocks(parts, params, (1, GROUP), out_dtype, out)


def decode_turned(
    parts: Mapping[str, Array], window: Window, params: Params, out_dtype: str, out: Array
) -> Counts:
    """Fill `out` [C, R] from codes [C, R] and exponents [ceil C/32, R]."""
    return decode_blocks(parts, params, (GROUP, 1), out_dtype, out)
