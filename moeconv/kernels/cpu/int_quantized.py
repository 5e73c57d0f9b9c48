"""compressed-tensors "int-quantized": one signed byte per element."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moeconv.codecs.base import Window
from moeconv.codecs.int_quantized import check_payload
from moeconv.kernels.cpu import int_windows as windows
from moeconv.kernels.cpu import ints
from moeconv.kernels.cpu.base import Array, Counts, check_array
from moeconv.types import Params

MIDDLE = 128  # flipping the sign bit adds it


def decode(
    parts: Mapping[str, Array], window: Window, params: Params, out_dtype: str, out: Array
) -> Counts:
    """Fill `out` [R, C] from int8 codes [R, C], scales and int8 or int32 zeros [R or 1, G].

    Equals codecs/int_quantized.py rounded once; tests/kernels/test_ints.py holds it to that.
    """
    check_payload(parts, window, params)
    codes, scales = parts["weight"], parts["weight_scale"]
    check_array("codes", codes, np.dtype(np.int8), (window.rows, window.cols))
    job = ints.Job(layout=ints.BYTES, bits=8, flip=MIDDLE, offset=MIDDLE)
    job = windows.in_groups(job, window, int(params["group_size"]))
    stored = windows.Stored(codes, scales, scales)
    if params["zeros"]:
        job = job._replace(zeros=ints.PLAIN_ZEROS)
        stored = stored._replace(zeros=windows.plain_zeros(parts["weight_zero_point"]))
    if params["act_order"]:
        job, order = windows.in_activation_order(job, parts["weight_g_idx"], scales.shape[1])
        stored = stored._replace(order=order)
    return windows.decode_rows(stored, job, out_dtype, out)
