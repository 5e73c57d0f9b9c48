"""Names -> groups: the parts of a weight together, whatever is only called like a part alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from moeconv.errors import IncompleteModel, UnrecognizedTensor
from moeconv.families.base import Family
from moeconv.families.tables import FAMILIES
from moeconv.grouping import LayerName, Matcher, group_tensors, split_layer
from moeconv.types import TensorRef

BY_NAME = {family.name: family for family in FAMILIES}


def refs(names: Sequence[str]) -> dict[str, TensorRef]:
    return {name: TensorRef(name, "BF16", (4, 4), "m.safetensors", 0, 32) for name in names}


@pytest.mark.parametrize(
    ("name", "stack", "layer", "rest"),
    [
        ("model.layers.3.mlp.gate.weight", "model.layers", 3, "mlp.gate.weight"),
        ("layers.0.ffn.gate.bias", "layers", 0, "ffn.gate.bias"),
        ("mtp.0.enorm.weight", "mtp", 0, "enorm.weight"),
        ("mtp.layers.1.mlp.gate.weight", "mtp.layers", 1, "mlp.gate.weight"),
        ("model.mtp_block.0.norm.weight", "model.mtp_block", 0, "norm.weight"),
        ("block.11.attn.sinks", "block", 11, "attn.sinks"),
        ("transformer.blocks.2.ffn.x", "transformer.blocks", 2, "ffn.x"),
        ("model.layers.2.mlps.1.up_proj.weight", "model.layers", 2, "mlps.1.up_proj.weight"),
        ("model.norm.weight", "", None, "model.norm.weight"),
        ("model.layers.03.x", "", None, "model.layers.03.x"),
    ],
)
def test_a_name_gives_its_place(name: str, stack: str, layer: int | None, rest: str) -> None:
    assert split_layer(name) == LayerName(stack, layer, rest)


@pytest.mark.parametrize(
    ("family", "rest", "part", "expert", "projection"),
    [
        ("mixtral", "block_sparse_moe.experts.7.w1.weight_scale", "weight_scale", 7, "w1"),
        ("qwen3_moe", "mlp.experts.12.up_proj.qweight", "qweight", 12, "up_proj"),
        ("qwen3_moe", "mlp.experts.12.up_proj.bias", "bias", 12, "up_proj"),
        ("gpt_oss", "mlp.experts.gate_up_proj_blocks", "blocks", None, "gate_up_proj"),
        ("gpt_oss", "mlp.experts.down_proj_bias", "bias", None, "down_proj"),
        ("gpt_oss", "mlp.experts.down_proj", "weight", None, "down_proj"),
        ("qwen3_vl_moe", "mlp.experts.down_proj_scale_inv", "weight_scale_inv", None, "down_proj"),
        (
            "llama4",
            "feed_forward.experts.gate_up_proj_input_scale",
            "input_scale",
            None,
            "gate_up_proj",
        ),
        ("gpt_oss_original", "mlp.mlp1_weight.scales", "scales", None, "mlp1_weight"),
        ("gpt_oss_original", "mlp.mlp2_bias", "bias", None, "mlp2"),
        ("aria", "mlp.experts.fc1.weight", "weight", None, "fc1"),
        ("dbrx", "ffn.experts.mlp.v1", "weight", None, "v1"),
    ],
)
def test_rules_take_names_apart(
    family: str, rest: str, part: str, expert: int | None, projection: str
) -> None:
    match = Matcher(BY_NAME[family]).match(rest)
    assert match is not None
    assert (match.part, match.expert, match.projection) == (part, expert, projection)
    assert rest.startswith(match.base)
    assert match.base.endswith(projection)


@pytest.mark.parametrize(
    ("family", "rest"),
    [
        ("qwen3_moe", "mlp.shared_expert.up_proj.weight"),
        ("qwen3_moe", "mlp.experts.01.up_proj.weight"),
        ("qwen3_moe", "mlp.experts.1.upper_proj.weight"),
        ("qwen3_moe", "mlp.experts.1.up_proj.weight.more"),
        ("qwen3_moe", "block_sparse_moe.experts.1.w1.weight"),
        ("gpt_oss", "mlp.experts.gate_up_proj_scale"),
        ("dbrx", "ffn.experts.mlp.w3"),
    ],
)
def test_other_names_match_nothing(family: str, rest: str) -> None:
    assert Matcher(BY_NAME[family]).match(rest) is None


def test_every_tensor_is_in_one_group() -> None:
    family: Family = BY_NAME["qwen3_moe"]
    names = [
        "model.layers.0.mlp.experts.0.up_proj.weight",
        "model.layers.0.mlp.experts.0.up_proj.weight_scale",
        "model.layers.0.mlp.experts.0.up_proj.input_scale",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.k_scale",
        "model.layers.0.mlp.gate.weight",
        "model.norm.weight",
    ]
    experts, others = group_tensors(refs(names), family, quantized=True)
    (expert,) = experts
    assert set(expert.parts) == {"weight", "weight_scale"}
    assert [ref.name for ref in expert.activations] == [names[2]]
    found = [ref.name for g in others for ref in (*g.parts.values(), *g.activations)]
    assert sorted(found) == sorted(names[3:])


def test_parameters_called_like_parts_stand_alone() -> None:
    names = ["model.layers.0.router.scale", "model.layers.0.attn.k_scale", "norm.scale"]
    _, others = group_tensors(refs(names), BY_NAME["gemma4"], quantized=False)
    assert sorted(next(iter(group.parts.values())).name for group in others) == sorted(names)
    assert all(set(group.parts) == {"weight"} for group in others)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight_scale_inv",
        "model.layers.0.mlp.experts.0.up_proj.weight_scale",
        "model.layers.0.mlp.experts.0.up_proj.qzeros",
        "lm_head.qzeros",
    ],
)
def test_scales_without_a_weight_are_refused(name: str) -> None:
    with pytest.raises(IncompleteModel, match="has no weight"):
        group_tensors(refs([name]), BY_NAME["qwen3_moe"], quantized=True)


def test_one_part_under_two_names_is_refused() -> None:
    names = ["model.layers.0.mlp.experts.down_proj", "model.layers.0.mlp.experts.down_proj.weight"]
    with pytest.raises(UnrecognizedTensor, match="the same part 'weight'"):
        group_tensors(refs(names), BY_NAME["qwen3_5_moe"], quantized=False)


def test_attention_experts_are_carried_where_the_family_says_so() -> None:
    name = "model.layers.0.self_attention.experts.input_linear.weight"
    _, others = group_tensors(refs([name]), BY_NAME["jetmoe"], quantized=False)
    assert [group.name for group in others] == [name.removesuffix(".weight")]
    with pytest.raises(UnrecognizedTensor, match="matches no rule of family 'granitemoe'"):
        group_tensors(refs([name]), BY_NAME["granitemoe"], quantized=False)
