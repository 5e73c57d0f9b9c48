"""compressed-tensors "pack-quantized": words along the columns, zero points along the rows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moeconv.codecs import bits as b
from moeconv.codecs.base import Window
from moeconv.codecs.packed_int import check_payload, run_of
from moeconv.kernels.cpu import int_windows as windows
from moeconv.kernels.cpu import ints
from moeconv.kernels.cpu.base import Array, Counts, check_array
from moeconv.types import Params

I4 = np.dtype(np.int32)
LAYOUTS = {4: ints.NIBBLES, 8: ints.BYTES}  # of widths whose fields lie in a byte of their own
ZEROS = {"absent": ints.NO_ZEROS, "plain": ints.PLAIN_ZEROS, "packed": ints.PACKED_ZEROS}


def decode(
    parts: Mapping[str, Array], window: Window, params: Params, out_dtype: str, out: Array
) -> Counts:
    """Fill `out` [R, C] from int32 words [R, C*bits/32] and scales [R or 1, G].

    Equals codecs/packed_int.py rounded once; tests/kernels/test_ints.py holds it to that.
    """
    check_payload(parts, window, params)
    bits, run = int(params["bits"]), run_of(params)
    words, scales = parts["weight_packed"], parts["weight_scale"]
    check_array("words", words, I4, (window.rows, b.words_for(window.cols, run)))
    kind = ZEROS[str(params["zeros"])]
    job = ints.Job(
        layout=LAYOUTS.get(bits, ints.FIELDS),
        bits=bits,
        elements=run.elements,
        words=run.words,
        zeros=kind,
        offset=0 if kind == ints.PACKED_ZEROS else 1 << (bits - 1),
    )
    job = windows.in_groups(job, window, int(params["group_size"]))
    stored = windows.Stored(words, scales, scales)
    if kind == ints.PLAIN_ZEROS:
        zeros = parts["weight_zero_point"]
        stored = stored._replace(zeros=windows.plain_zeros(zeros))
    if kind == ints.PACKED_ZEROS:
        places = windows.places_of(window.rows, bits, run)
        stored = stored._replace(zeros=parts["weight_zero_point"], places=places)
    if params["act_order"]:
        job, order = windows.in_activation_order(job, parts["weight_g_idx"], scales.shape[1])
        stored = stored._replace(order=order)
    return windows.decode_rows(stored, job, out_dtype, out)
