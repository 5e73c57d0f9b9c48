"""MXFP4: 4-bit codes with an exponent per 32 columns."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from moeconv.codecs.base import Window
from moeconv.codecs.mxfp4 import GROUP
from moeconv.kernels.cpu import fours
from moeconv.kernels.cpu.base import ELEMENTS, Array, Counts, check_array
from moeconv.kernels.cpu.scaled import e8m0_table
from moeconv.types import Params


@cache
def _tables(out_dtype: str) -> fours.Tables:
    return fours.tables_of(e8m0_table(), out_dtype)


def decode(
    parts: Mapping[str, Array], window: Window, params: Params, out_dtype: str, out: Array
) -> Counts:
    """Fill `out` [R, C] from codes [R, C/2] and scales [R, ceil(C/32)], both uint8.

    Equals codecs/mxfp4.py rounded once; tests/kernels/test_cpu_mxfp4.py holds it to that.
    """
    check_array("out", out, ELEMENTS[out_dtype], (window.rows, -(-window.cols // 2) * 2))
    codes, scales = parts[str(params["codes"])], parts[str(params["scales"])]
    return fours.decode(codes, scales, _tables(out_dtype), GROUP, out)
