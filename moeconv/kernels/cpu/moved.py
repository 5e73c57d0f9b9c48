"""What is moved more than computed: scales that are repeated, integers that become floats."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from moeconv.codecs.base import Window
from moeconv.kernels.cpu.base import ELEMENTS, Array, Counts, Pair, check_array
from moeconv.kernels.cpu.floats import cast, round_to
from moeconv.types import Params

CHUNK = 1 << 12  # elements in float32 at a time: nobody counts their memory
INTEGERS: Mapping[str, np.dtype[np.generic]] = {
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "BOOL": np.dtype(np.uint8),
}


def _by_rows(values: Callable[[int, int], Array], out_dtype: str, out: Array) -> Counts:
    """Fill `out` [R, C] with float32 values(start, stop) of its rows; return the counts."""
    step = max(CHUNK // max(out.shape[1], 1), 1)
    total = np.zeros(3, np.int64)
    for start in range(0, len(out), step):
        stop = min(start + step, len(out))
        total += round_to(out_dtype, values(start, stop), out[start:stop])
    return Counts(*total.tolist())


def decode_raw(
    parts: Mapping[str, Array], window: Window, params: Params, out_dtype: str, out: Array
) -> Counts:
    """Fill `out` [R, C] with integers or truth values [R, C].

    Equals codecs/floats.py rounded once; tests/kernels/test_cpu_moved.py holds it to that.
    """
    dtype = INTEGERS[str(params["dtype"])]
    check_array("weight", parts["weight"], dtype, (window.rows, window.cols))
    check_array("out", out, ELEMENTS[out_dtype], (window.rows, window.cols))
    stored = parts["weight"].view(dtype)
    return _by_rows(lambda start, stop: stored[start:stop].astype(np.float32), out_dtype, out)


def _repeat(stored: Array, dtype: str, block: Pair, out_dtype: str, out: Array) -> Counts:
    """Fill `out` [R, C] with floats of `dtype`, each of them block[0] x block[1] times."""
    rows, cols = out.shape
    shape = (-(-rows // block[0]), -(-cols // block[1]))
    check_array("weight", stored, ELEMENTS[dtype], shape)

    def values(start: int, stop: int) -> Array:
        taken = stored[np.arange(start, stop) // block[0]]
        scales = np.empty(taken.shape, np.float32)
        cast(taken, (dtype, "F32"), scales)
        return np.ascontiguousarray(np.repeat(scales, block[1], axis=1)[:, :cols])

    return _by_rows(values, out_dtype, out)


def decode_repeated(
    parts: Mapping[str, Array], window: Window, params: Params, out_dtype: str, out: Array
) -> Counts:
    """Fill `out` [R, C] with floats [ceil R/rows, ceil C/cols], each of them rows x cols times.

    Equals codecs/floats.py rounded once; tests/kernels/test_cpu_moved.py holds it to that.
    """
    check_array("out", out, ELEMENTS[out_dtype], (window.rows, window.cols))
    block = (int(params["rows"]), int(params["cols"]))
    return _repeat(parts["weight"], str(params["dtype"]), block, out_dtype, out)


def decode_repeated_turned(
    parts: Mapping[str, Array], window: Window, params: Params, out_dtype: str, out: Array
) -> Counts:
    """Fill `out` from floats stored [cols, rows], like out and window."""
    check_array("out", out, ELEMENTS[out_dtype], (window.rows, window.cols))
    block = (int(params["cols"]), int(params["rows"]))
    return _repeat(parts["weight"], str(params["dtype"]), block, out_dtype, out)
