"""Configs that several tests of quantization read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeconv.quantization import Quantization, read_quantization

CHECKPOINTS = Path(__file__).parent / "fixtures" / "checkpoints"
GPTQ = ("gptq", {"bits": 4, "group_size": 128, "desc_act": False, "sym": True})
CT_WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
CT_CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {**CT_WEIGHTS, "symmetric": False}},
        "group_1": {
            "targets": ["re:.*self_attn.*", "model.layers.1.mlp.down_proj"],
            "format": "float-quantized",
            "weights": {
                "num_bits": 8,
                "type": "float",
                "strategy": "block",
                "block_structure": [64, 128],
            },
        },
        "group_2": {"targets": ["re:.*down_proj$"], "weights": {**CT_WEIGHTS, "actorder": "group"}},
        "activations": {"targets": ["re:.*k_norm_proj"], "weights": None, "input_activations": {}},
    },
    "ignore": ["lm_head", "re:.*mlp\\.gate$", "model.layers.0.mlp.up_proj"],
    "quantization_status": "compressed",
}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
MIXED = {
    **MODELOPT,
    "quant_algo": "MIXED_PRECISION",
    "quantized_layers": {
        "model.layers.0.self_attn.q_proj": {"quant_algo": "FP8"},
        "model.layers.0.mlp.experts": {"quant_algo": "NVFP4", "group_size": 16},
        "model.layers.0.mlp.experts.1.gate_proj": {
            "quant_algo": "W4A16_AWQ",
            "group_size": 64,
            "has_zero_point": False,
            "pre_quant_scale": True,
        },
    },
}
HF_QUANT = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
OLD_AWQ = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
NATIVE = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}
SCHEME = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def load(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the config and the other JSON files of a fixture checkpoint."""
    files = {p.name: json.loads(p.read_text()) for p in (CHECKPOINTS / name).glob("*config.json")}
    config = files.pop("config.json", None) or files.pop("hf_config.json")
    return config, files


def read(quantization: Mapping[str, Any]) -> Quantization:
    """Return the quantization of a config that holds this quantization_config."""
    return read_quantization({"quantization_config": quantization}, {})
