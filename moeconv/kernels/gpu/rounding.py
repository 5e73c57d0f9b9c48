"""Float32 values of a torch reference rounded and counted where they are, as base.py does it."""

from __future__ import annotations

import torch

from moeconv.kernels.gpu.base import OUT_DTYPES, Output

NAN_BITS = {"BF16": 0x7FC0, "F16": 0x7E00, "F32": 0x7FC00000}
INF_BITS = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}
MAGNITUDES = {"BF16": 0x7FFF, "F16": 0x7FFF, "F32": 0x7FFFFFFF}


def round_on_device(values: torch.Tensor, out: Output) -> None:
    """Fill `out` [R, C] with the bits of float32 [R, C], nearest even; add to its counts.

    Integers round BF16, as in the kernels; float16 is every device's own, and rounds the same.
    """
    dtype, bits = out.dtype, values.contiguous().view(torch.int32)
    if dtype == "BF16":
        found = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    elif dtype == "F16":
        found = values.contiguous().to(torch.float16).view(torch.int16).int()
    else:
        found = bits
    nan, inf = values.isnan(), values.isinf()
    out.bits.copy_(found.masked_fill(nan, NAN_BITS[dtype]).to(OUT_DTYPES[dtype]))
    ends_inf = (found & MAGNITUDES[dtype]) == INF_BITS[dtype]
    over = ends_inf & values.isfinite()
    out.counts.add_(torch.stack([nan.sum(), inf.sum(), over.sum()]))
