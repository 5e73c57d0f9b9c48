"""Which modules a config means: the matching of the tools that write it is the oracle."""

from __future__ import annotations

import copy
import fnmatch
import re
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match, match_name, match_targets
from transformers.quantizers.quantizers_utils import should_convert_module

from moeconv.quantization_names import FUSED, names_of, skip_names, spell, wildcard_names
from tests.quantization_configs import CT_CONFIG, load, read

MODULES = [
    "lm_head",
    "model.embed_tokens",
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.qkv_proj",
    "model.layers.0.mlp.gate",
    "model.layers.0.mlp.gate_proj",
    "model.layers.1.mlp.gate_up_proj",
    "model.layers.1.mlp.down_proj",
    "model.layers.10.mlp.down_proj",
    "model.layers.1.mlp.shared_experts.up_proj",
    "model.layers.1.mlp.experts.1.up_proj",
    "model.layers.1.mlp.experts.11.down_proj",
    "model.layers.1.block_sparse_moe.experts.2.w1",
    "model.layers.1.block_sparse_moe.gate",
    "model.visual.blocks.0.mlp.fc1",
    "mtp.layers.0.mlp.experts.0.gate_proj",
]
TARGETS = [
    "lm_head",
    "model.layers.0.mlp.gate",
    "model.layers.1.mlp.up_proj",
    "re:.*self_attn.*",
    "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
    "re:.*mlp\\.gate$",
    "re:model.layers.1",
    "re:layers",
    "re:^mtp\\.",
    "re:.*experts\\.(\\d)\\1\\..*",
    "re:(?i).*LM_HEAD",
    "re:.*(?P<which>up|down)_proj",
]


@pytest.mark.parametrize("target", TARGETS)
def test_names_match_as_in_compressed_tensors(target: str) -> None:
    fused = dict(FUSED)
    names = (
        names_of(patterns=(target.removeprefix("re:"),))
        if target.startswith("re:")
        else names_of(exact=(target,))
    )
    for module in MODULES:
        theirs = match_name(module, target) or match_name(module, target, fused)
        assert names.has(spell(module)) == theirs, module


def test_all_patterns_of_a_list_match_as_each_alone() -> None:
    patterns = [target.removeprefix("re:") for target in TARGETS if target.startswith("re:")]
    for keep in range(len(patterns)):
        some = patterns[keep:]
        names = names_of(patterns=some)
        for module in MODULES:
            spelled = spell(module)
            each = any(re.match(one, name) for one in some for name in spelled.names)
            assert names.has(spelled) == each, (some, module)


CT_FIXTURES = ["glm4moe-fp8-channel", "kimik2-int4-packed-g32", "mixtral-mxfp8-ct"]
ORACLE_CONFIGS = [
    CT_CONFIG,
    {**CT_CONFIG, "ignore": ["Linear"]},
    {**CT_CONFIG, "ignore": []},
    *(load(name)[0]["quantization_config"] for name in CT_FIXTURES),
]


@pytest.mark.parametrize("config", ORACLE_CONFIGS)
def test_schemes_are_those_of_compressed_tensors(config: dict[str, Any]) -> None:
    ours = read(config)
    known = copy.deepcopy(config)
    if "group_2" in known["config_groups"]:
        del known["config_groups"]["group_2"]["weights"]["actorder"]  # gone from 0.20
        known["config_groups"]["activations"].pop("input_activations")
    theirs = QuantizationConfig(**known)
    schemes = {target: one for one in theirs.config_groups.values() for target in one.targets}
    linear = torch.nn.Linear(1, 1)
    for module in MODULES:
        if spell(module).kind != "linear" or len(spell(module).names) > 1:
            continue
        matched = match_targets(module, linear, schemes)
        ignored = is_match(module, linear, theirs.ignore or [])
        weights = schemes[matched[0]].weights if matched and not ignored else None
        found = ours.scheme(module)
        assert (found.method == "") == (weights is None), module
        if weights is not None:
            for name in ("num_bits", "type", "strategy", "symmetric", "group_size"):
                assert found.values.get(name) == getattr(weights, name), (module, name)


SKIPS = ["model.layers.*.self_attn", "mlp.gate", "lm_head", "model.layers.1", "gate", "fc1",
         "model.visual", "model.layers.0.mlp", "mtp", "(model|mtp).layers.0"]  # fmt: skip


@pytest.mark.parametrize("entry", SKIPS)
def test_what_transformers_skips_is_skipped(entry: str) -> None:
    names = skip_names((entry,))
    for module in MODULES:
        skipped = not should_convert_module(module, [entry])
        segments = f".{entry}." in f".{module}."  # AutoAWQ's substring, at whole segments
        fused = any(
            not should_convert_module(one, [entry]) for one in spell(module).names if one != module
        )
        assert names.has(spell(module)) == (skipped or segments or fused), module


WILDCARDS = ["model.layers.1*", "*gate", "*self_attn*", "lm_head", "model.layers.?.mlp.gate*",
             "model.layers.1.mlp.experts", "model.layers.1.mlp.*"]  # fmt: skip


@pytest.mark.parametrize("entry", WILDCARDS)
def test_modelopt_wildcards_are_those_of_fnmatch(entry: str) -> None:
    names = wildcard_names((entry,))
    for module in MODULES:
        parts = module.split(".")
        above = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        expected = any(fnmatch.fnmatchcase(name, entry) for name in above)
        if len(spell(module).names) == 1:
            assert names.has(spell(module)) == expected, module
