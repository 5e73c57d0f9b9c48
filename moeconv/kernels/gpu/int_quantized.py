"""compressed-tensors "int-quantized" on a GPU: one signed byte per element."""

from __future__ import annotations

import torch

from moeconv.codecs import bits as b
from moeconv.codecs.base import Window
from moeconv.kernels.gpu import ints
from moeconv.kernels.gpu.base import Output, Parts
from moeconv.types import Params

ZEROS = {torch.int8: ints.PLAIN_ZEROS, torch.int32: ints.WIDE_ZEROS}
SIGNS = -0x7F7F7F80  # the sign bits of four bytes: flipping them adds 128 to each
MIDDLE = 128


def decode(parts: Parts, window: Window, params: Params, out: Output) -> None:
    """Fill `out` [R, C] from int8 codes [R, C], scales and int8 or int32 zeros [R or 1, G].

    Equals codecs/int_quantized.py rounded once; tests/kernels/test_ints.py holds it to that.
    """
    codes, scales = parts["weight"], parts["weight_scale"]
    zeros = parts["weight_zero_point"] if params["zeros"] else None
    order = parts["weight_g_idx"] if params["act_order"] else None
    by_words = codes.shape[1] % 4 == 0 and codes.data_ptr() % 4 == 0 and codes.is_contiguous()
    job = ints.Job(
        bits=8,
        run=b.dense_run(8),
        groups=ints.groups_of(window, params, scales.shape[1]),
        form=ints.UNITS if by_words else ints.BYTES,
        flip=SIGNS,
        zeros=ints.NO_ZEROS if zeros is None else ZEROS[zeros.dtype],
        offset=MIDDLE,
    )
    given = codes.view(torch.int32) if by_words else codes
    ints.decode_rows(ints.Stored(given, scales, zeros, order), job, out)
