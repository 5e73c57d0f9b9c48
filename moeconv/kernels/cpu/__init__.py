"""Decoding on the CPU: what codecs/ says readably, compiled; bit for bit the same. No torch."""

from __future__ import annotations

from collections.abc import Mapping

from moeconv.kernels.cpu import (
    awq,
    floats,
    fp8,
    ggml,
    gptq,
    int_quantized,
    moved,
    mxfp4,
    mxfp8,
    nf4,
    nvfp4,
    packed_int,
)
from moeconv.kernels.cpu.base import Counts, Kernel
from moeconv.kernels.cpu.copies import copy_into, count_nonfinite
from moeconv.kernels.cpu.floats import round_to

__all__ = [
    "KERNELS",
    "TURNED_KERNELS",
    "Counts",
    "Kernel",
    "copy_into",
    "count_nonfinite",
    "round_to",
]

KERNELS: Mapping[str, Kernel] = {
    "awq": awq.decode,
    "float": floats.decode,
    "fp8-block": fp8.decode_block,
    "fp8-channel": fp8.decode_channel,
    "fp8-tensor": fp8.decode_tensor,
    "ggml": ggml.decode,
    "gptq": gptq.decode,
    "int-quantized": int_quantized.decode,
    "mxfp4": mxfp4.decode,
    "mxfp8": mxfp8.decode,
    "nf4": nf4.decode,
    "nvfp4-ct": nvfp4.decode_ct,
    "nvfp4-modelopt": nvfp4.decode_modelopt,
    "packed-int": packed_int.decode,
    "raw": moved.decode_raw,
    "repeated": moved.decode_repeated,
}

# Of weights whose parts are stored [cols, rows]: window and output are as stored, too.
TURNED_KERNELS: Mapping[str, Kernel] = {
    "float": floats.decode,
    "fp8-block": fp8.decode_block_turned,
    "fp8-channel": fp8.decode_channel_turned,
    "fp8-tensor": fp8.decode_tensor,
    "mxfp8": mxfp8.decode_turned,
    "raw": moved.decode_raw,
    "repeated": moved.decode_repeated_turned,
}
