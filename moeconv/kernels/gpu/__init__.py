"""Decoding on a GPU: what codecs/ says readably, in Triton; bit for bit the same.

Importing this package imports neither torch nor triton: kernels are found by name when first used.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moeconv.kernels.gpu.base import Kernel

# Codec -> module and function below this package.
KERNELS: Mapping[str, str] = {
    "awq": "awq.decode",
    "float": "floats.decode",
    "fp8-block": "fp8.decode_block",
    "fp8-channel": "fp8.decode_channel",
    "fp8-tensor": "fp8.decode_tensor",
    "ggml": "ggml.decode",
    "gptq": "gptq.decode",
    "int-quantized": "int_quantized.decode",
    "mxfp4": "mxfp4.decode",
    "mxfp8": "fp8.decode_mx",
    "nf4": "nf4.decode",
    "nvfp4-ct": "nvfp4.decode_ct",
    "nvfp4-modelopt": "nvfp4.decode_modelopt",
    "packed-int": "packed_int.decode",
}

# Of weights whose parts are stored [cols, rows]: window and output are as stored, too.
TURNED_KERNELS: Mapping[str, str] = {
    "float": "floats.decode",
    "fp8-block": "fp8.decode_block_turned",
    "fp8-channel": "fp8.decode_channel_turned",
    "fp8-tensor": "fp8.decode_tensor",
    "mxfp8": "fp8.decode_mx_turned",
}


def has_kernel(codec: str, *, turned: bool = False) -> bool:
    """Return whether `kernel_of` has a kernel for a codec."""
    return codec in (TURNED_KERNELS if turned else KERNELS)


def kernel_of(codec: str, *, turned: bool = False) -> Kernel | None:
    """Return the kernel of a codec, for parts stored [cols, rows] if `turned`; None without one."""
    home = (TURNED_KERNELS if turned else KERNELS).get(codec)
    if home is None:
        return None
    module, function = home.split(".")
    found: Kernel = getattr(import_module(f"{__name__}.{module}"), function)
    return found
