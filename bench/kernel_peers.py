"""How others decode the same parts: each peer is a function of a case that returns a run of it.

A peer without its package, and one that cannot decode a case, is left out of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch

from moeconv.codecs import CODECS
from moeconv.codecs.base import Window
from moeconv.measure.cases import Case, Tile

Run = Callable[[], object]
TORCH_DTYPES = {"F16": torch.float16, "F32": torch.float32}
E4M3 = torch.float8_e4m3fn


class Scheme(NamedTuple):
    """What compressed-tensors has to be told: the compressor's format, and QuantizationArgs."""

    format: str
    args: Mapping[str, Any]


FP8 = {"num_bits": 8, "type": "float"}
FP4 = {"num_bits": 4, "type": "float"}
GROUPS = {"type": "int", "strategy": "group", "group_size": 128}
SCHEMES: Mapping[str, Scheme] = {
    "mxfp4": Scheme("mxfp4-pack-quantized", {**FP4, "strategy": "group", "group_size": 32}),
    "nvfp4-ct": Scheme("nvfp4-pack-quantized", {**FP4, "strategy": "tensor_group"}),
    "mxfp8": Scheme("mxfp8-quantized", {**FP8, "strategy": "group", "group_size": 32}),
    "fp8-block": Scheme(
        "float-quantized", {**FP8, "strategy": "block", "block_structure": [128, 128]}
    ),
    "fp8-channel": Scheme("float-quantized", {**FP8, "strategy": "channel"}),
    "fp8-tensor": Scheme("float-quantized", {**FP8, "strategy": "tensor"}),
    "int-quantized": Scheme("int-quantized", {**GROUPS, "num_bits": 8}),
    "packed-int": Scheme("pack-quantized", GROUPS),
}


def tensors_of(case: Case) -> dict[str, torch.Tensor]:
    """Return the parts as torch has them."""
    found = {part: torch.from_numpy(np.array(array)) for part, array in case.parts.items()}
    if case.kernel.startswith("fp8") or case.kernel == "mxfp8":
        found["weight"] = found["weight"].view(E4M3)
    if case.kernel.startswith("nvfp4"):
        found["weight_scale"] = found["weight_scale"].view(E4M3)
    if case.kernel == "float":
        found["weight"] = found["weight"].view(TORCH_DTYPES[str(case.params["dtype"])])
    return found


def compressed_tensors(case: Case, tile: Tile) -> Run:
    """Return its decompression, in BF16; scales in BF16, too: what is fastest for it."""
    from compressed_tensors.compressors import (  # type: ignore[import-untyped]
        BaseCompressor,
    )
    from compressed_tensors.quantization import (  # type: ignore[import-untyped]
        QuantizationArgs,
        QuantizationScheme,
    )

    told = SCHEMES[case.kernel]
    args = dict(told.args)
    if case.kernel == "packed-int":
        args["num_bits"] = case.params["bits"]
    if case.kernel == "nvfp4-ct":
        args["group_size"] = 16
    if case.kernel.startswith("mx"):
        args["scale_dtype"] = torch.uint8
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    state = tensors_of(case)
    if case.kernel == "mxfp4":
        state = {"weight_packed": state["blocks"], "weight_scale": state["scales"]}
    if case.kernel == "packed-int":
        state["weight_shape"] = torch.tensor(list(tile))
    if case.kernel == "fp8-tensor":
        state["weight_scale"] = state["weight_scale"].reshape(1)
    if case.kernel == "nvfp4-ct":
        state["weight_global_scale"] = state["weight_global_scale"].reshape(1)
    if state["weight_scale"].dtype == torch.float32:
        state["weight_scale"] = state["weight_scale"].bfloat16()
    compressor: Any = BaseCompressor.get_value_from_registry(told.format)
    return lambda: compressor.decompress(state, scheme)["weight"].to(torch.bfloat16)


def transformers(case: Case, tile: Tile) -> Run:
    """Return gpt-oss' formula as transformers has it: it turns the result, too."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    parts = tensors_of(case)
    blocks = parts["blocks"].reshape(1, tile.rows, tile.cols // 32, 16)
    scales = parts["scales"].reshape(1, tile.rows, tile.cols // 32)
    return lambda: convert_moe_packed_tensors(blocks, scales)


def gguf_py(case: Case, tile: Tile) -> Run:
    """Return gguf-py's decoder: its result is float32."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType[str(case.params["type"])]
    return lambda: dequantize(case.parts["weight"], kind)


def deepseek(case: Case, tile: Tile) -> Run:
    """Return DeepSeek's weight_dequant as torch: float32, times each block's scale, to BF16."""
    parts = tensors_of(case)
    weight, scales = parts["weight"], parts["weight_scale"]
    rows, cols = int(case.params["block_rows"]), int(case.params["block_cols"])

    def run() -> object:
        whole = scales.repeat_interleave(rows, 0)[: tile.rows]
        whole = whole.repeat_interleave(cols, 1)[:, : tile.cols]
        return (weight.to(torch.float32) * whole).to(torch.bfloat16)

    return run


