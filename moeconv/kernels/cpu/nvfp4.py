"""NVFP4: 4-bit codes with an E4M3 scale per 16 columns, under one scale of the weight."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
import numpy.typing as npt

from moeconv.codecs.base import Window
from moeconv.codecs.fp8 import fp8_table
from moeconv.codecs.nvfp4 import GROUP
from moeconv.kernels.cpu import fours
from moeconv.kernels.cpu.base import ELEMENTS, Array, Counts, check_array
from moeconv.types import Params


@cache
def _e4m3_table() -> npt.NDArray[np.float32]:
    table = np.array(fp8_table("F8_E4M3"), np.float32)
    table.flags.writeable = False
    return table


def _whole_scale(parts: Mapping[str, Array], part: str) -> np.float32:
    """Return the one scale of a weight."""
    check_array(part, parts[part], ELEMENTS["F32"], (1, 1))
    found: np.float32 = parts[part][0, 0]
    return found


def decode_ct(
    parts: Mapping[str, Array], window: Window, params: Params, out_dtype: str, out: Array
) -> Counts:
    """Fill `out` [R, C] from codes [R, ceil C/2] and scales [R, ceil C/16]; the weight's scale
    divides.

    Equals codecs/nvfp4.py rounded once; tests/kernels/test_nvfp4.py holds it to that.
    """
    check_array("out", out, ELEMENTS[out_dtype], (window.rows, window.cols))
    with np.errstate(all="ignore"):
        scales = _e4m3_table() / _whole_scale(parts, "weight_global_scale")
    tables = fours.tables_of(scales, out_dtype)
    return fours.decode(parts["weight_packed"], parts["weight_scale"], tables, GROUP, out)


def decode_modelopt(
    parts: Mapping[str, Array], window: Window, params: Params, out_dtype: str, out: Array
) -> Counts:
    """Fill `out` [R, C] from codes [R, ceil C/2] and scales [R, ceil C/16]; the weight's scale
    multiplies.

    Equals codecs/nvfp4.py rounded once; tests/kernels/test_nvfp4.py holds it to that.
    """
    check_array("out", out, ELEMENTS[out_dtype], (window.rows, window.cols))
    with np.errstate(all="ignore"):
        scales = _e4m3_table() * _whole_scale(parts, "weight_scale_2")
    tables = fours.tables_of(scales, out_dtype)
    return fours.decode(parts["weight"], parts["weight_scale"], tables, GROUP, out)
