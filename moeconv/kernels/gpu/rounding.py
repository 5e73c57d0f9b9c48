"""Float32 values of a torch reference rounded and counted where they are, as base.py does it."""

from __future__ import annotations

import torch

from moeconv.kernels.gpu.base import Output

NAN_BITS = {"BF16": 0x7FC0, "F16": 0x7E00, "F32": 0x7FC00000}
INF_BITS = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}
MAGNITUDES = {"BF16": 0x7FFF, "F16": 0x7FFF, "F32": 0x7FFFFFFF}


def round_on_device(values: torch.Tensor, out: Output) -> None:
    """Fill `out` [R, C] with the bits of float32 [R, C], nearest even; add to its counts.

    Integers round BF16, as in the kernels; float16 is every device's own, and rounds the same.
    """
    dtype, bits = out.dtype, values.contiguous().view(torch.int32)
    magnitudes = bits & MAGNITUDES["F32"]
    nan, inf = magnitudes > INF_BITS["F32"], magnitudes == INF_BITS["F32"]
    del magnitudes  # no more may be held than references do
    if dtype == "BF16":
        found = (bits >> 16).bitwise_and_(1).add_(bits).add_(0x7FFF).bitwise_right_shift_(16)
    elif dtype == "F16":
        found = values.contiguous().to(torch.float16).view(torch.int16).int()
    else:
        found = bits.clone()
    out.bits.copy_(found.masked_fill_(nan, NAN_BITS[dtype]))
    ends_inf = found.bitwise_and_(MAGNITUDES[dtype]) == INF_BITS[dtype]
    over = ends_inf.logical_and_(nan.logical_or(inf).logical_not_())
    out.counts.add_(torch.stack([torch.count_nonzero(kind) for kind in (nan, inf, over)]))
