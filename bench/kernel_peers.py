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


def reference(case: Case, tile: Tile) -> Run:
    """Return the plain torch of moeconv/codecs, rounded by torch."""
    parts = tensors_of(case)
    window = Window(0, tile.rows, 0, tile.cols)
    codec = CODECS[case.kernel]
    return lambda: codec.decode(parts, window, case.params).to(torch.bfloat16)


class Peer(NamedTuple):
    """A peer: the package that it needs, and what makes its run."""

    title: str
    package: str
    make: Callable[[Case, Tile], Run]


PEERS: Mapping[str, Peer] = {
    "compressed-tensors": Peer("compressed-tensors", "compressed_tensors", compressed_tensors),
    "transformers": Peer("transformers", "transformers", transformers),
    "gguf-py": Peer("gguf-py", "gguf", gguf_py),
    "reference": Peer("plain torch", "torch", reference),
}

# Kernel -> the peers that decode its format; the readable reference where there is none.
PEERS_OF: Mapping[str, tuple[str, ...]] = {
    "mxfp4": ("transformers", "compressed-tensors"),
    "nvfp4-ct": ("compressed-tensors",),
    "fp8-block": ("compressed-tensors",),
    "fp8-channel": ("compressed-tensors",),
    "fp8-tensor": ("compressed-tensors",),
    "mxfp8": ("compressed-tensors",),
    "packed-int": ("compressed-tensors",),
    "ggml": ("gguf-py",),
}


def peers_of(case: Case) -> tuple[str, ...]:
    """Return the names of a case's peers."""
    return PEERS_OF.get(case.kernel, ("reference",))


def installed(names: tuple[str, ...]) -> list[Peer]:
    """Return the peers whose packages are there."""
    return [PEERS[name] for name in names if find_spec(PEERS[name].package) is not None]
