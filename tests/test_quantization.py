"""What config files declare: the configs of real exports, and the shapes that formats have."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from moeconv.codecs.base import QuantScheme
from moeconv.quantization import read_quantization, strip_quantization, with_dtype
from tests.quantization_configs import (
    CT_CONFIG,
    CT_WEIGHTS,
    GPTQ,
    HF_QUANT,
    MIXED,
    MODELOPT,
    NATIVE,
    OLD_AWQ,
    SCHEME,
    load,
    read,
)

NONE = ("", {})


def ct(num_bits: int, kind: str, strategy: str, layout: str, **more: Any) -> tuple[str, Any]:
    values = {"num_bits": num_bits, "type": kind, "strategy": strategy, "format": layout}
    return "compressed-tensors", {**values, "symmetric": True, **more}


BLOCK = ("fp8", {"fmt": "e4m3", "block_rows": 128, "block_cols": 128})
V4 = ("fp8", {**BLOCK[1], "scale_fmt": "ue8m0", "expert_dtype": "fp4"})
GPTQ_FILE = ("gptq", {**GPTQ[1], "checkpoint_format": "gptq", "pack_dtype": "int32"})
AWQ = {"bits": 4, "group_size": 32, "zero_point": True, "version": "gemm", "pack_dtype": "int32"}
CHANNEL = ct(8, "float", "channel", "float-quantized")
KIMI = ct(4, "int", "group", "pack-quantized", group_size=32)
MXFP8 = ct(8, "float", "group", "mxfp8-quantized", group_size=32)
NVFP4 = ct(4, "float", "tensor_group", "nvfp4-pack-quantized", group_size=16)
MODELOPT_FP8 = ("modelopt", {"quant_algo": "FP8"})
MODELOPT_FP4 = ("modelopt", {"quant_algo": "NVFP4", "group_size": 16})
P1 = "model.layers.0.mlp.experts.0.gate_proj"
P2 = "model.layers.0.block_sparse_moe.experts.0.w1"
QUERY = "model.layers.0.self_attn.q_proj"

# checkpoint: expert, its scheme, attention, its scheme, the scheme of lm_head
FIXTURES = {
    "deepseekv3-bf16-mtp": (P1, NONE, QUERY, NONE, NONE),
    "deepseekv3-fp8-block128": (P1, BLOCK, QUERY, BLOCK, BLOCK),
    "deepseekv4-mxfp4": ("layers.0.ffn.experts.0.w1", V4, "layers.0.attn.wq_a", V4, V4),
    "gguf-gptoss-mxfp4": ("model.layers.0.mlp.experts", NONE, QUERY, NONE, NONE),
    "gguf-qwen3moe-bf16": (P1, NONE, QUERY, NONE, NONE),
    "gguf-qwen3moe-q4_k_m": (P1, NONE, QUERY, NONE, NONE),
    "gguf-qwen3moe-q8_0": (P1, NONE, QUERY, NONE, NONE),
    "glm4moe-fp8-channel": (P1, CHANNEL, QUERY, CHANNEL, NONE),
    "gptoss-bf16": ("model.layers.0.mlp.experts", NONE, QUERY, NONE, NONE),
    "gptoss-mxfp4": ("model.layers.0.mlp.experts", ("mxfp4", {}), QUERY, NONE, NONE),
    "kimik2-int4-packed-g32": (P1, KIMI, QUERY, NONE, NONE),
    "mixtral-bf16": (P2, NONE, QUERY, NONE, NONE),
    "mixtral-fp8-tensor-modelopt": (P2, MODELOPT_FP8, QUERY, MODELOPT_FP8, NONE),
    "mixtral-mxfp8-ct": (P2, MXFP8, QUERY, NONE, NONE),
    "qwen35moe-vl-bf16-packed": ("model.language_model.layers.0.mlp", NONE, QUERY, NONE, NONE),
    "qwen3moe-awq-int4-g32": (P1, ("awq", AWQ), QUERY, ("awq", AWQ), NONE),
    "qwen3moe-bf16": (P1, NONE, QUERY, NONE, NONE),
    "qwen3moe-gptq-int4-g128": (P1, GPTQ_FILE, QUERY, GPTQ_FILE, NONE),
    "qwen3moe-nvfp4-ct": (P1, NVFP4, QUERY, NONE, NONE),
    "qwen3moe-nvfp4-modelopt-dev": (P1, MODELOPT_FP4, QUERY, MODELOPT_FP4, NONE),
}


@pytest.mark.parametrize("name", FIXTURES)
def test_real_configs(name: str) -> None:
    expert, expert_scheme, attention, attention_scheme, head = FIXTURES[name]
    found = read_quantization(*load(name))
    assert found.scheme(expert) == expert_scheme
    assert found.scheme(attention) == attention_scheme
    assert found.scheme("lm_head") == head
    assert (found.summary == "none") == (expert_scheme == NONE)
    assert found.method == expert_scheme[0]


CT_ASYM = (
    "compressed-tensors",
    {**CT_WEIGHTS, "symmetric": False, "format": "pack-quantized"},
)
CT_BLOCK = ct(8, "float", "block", "float-quantized", block_rows=64, block_cols=128)
CT_ORDERED = ct(4, "int", "group", "pack-quantized", group_size=32, actorder="group")
GPTQ_DYNAMIC = {
    "quant_method": "gptq",
    **GPTQ[1],
    "dynamic": {
        r"-:.*\.layers\.0\..*q_proj": {},
        r"+:.*q_proj": {"bits": 8, "group_size": 64},
        r".*\.layers\.1\.": {"desc_act": True, "adapter": {"rank": 512}},
        r"layers\.2": {"bits": 2},  # not from the start of the name: matches nothing
    },
    "lm_head": False,
    "meta": {"quantizer": ["gptqmodel:7.7.0"]},
}
VL = "language_model.model.layers.0.mlp.experts.3.gate_proj"
VERBATIM = [
    ({"quant_method": "fp8", "weight_block_size": None}, P1, ("fp8", {})),
    ({"quant_method": "fp8", "weight_block_size": [64, 32], "scale_fmt": "ue8m0"}, P1,
     ("fp8", {"block_rows": 64, "block_cols": 32, "scale_fmt": "ue8m0"})),
    ({**BLOCK[1], "quant_method": "fp8", "weight_block_size": [128, 128],
      "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"]},
     "model.layers.0.block_sparse_moe.gate", NONE),
    ({"quant_method": "fp8", "ignored_layers": ["model.layers.0.mlp"]}, P1, NONE),
    ({"quant_method": "fp8", "ignored_layers": ["model.layers.0.mlp"]}, P1.replace("0", "10"),
     ("fp8", {})),
    ({"quant_method": "fp8", "expert_dtype": "fp4"}, P1, ("fp8", {"expert_dtype": "fp4"})),
    ({"quant_method": "mxfp8", "weight_block_size": [1, 32]}, P1,
     ("mxfp8", {"block_rows": 1, "block_cols": 32})),
    ({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}, QUERY,
     NONE),
    ({"quant_method": "mxfp4", "modules_to_not_convert": ["*.self_attn*"]}, QUERY, NONE),
    (CT_CONFIG, P1, CT_ASYM),
    (CT_CONFIG, QUERY, CT_BLOCK),
    (CT_CONFIG, "model.layers.1.mlp.down_proj", CT_BLOCK),  # an exact name beats a regex
    (CT_CONFIG, "model.layers.0.mlp.experts.5.down_proj", CT_ORDERED),
    (CT_CONFIG, "model.layers.0.mlp.gate", NONE),
    (CT_CONFIG, "model.layers.0.mlp.up_proj", NONE),
    (CT_CONFIG, "model.layers.0.mlp.k_norm_proj", NONE),
    (CT_CONFIG, "model.embed_tokens", NONE),
    (CT_CONFIG, "model.layers.0.input_layernorm", NONE),
    ({**CT_CONFIG, "format": "mixed-precision"}, P1, (CT_ASYM[0], {
        name: value for name, value in CT_ASYM[1].items() if name != "format"})),
    ({**CT_CONFIG, "format": "dense"}, P1, (CT_ASYM[0], {**CT_ASYM[1], "format": "dense"})),
    ({"quant_method": "gptq", **GPTQ[1], "format": "gptq_v2"}, P1,
     ("gptq", {**GPTQ[1], "checkpoint_format": "gptq_v2"})),
    ({"quant_method": "gptq", **GPTQ[1], "group_size": -1, "lm_head": True}, "lm_head",
     ("gptq", {**GPTQ[1], "group_size": -1})),
    (GPTQ_DYNAMIC, QUERY, NONE),
    (GPTQ_DYNAMIC, QUERY.replace("0", "1"), ("gptq", {**GPTQ[1], "bits": 8, "group_size": 64})),
    (GPTQ_DYNAMIC, P1.replace("layers.0", "layers.1"), ("gptq", {**GPTQ[1], "desc_act": True})),
    (GPTQ_DYNAMIC, P1.replace("layers.0", "layers.2"), GPTQ),
    (GPTQ_DYNAMIC, "lm_head", NONE),
    ({"quant_method": "awq", "bits": 4, "q_group_size": 128, "zero_point": True, "version": "GEMM",
      "modules_to_not_convert": ["gate"]}, P2,
     ("awq", {"bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"})),
    ({"quant_method": "awq", "bits": 4, "group_size": 128, "modules_to_not_convert": ["gate"]},
     "model.layers.0.block_sparse_moe.gate", NONE),
    ({"quant_method": "awq", "bits": 4, "group_size": 128, "modules_to_not_convert": ["gate"]},
     P1, ("awq", {"bits": 4, "group_size": 128})),
    ({**MODELOPT, "group_size": 16, "exclude_modules": ["model.layers.0.self_attn*"]}, QUERY, NONE),
    ({**MODELOPT, "ignore": ["model.layers.0.mlp.gate"]}, P1, MODELOPT_FP4),
    ({**MODELOPT, "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32}}}}, P1,
     ("modelopt", {"quant_algo": "NVFP4", "group_size": 32})),
    ({**MODELOPT, "quant_algo": "fp8_pb_wo"}, P1,
     ("modelopt", {"quant_algo": "FP8_PB_WO", "block_rows": 128, "block_cols": 128})),
    ({**MODELOPT, "quant_algo": None, "kv_cache_quant_algo": "FP8"}, P1, NONE),
    (MIXED, QUERY, MODELOPT_FP8),
    (MIXED, P1, MODELOPT_FP4),
    (MIXED, "model.layers.0.mlp.experts.1.gate_proj", ("modelopt", {
        "quant_algo": "W4A16_AWQ", "group_size": 64, "has_zero_point": False,
        "pre_quant_scale": True})),
    (MIXED, "model.layers.0.self_attn.o_proj", NONE),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
      "llm_int8_skip_modules": ["lm_head"], "llm_int8_threshold": 6.0}, P1,
     ("bitsandbytes", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})),
    ({"quant_method": "none"}, P1, NONE),
    # a config's own prefix need not be the checkpoint's
    ({**CT_CONFIG, "ignore": [VL.replace("language_model.model", "model.language_model")]}, VL,
     NONE),
    ({**CT_CONFIG, "ignore": ["re:model\\.layers\\.0\\.mlp"]}, VL, NONE),
    ({**MODELOPT, "exclude_modules": ["model.layers.0*"]}, VL, NONE),
    ({**MODELOPT, "exclude_modules": ["lm_head"]}, "language_model.lm_head", NONE),
    ({"quant_method": "fp8", "modules_to_not_convert": ["model.layers.0.mlp"]}, VL, NONE),
]  # fmt: skip


@pytest.mark.parametrize(("config", "module", "expected"), VERBATIM)
def test_declared_scheme(config: dict[str, Any], module: str, expected: QuantScheme) -> None:
    before = copy.deepcopy(config)
    assert read(config).scheme(module) == expected
    assert config == before


BARE_BLOCK = ("fp8", {"block_rows": 128, "block_cols": 128})
PLACED = [
    ({}, {"hf_quant_config.json": HF_QUANT}, MODELOPT_FP8),
    ({}, {"quantize_config.json": GPTQ[1]}, GPTQ),
    ({}, {"quant_config.json": OLD_AWQ},
     ("awq", {"bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"})),
    ({"dim": 8}, {"params.json": {"quantization": NATIVE}}, ("fp8", {})),
    ({"dim": 8, "quantization": NATIVE}, {}, ("fp8", {})),
    ({"dim": 8}, {"params.json": {"quantization_config": SCHEME}}, BARE_BLOCK),
    ({"text_config": {"quantization_config": SCHEME}}, {}, BARE_BLOCK),
    ({"text_config": {"quantization_config": SCHEME}, "quantization_config": SCHEME}, {},
     BARE_BLOCK),
    ({"quantization_config": {"quant_method": "fp8", "weight_block_size": None}},
     {"params.json": {"quantization": NATIVE}}, ("fp8", {})),
    ({"compression_config": {"config_groups": CT_CONFIG["config_groups"], "ignore": None}}, {},
     (CT_ASYM[0], {name: value for name, value in CT_ASYM[1].items() if name != "format"})),
    ({"expert_dtype": "fp4", "quantization_config": SCHEME}, {},
     ("fp8", {**BARE_BLOCK[1], "expert_dtype": "fp4"})),
    ({"quantization_config": {**MODELOPT, "quant_algo": "MIXED_PRECISION"}},
     {"hf_quant_config.json": {"quantization": MIXED}}, MODELOPT_FP4),
    ({"quantization_config": None, "text_config": {}}, {"tokenizer.json": {}}, NONE),
]  # fmt: skip


@pytest.mark.parametrize(("config", "files", "expected"), PLACED)
def test_every_place(config: Any, files: Any, expected: QuantScheme) -> None:
    assert read_quantization(config, files).scheme(P1) == expected


def test_summary_says_what_and_where() -> None:
    text = read(CT_CONFIG).summary
    assert text.startswith("compressed-tensors: ") and "num_bits=4" in text
    assert "not quantized: lm_head, re:.*mlp\\.gate$" in text
    assert text.endswith("(config.json: quantization_config)")
    many = {"quant_method": "fp8", "ignored_layers": [f"layer.{index}" for index in range(9)]}
    assert "layer.5 and 3 more" in read(many).summary


def test_strip_quantization_leaves_the_rest() -> None:
    config = {
        "model_type": "kimi_k25",
        "quantization_config": SCHEME,
        "compression_config": CT_CONFIG,
        "quantization": NATIVE,
        "expert_dtype": "fp4",
        "text_config": {"hidden_size": 8, "quantization_config": SCHEME},
        "vision_config": {"quantization_config": SCHEME, "depth": 2},
        "rope_config": None,
    }
    before = copy.deepcopy(config)
    stripped = strip_quantization(config)
    assert stripped == {
        "model_type": "kimi_k25",
        "text_config": {"hidden_size": 8},
        "vision_config": {"depth": 2},
        "rope_config": None,
    }
    stripped["text_config"]["hidden_size"] = 9
    assert config == before


DTYPES = [
    ({}, {"torch_dtype": "float16"}),
    ({"dtype": "bfloat16"}, {"dtype": "float16"}),
    ({"torch_dtype": "bfloat16"}, {"torch_dtype": "float16"}),
    ({"dtype": "x", "torch_dtype": "y"}, {"dtype": "float16", "torch_dtype": "float16"}),
    ({"text_config": {"dtype": "x"}, "dtype": "x"},
     {"text_config": {"dtype": "float16"}, "dtype": "float16"}),
    ({"text_config": {"a": 1}}, {"text_config": {"a": 1}, "torch_dtype": "float16"}),
    ({"vision_config": {"dtype": "x"}}, {"vision_config": {"dtype": "x"},
     "torch_dtype": "float16"}),
]  # fmt: skip


@pytest.mark.parametrize(("config", "expected"), DTYPES)
def test_with_dtype(config: dict[str, Any], expected: dict[str, Any]) -> None:
    before = copy.deepcopy(config)
    assert with_dtype(config, "float16") == expected
    assert config == before
