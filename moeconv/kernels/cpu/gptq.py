"""GPTQ: words along the columns but stored [cols, rows], turned tile by tile."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moeconv.codecs import bits as b
from moeconv.codecs.base import Window
from moeconv.codecs.gptq import check_payload
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

    Equals codecs/gptq.py rounded once; tests/kernels/test_turned_ints.py holds it to that.
    """
    check_payload(parts, window, params)
    bits = int(params["bits"])
    run = b.dense_run(bits)
    words, scales = parts["qweight"], parts["scales"]
    check_array("words", words, I4, (b.words_for(window.cols, run), window.rows))
    packed = params["zeros"] == "packed" and not params["sym"]
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
    return windows.decode_turned(stored, job, out_dtype, out)
