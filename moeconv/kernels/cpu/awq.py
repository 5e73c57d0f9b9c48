"""AWQ "gemm": words across eight rows, stored [cols, rows] and turned tile by tile."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moeconv.codecs.awq import BITS, ORDER, PER_WORD
from moeconv.codecs.base import Window
from moeconv.kernels.cpu import int_windows as windows
from moeconv.kernels.cpu import ints
from moeconv.kernels.cpu.base import Array, Counts, check_array
from moeconv.types import Params

I4 = np.dtype(np.int32)


def decode(
    parts: Mapping[str, Array], window: Window, params: Params, out_dtype: str, out: Array
) -> Counts:
    """Fill `out` [R, C] from int32 words [C, R/8], scales [G, R] and zero points [G, R/8].

    Equals codecs/awq.py rounded once; tests/kernels/test_turned_ints.py holds it to that.
    """
    words = -(-window.rows // PER_WORD)
    check_array("words", parts["qweight"], I4, (window.cols, words))
    job = ints.Job(layout=ints.ACROSS, bits=BITS, offset=1 << (BITS - 1))
    job = windows.in_groups(job, window, int(params["group_size"]))
    row = np.arange(window.rows)
    shifts = BITS * np.array(ORDER)[row % PER_WORD]
    places = np.stack((row // PER_WORD, shifts), axis=1).astype(np.int32)
    stored = windows.Stored(parts["qweight"], parts["scales"], parts["scales"], places=places)
    if params["zeros"] == "packed":
        job = job._replace(zeros=ints.PACKED_ZEROS, offset=0)
        stored = stored._replace(zeros=parts["qzeros"])
    return windows.decode_turned(stored, job, out_dtype, out)
