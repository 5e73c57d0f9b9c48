"""GPTQ: words along the columns but stored [cols, rows], turned tile by tile."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moeconv.codecs import bits as b
from moeconv.codecs.base import Window
from moeconv.codecs.gptq import not_in_order, not_symmetric, stored_zeros
from moeconv.kernels.cpu import int_windows as windows
from moeconv.kernels.cpu import ints
from moeconv.kernels.cpu.base import Array, Counts, check_array
from moeconv.kernels.cpu.packed_int import LAYOUTS
from moeconv.types import Params

I4 = np.dtype(np.int32)


def decode(
    parts: Mapping[str, Array], window: Window, params: Params, out_dtype: str, out: Array
) -> Counts:
    """Fill `out` [R, C] from int32 words [C*bits/32, R], scales [G, R], zeros [G, R*bits/32].

    Equals codecs/gptq.py rounded once; tests/kernels/test_cpu_turned_ints.py holds it to that.
    """
    bits = int(params["bits"])
    run = b.dense_run(bits)
    words, scales = parts["qweight"], parts["scales"]
    check_array("words", words, I4, (b.words_for(window.cols, run), window.rows))
    packed = params["zeros"] == "packed"
    if packed and params["sym"]:
        _check_symmetric(parts["qzeros"], window, params)
        packed = False
    job = ints.Job(
        layout=LAYOUTS.get(bits, ints.FIELDS),
        bits=bits,
        elements=run.elements,
        words=run.words,
        zeros=ints.PACKED_ZEROS if packed else ints.NO_ZEROS,
        offset=int(params["zero_offset"]) if packed else 1 << (bits - 1),
    )
    job = windows.in_groups(job, window, int(params["group_size"]))
    stored = windows.Stored(words, scales, scales)
    if packed:
        places = windows.places_of(window.rows, bits, run)
        stored = stored._replace(zeros=parts["qzeros"], places=places)
    if params["act_order"]:
        job, order = windows.in_activation_order(job, parts["g_idx"], len(scales))
        stored = stored._replace(order=order)
    elif "g_idx" in parts:
        _check_order(parts["g_idx"], window, int(params["group_size"]))
    return windows.decode_turned(stored, job, out_dtype, out)


def _check_symmetric(qzeros: Array, window: Window, params: Params) -> None:
    """Raise BadSource where the zero points of a symmetric weight are not all in the middle."""
    bits, offset = int(params["bits"]), int(params["zero_offset"])
    middle = 1 << (bits - 1)
    if b.WORD_BITS % bits == 0:  # whole words of the usual zero point need no closer look
        usual = sum((middle - offset) << shift for shift in range(0, b.WORD_BITS, bits))
        if (qzeros.view(np.uint32) == usual).all():
            return
    zeros = stored_zeros(qzeros, {**params, "rows": window.rows}) + offset
    if (zeros != middle).any():
        raise not_symmetric(zeros, bits)


def _check_order(g_idx: Array, window: Window, group_size: int) -> None:
    """Raise BadSource where the groups are not those of columns in order."""
    columns = np.arange(window.col_start, window.col_stop)
    groups = np.zeros_like(columns) if group_size == b.ONE_GROUP else columns // group_size
    if (g_idx.reshape(-1) != groups).any():
        raise not_in_order()
