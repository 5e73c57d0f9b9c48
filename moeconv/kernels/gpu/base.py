"""What a GPU kernel is, and the arithmetic that all of them end with.

Nothing is left to the compiler's taste: products are rounded before they are added to anything
(`enable_fp_fusion` is off in every launch), BF16 is rounded with integers (Triton's interpreter
truncates), and divisions are asked for by their rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from subprocess import SubprocessError
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from moeconv.codecs.base import Window
from moeconv.errors import ShapeMismatch
from moeconv.types import Params

CODES: Mapping[str, int] = {"BF16": 0, "F16": 1, "F32": 2}  # what CODE is in a kernel
OUT_DTYPES: Mapping[str, torch.dtype] = {
    "BF16": torch.int16,
    "F16": torch.int16,
    "F32": torch.int32,
}
# No fused multiply-add: the reference rounds the product.
LAUNCH: Mapping[str, Any] = {"enable_fp_fusion": False}
# What a first launch raises: Triton's compiler, or the C compiler that builds its launchers.
COMPILE_ERRORS: tuple[type[Exception], ...] = (triton.TritonError, SubprocessError)
# Older ones flush subnormal numbers in divisions (div.rn.ftz); 3.2 compiles no integer kernel.
LEAST_TRITON = (3, 6)
TRITON_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])

# On the device, [major, minor] as stored: FP8 and E8M0 as uint8, all else in its own dtype.
Parts = Mapping[str, torch.Tensor]

INF_BITS = tl.constexpr(0x7F800000)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)


def check_part(
    name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, int]
) -> None:
    """Raise ShapeMismatch unless a tensor is [rows, cols] of one of `dtypes`.

    Kernels do not check bounds: what passes here is what they may touch.
    """
    if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
        raise ShapeMismatch(
            f"{name} is {tensor.dtype} {list(tensor.shape)}, not {dtypes[0]} {list(shape)}",
            hint="pass the elements of exactly the decoded window",
        )


class Output(NamedTuple):
    """Where a window goes, as what dtype.

    bits: int16 (BF16, F16) or int32 (F32) [rows, cols], with any strides. counts: int64 [3], to
    which NaN, Inf and overflows are added.
    """

    dtype: str
    bits: torch.Tensor
    counts: torch.Tensor

    def check(self, shape: tuple[int, int]) -> None:
        """Raise ShapeMismatch unless the bits are those of a window."""
        check_part("out", self.bits, (OUT_DTYPES[self.dtype],), shape)


Kernel = Callable[[Parts, Window, Params, Output], None]  # fills the output with the window


@triton.jit
def e8m0(stored):
    """Return float32 2^(b-127) of uint8 bytes: 0 is the subnormal 2^-127, 255 is NaN (OCP MX)."""
    code = stored.to(tl.int32)
    bits = tl.where(code == 0, 0x00400000, code << 23)
    return tl.where(code == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def rounded(value, CODE: tl.constexpr):
    """Return the bits of float32 values in the output dtype, nearest even, NaN canonical."""
    bits = value.to(tl.int32, bitcast=True)
    is_nan = (bits & MAGNITUDE) > INF_BITS
    if CODE == 0:
        found = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        result = tl.where(is_nan, 0x7FC0, found).to(tl.int16)
    elif CODE == 1:
        half = value.to(tl.float16).to(tl.int16, bitcast=True)
        result = tl.where(is_nan, 0x7E00, half.to(tl.int32)).to(tl.int16)
    else:
        result = tl.where(is_nan, 0x7FC00000, bits)
    return result


@triton.jit
def counted(value, result, mask, counts, CODE: tl.constexpr):
    """Add the NaN, Inf and overflows of a block to counts [3]; memory is touched if there are any.

    value: float32 before rounding; result: its bits after.
    """
    magnitude = value.to(tl.int32, bitcast=True) & MAGNITUDE
    nan = tl.sum((mask & (magnitude > INF_BITS)).to(tl.int32))
    inf = tl.sum((mask & (magnitude == INF_BITS)).to(tl.int32))
    tl.atomic_add(counts, nan.to(tl.int64), mask=nan > 0)
    tl.atomic_add(counts + 1, inf.to(tl.int64), mask=inf > 0)
    if CODE != 2:  # what is finite in float32 is finite there
        top: tl.constexpr = 0x7F80 if CODE == 0 else 0x7C00
        ends_inf = (result.to(tl.int32) & 0x7FFF) == top
        over = tl.sum((mask & ends_inf & (magnitude < INF_BITS)).to(tl.int32))
        tl.atomic_add(counts + 2, over.to(tl.int64), mask=over > 0)
