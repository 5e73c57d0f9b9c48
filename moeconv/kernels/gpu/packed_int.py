"""compressed-tensors "pack-quantized" on a GPU: words along the columns, zeros along the rows."""

from __future__ import annotations

from moeconv.codecs import bits as b
from moeconv.codecs.base import Window
from moeconv.codecs.packed_int import run_of
from moeconv.kernels.gpu import ints
from moeconv.kernels.gpu.base import Output, Parts
from moeconv.types import Params

ZEROS = {"absent": ints.NO_ZEROS, "plain": ints.PLAIN_ZEROS, "packed": ints.PACKED_ZEROS}


def decode(parts: Parts, window: Window, params: Params, out: Output) -> None:
    """Fill `out` [R, C] from int32 words [R, C*bits/32] and scales [R or 1, G].

    Equals codecs/packed_int.py rounded once; tests/kernels/test_ints.py holds it to that.
    """
    bits, run = int(params["bits"]), run_of(params)
    scales, zeros = parts["weight_scale"], str(params["zeros"])
    order = parts["weight_g_idx"] if params["act_order"] else None
    job = ints.Job(
        bits=bits,
        run=run,
        groups=ints.groups_of(window, params, scales.shape[1]),
        form=ints.UNITS if run == b.dense_run(bits) else ints.FIELDS,
        zeros=ZEROS[zeros],
        offset=0 if zeros == "packed" else 1 << (bits - 1),
    )
    stored = ints.Stored(parts["weight_packed"], scales, parts.get("weight_zero_point"), order)
    ints.decode_rows(stored, job, out)
