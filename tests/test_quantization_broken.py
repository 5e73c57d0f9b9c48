"""Configs that contradict each other or hold what no format has: the error names the place."""

from __future__ import annotations

from typing import Any

import pytest

from moeconv.errors import BadSource
from moeconv.quantization import read_quantization
from tests.quantization_configs import (
    CT_CONFIG,
    CT_WEIGHTS,
    GPTQ,
    HF_QUANT,
    MIXED,
    MODELOPT,
    SCHEME,
    read,
)

GPTQ8 = {**GPTQ[1], "bits": 8}
CONTRADICTIONS = [
    ({"quantization_config": {"quant_method": "gptq", **GPTQ[1]}}, {"quantize_config.json": GPTQ8},
     "bits", "config.json: quantization_config and quantize_config.json"),
    ({"quantization_config": SCHEME}, {"hf_quant_config.json": HF_QUANT},
     "quant_method", "config.json: quantization_config and hf_quant_config.json"),
    ({"quantization_config": SCHEME, "text_config": {"quantization_config": {**SCHEME,
      "weight_block_size": [64, 64]}}}, {},
     "block_rows|block_cols", "config.json: quantization_config and config.json: text_config"),
    ({"quantization_config": {**MODELOPT}}, {"hf_quant_config.json": HF_QUANT},
     "quant_algo", "config.json: quantization_config and hf_quant_config.json"),
    ({"quantization_config": CT_CONFIG, "compression_config": {"config_groups": {"g": {
      "targets": ["Linear"], "weights": {**CT_WEIGHTS, "num_bits": 8}}}}}, {},
     "Linear.num_bits|Linear.symmetric", "config.json: quantization_config and config.json: comp"),
    ({"quantization_config": {"quant_method": "gptq", **GPTQ[1], "format": "gptq",
      "checkpoint_format": "gptq_v2"}}, {},
     "checkpoint_format", "config.json: quantization_config.checkpoint_format and config.json: "
     "quantization_config.format"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "files", "field", "where"), CONTRADICTIONS)
def test_contradictions_name_both_places(config: Any, files: Any, field: str, where: str) -> None:
    with pytest.raises(BadSource, match=f"contradictory config: ({field}) is") as caught:
        read_quantization(config, files)
    assert caught.value.where.startswith(where)
    assert caught.value.hint


def group(**weights: Any) -> dict[str, Any]:
    """Return a compressed-tensors config with one group of these weights."""
    groups = {"g": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "config_groups": groups}


MALFORMED = [
    ({"quant_method": "gptq", **GPTQ[1], "bits": "four"}, "bits", "'four'"),
    ({"quant_method": "gptq", **GPTQ[1], "bits": True}, "bits", "True"),
    ({"quant_method": "gptq", **GPTQ[1], "bits": 5}, "bits", "5"),
    ({"quant_method": "gptq", "group_size": 128}, "bits", "None"),
    ({"quant_method": "gptq", **GPTQ[1], "group_size": 0}, "group_size", "0"),
    ({"quant_method": "gptq", **GPTQ[1], "group_size": -2}, "group_size", "-2"),
    ({"quant_method": "gptq", **GPTQ[1], "sym": "yes"}, "sym", "'yes'"),
    ({"quant_method": "gptq", **GPTQ[1], "pack_dtype": "int64"}, "pack_dtype", "'int64'"),
    ({"quant_method": "gptq", **GPTQ[1], "dynamic": {".*": {"bits": "8"}}}, "bits", "'8'"),
    ({"quant_method": "gptq", **GPTQ[1], "dynamic": {"-:*": {}}}, "dynamic", "'*'"),
    ({"quant_method": "gptq", **GPTQ[1], "dynamic": [1]}, "dynamic", "[1]"),
    ({"quant_method": "awq", "bits": 4, "group_size": 1.5}, "group_size", "1.5"),
    ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size", "[128]"),
    ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "weight_block_size", "[0, 128]"),
    ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size", "128"),
    ({"quant_method": "fp8", "ignored_layers": "lm_head"}, "ignored_layers", "'lm_head'"),
    ({"quant_method": "modelopt", "quant_algo": "FP9"}, "quant_algo", "'FP9'"),
    ({**MIXED, "quantized_layers": {"a": 4}}, "a", "4"),
    (group(num_bits="4"), "num_bits", "'4'"),
    (group(num_bits=4, group_size=0), "group_size", "0"),
    (group(num_bits=4, type="complex"), "type", "'complex'"),
    (group(num_bits=4, strategy="rows"), "strategy", "'rows'"),
    (group(num_bits=8, block_structure=[128]), "block_structure", "[128]"),
    (group(num_bits=8, block_structure="128xy"), "block_structure", "'128xy'"),
    ({**CT_CONFIG, "format": "zip"}, "format", "'zip'"),
    ({**CT_CONFIG, "ignore": ["re:(mlp"]}, "ignore", "'(mlp'"),
    ({**CT_CONFIG, "config_groups": {"W4A16": ["Linear"]}}, "W4A16", "['Linear']"),
    ({"bits": 4}, "quant_method", "None"),
    ({"quant_method": 4}, "quant_method", "4"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "field", "value"), MALFORMED)
def test_malformed_fields_are_named(config: Any, field: str, value: str) -> None:
    with pytest.raises(BadSource) as caught:
        read(config)
    assert caught.value.what.startswith(f"{field} is {value}; expected")
    assert caught.value.where.startswith("config.json: quantization_config")


@pytest.mark.parametrize("config", [[1], "fp8", 3])
def test_a_config_that_is_no_object(config: Any) -> None:
    with pytest.raises(BadSource, match="quantization_config is"):
        read(config)


def test_unknown_methods_are_refused_with_the_known_ones() -> None:
    with pytest.raises(BadSource, match=r"'aqlm'.*known: awq, bitsandbytes, compressed-tensors"):
        read({"quant_method": "aqlm"})
    with pytest.raises(BadSource, match="MIXED_PRECISION without quantized_layers"):
        read({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"})
    with pytest.raises(BadSource, match="qformat_weight is 'nvfp4'"):
        read_quantization({"quantization": {"qformat_weight": "nvfp4"}}, {})
