"""GPTQ on a GPU: words along the columns but stored [cols, rows], zeros along the rows."""

from __future__ import annotations

from moeconv.codecs import bits as b
from moeconv.codecs.base import Window
from moeconv.kernels.gpu import ints
from moeconv.kernels.gpu.base import Output, Parts
from moeconv.types import Params


def decode(parts: Parts, window: Window, params: Params, out: Output) -> None:
    """Fill `out` [R, C] from int32 words [C*bits/32, R], scales [G, R], zeros [G, R*bits/32].

    Equals codecs/gptq.py rounded once; tests/kernels/test_turned_ints.py holds it to that.
    """
    bits, scales = int(params["bits"]), parts["scales"]
    packed = params["zeros"] == "packed" and not params["sym"]  # sym: 2^(bits-1), as was checked
    job = ints.Job(
        bits=bits,
        run=b.dense_run(bits),
        groups=ints.groups_of(window, params, len(scales)),
        zeros=ints.PACKED_ZEROS if packed else ints.NO_ZEROS,
        offset=int(params["zero_offset"]) if packed else 1 << (bits - 1),
    )
    stored = ints.Stored(
        parts["qweight"].T,
        scales.T,
        parts["qzeros"].T if packed else None,
        parts["g_idx"] if params["act_order"] else None,
    )
    ints.decode_rows(stored, job, out)