def unpacked(words: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the 4-bit codes of int32 words side by side in `dim` (0 or 1), as int8."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    if dim == 0:
        codes = torch.bitwise_right_shift(words[:, None, :], shifts[None, :, None])
        return (codes.to(torch.int8) & 15).flatten(0, 1)
    codes = torch.bitwise_right_shift(words[:, :, None], shifts)
    return (codes.to(torch.int8) & 15).flatten(1, 2)


def gptqmodel(case: Case, tile: Tile) -> Run:
    """Return the formula of GPTQModel's TorchLinear: shifts, int8 codes, rows of scales by g_idx.

    Stated anew: its package asks for other versions of torch than this environment's.
    """
    parts = tensors_of(case)
    groups = torch.arange(tile.cols) // int(case.params["group_size"])
    offset = int(case.params["zero_offset"])

    def run() -> object:
        codes = unpacked(parts["qweight"], 0)
        zeros = unpacked(parts["qzeros"], 1) + offset
        values = parts["scales"][groups] * (codes - zeros[groups])
        return values.T.to(torch.bfloat16).contiguous()

    return run


def autoawq(case: Case, tile: Tile) -> Run:
    """Return the formula of AutoAWQ's dequantize_gemm, stated anew: its order undone by indices."""
    parts = tensors_of(case)
    size = int(case.params["group_size"])
    order = torch.arange(tile.rows).view(-1, 8)[:, [0, 4, 1, 5, 2, 6, 3, 7]].flatten()

    def run() -> object:
        codes, zeros = (unpacked(parts[name], 1)[:, order] for name in ("qweight", "qzeros"))
        scales = parts["scales"].repeat_interleave(size, 0)
        values = (codes - zeros.repeat_interleave(size, 0)) * scales
        return values.T.to(torch.bfloat16).contiguous()

    return run


def bitsandbytes(case: Case, tile: Tile) -> Run:
    """Return bitsandbytes' formula in plain torch, its "default" backend's, stated anew."""
    parts = tensors_of(case)
    codes, stored = (parts[name].flatten() for name in ("weight", "weight.absmax"))
    table = parts["weight.quant_map"].flatten().to(torch.bfloat16)
    nested = int(case.params["nested_blocksize"])

    def run() -> object:
        scales = parts["weight.nested_quant_map"].flatten()[stored.int()].view(-1, nested)
        scales = scales * parts["weight.nested_absmax"].view(-1, 1) + case.params["nested_offset"]
        index = torch.empty(codes.numel() * 2, dtype=torch.int32)
        index[0::2], index[1::2] = codes >> 4, codes & 15
        blocks = table[index].view(-1, int(case.params["blocksize"]))
        return (blocks * scales.view(-1, 1)).to(torch.bfloat16).view(tile)

    return run


def reference(case: Case, tile: Tile) -> Run:
    """Return the plain torch of moeconv/codecs, rounded by torch."""
    parts = tensors_of(case)
    window = Window(0, tile.rows, 0, tile.cols)
    codec = CODECS[case.kernel]
    return lambda: codec.decode(parts, window, case.params).to(torch.bfloat16)


def torch_int8(values: torch.Tensor) -> object:
    """Return int8 codes and scales per row, in file order: torch's one-liners for amxint8."""
    values = values.float()
    scales = values.abs().amax(1, keepdim=True) * (1 / 127)
    return (values / scales).round_().clamp_(-128, 127).to(torch.int8), scales


def torch_int4(values: torch.Tensor) -> object:
    """Return pairs of 4-bit codes and scales per row, in file order: the same for amxint4."""
    values = values.float()
    scales = values.abs().amax(1, keepdim=True) * (1 / 7)
    codes = (values / scales).round_().clamp_(-7, 7).to(torch.int8)
    return (codes[:, 0::2] & 15) | (codes[:, 1::2] << 4), scales


# Names of moeconv/codecs/amx.py's forms -> what torch does to BF16 [rows, cols].
QUANTIZERS: Mapping[str, Callable[[torch.Tensor], object]] = {
    "amxint4": torch_int4,
    "amxint8": torch_int8,
}


class Peer(NamedTuple):
    """A peer: the package that it needs, and what makes its run."""

    title: str
    package: str
    make: Callable[[Case, Tile], Run]


PEERS: Mapping[str, Peer] = {
    "compressed-tensors": Peer("compressed-tensors", "compressed_tensors", compressed_tensors),
    "transformers": Peer("transformers", "transformers", transformers),
    "gguf-py": Peer("gguf-py", "gguf", gguf_py),
    "deepseek": Peer("DeepSeek's formula", "torch", deepseek),
    "gptqmodel": Peer("GPTQModel's formula", "torch", gptqmodel),
    "autoawq": Peer("AutoAWQ's formula", "torch", autoawq),
    "bitsandbytes": Peer("bitsandbytes' formula", "torch", bitsandbytes),
    "reference": Peer("plain torch", "torch", reference),
}

# Kernel -> the peers that decode its format; the readable reference where there is none.
PEERS_OF: Mapping[str, tuple[str, ...]] = {
    "mxfp4": ("transformers", "compressed-tensors"),
    "nvfp4-ct": ("compressed-tensors",),
    "fp8-block": ("deepseek", "compressed-tensors"),
    "fp8-channel": ("compressed-tensors",),
    "fp8-tensor": ("compressed-tensors",),
    "mxfp8": ("compressed-tensors",),
    "packed-int": ("compressed-tensors",),
    "ggml": ("gguf-py",),
    "gptq": ("gptqmodel",),
    "awq": ("autoawq",),
    "nf4": ("bitsandbytes",),
}


def peers_of(case: Case) -> tuple[str, ...]:
    """Return the names of a case's peers."""
    return PEERS_OF.get(case.kernel, ("reference",))


def installed(names: tuple[str, ...]) -> list[Peer]:
    """Return the peers whose packages are there."""
    return [PEERS[name] for name in names if find_spec(PEERS[name].package) is not None]
