"""Options of the vllm layout: padding, placements, partial outputs, experts without a gate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moeconv
import moeconv.api as api
from moeconv.errors import Refused
from moeconv.layouts.options import Options
from moeconv.layouts.vllm_experts import expert_facts
from moeconv.layouts.vllm_split import View
from tests.checkpoints import Size, write_checkpoint

FIXTURES = Path(__file__).parents[1] / "fixtures"
STATES = FIXTURES / "vllm"
CHECKPOINTS = FIXTURES / "checkpoints"


def convert(source: Path, out: Path, **options: Any) -> list[dict[str, torch.Tensor]]:
    """Return each rank's tensors of a vllm output, which verifies against its source."""
    api.convert(api.plan(source, out, layout="vllm", **options), out)
    assert moeconv.verify(out, source=source).ok
    ranks = options.get("tp", 1) * options.get("dp", 1)
    return [load_file(out / f"model-rank-{rank}-part-0.safetensors") for rank in range(ranks)]


PREFIX = "model.layers.0.mlp.experts.routed_experts."


@pytest.mark.parametrize("tp", [1, 2])
def test_padding_goes_behind_each_half_and_the_hidden_size(tp: int, tmp_path: Path) -> None:
    source = STATES / "qwen3_moe" / "hf"
    config = json.loads((source / "config.json").read_text())
    inner, hidden = config["moe_intermediate_size"] // tp, config["hidden_size"]
    layer = next(  # the first layer with experts
        name.split(".")[2] for name in sorted(all_names(source)) if ".experts.0." in name
    )
    prefix = PREFIX.replace("layers.0", f"layers.{layer}")
    plain = convert(source, tmp_path / "plain", tp=tp)
    padded = convert(source, tmp_path / "padded", tp=tp, pad_intermediate=48, pad_hidden=96)
    for one, other in zip(plain, padded, strict=True):
        w13, w2 = other[prefix + "w13_weight"], other[prefix + "w2_weight"]
        grown, wide = -(-inner // 48) * 48, -(-hidden // 96) * 96
        assert w13.shape[1:] == (2 * grown, wide) and w2.shape[1:] == (wide, grown)
        before = one[prefix + "w13_weight"]
        expected = torch.zeros_like(w13)
        expected[:, :inner, :hidden] = before[:, :inner]
        expected[:, grown : grown + inner, :hidden] = before[:, inner:]
        assert torch.equal(w13, expected)
        expected = torch.zeros_like(w2)
        expected[:, :hidden, :inner] = one[prefix + "w2_weight"]
        assert torch.equal(w2, expected)
        changed = {name for name in one if not same(one[name], other[name])}
        assert all(".routed_experts." in name for name in changed)


def test_padding_covers_interleaved_biases(tmp_path: Path) -> None:
    source = STATES / "gpt_oss" / "hf"
    plain = convert(source, tmp_path / "plain", tp=2)
    padded = convert(source, tmp_path / "padded", tp=2, pad_intermediate=64, pad_hidden=96)
    for one, other in zip(plain, padded, strict=True):
        before, after = one[PREFIX + "w13_bias"], other[PREFIX + "w13_bias"]
        assert after.shape[1] == 128 and after.shape[1] > before.shape[1]
        assert torch.equal(after[:, : before.shape[1]], before)
        assert not after[:, before.shape[1] :].any()
        before, after = one[PREFIX + "w2_bias"], other[PREFIX + "w2_bias"]
        assert after.shape[1] == 96 and torch.equal(after[:, : before.shape[1]], before)
        assert not after[:, before.shape[1] :].any()


def test_kept_mxfp4_is_padded_with_whole_blocks(tmp_path: Path) -> None:
    source = STATES / "gpt_oss_mxfp4" / "hf"
    ranks = convert(source, tmp_path / "out", tp=2, dtype="keep", pad_intermediate=128)
    stored = load_file(source / "model.safetensors")
    blocks = stored["model.layers.0.mlp.experts.gate_up_proj_blocks"]
    experts, _, hidden, _ = blocks.shape
    taken = 0
    for tensors, columns in zip(ranks, (64, 32), strict=True):
        w13 = tensors[PREFIX + "w13_weight"]
        assert w13.shape == (experts, 2 * 128, hidden * 16)
        rows = blocks[:, taken : taken + 2 * columns].flatten(2)
        assert torch.equal(w13[:, : 2 * columns], rows) and not w13[:, 2 * columns :].any()
        scales = tensors[PREFIX + "w2_weight_scale"]
        assert scales.shape[2] == 4 and not scales[:, :, columns // 32 :].any()
        taken += 2 * columns


def test_layers_take_their_constants_along(tmp_path: Path) -> None:
    source = STATES / "mixtral" / "hf"
    count = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    for layer in range(count):
        (tensors,) = convert(source, tmp_path / str(layer), layers=(layer,))
        assert {name.split(".")[2] for name in tensors} == {str(layer)}
        assert any(name.endswith("._q_scale") for name in tensors)


def test_experts_by_layer_are_in_the_manifest(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "src", "qwen3moe", Size(experts=5)).root
    plan = api.plan(source, layout="vllm", dp=2, ep=True)
    assert plan.facts["experts"] == [[0, 1, 2], [3, 4]]
    assert "experts_by_layer" not in plan.facts
    plan = api.plan(source, layout="vllm", dp=2, ep=True, redundant_experts=3)
    assert plan.facts["experts"] == [[0, 1, 2, 3], [4, 0, 1, 2]]


REFUSED = [
    ({"ep": True, "dp": 2, "redundant_experts": 2, "placement": "round-robin"}, "linearly"),
    (
        {"ep": True, "redundant_experts": 1, "expert_map": ((0, 1, 2, 3),)},
        "beside an --expert-map",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_contradictory_placements_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = write_checkpoint(tmp_path / "src", "mixtral").root
    with pytest.raises(Refused, match=message) as caught:
        api.plan(source, layout="vllm", **options)
    assert caught.value.hint


def test_gptoss_with_more_ranks_than_kv_heads_is_said(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "src", "gptoss-mxfp4", Size(kv_heads=2)).root
    assert any("at most 2 ranks" in note for note in api.plan(source, layout="vllm", tp=4).notes)
    assert not any("at most" in note for note in api.plan(source, layout="vllm", tp=2).notes)
    assert not api.plan(source, layout="vllm", tp=4).facts["vllm_loads"]
    assert api.plan(source, layout="vllm", tp=2).facts["vllm_loads"]


NOTES = [
    ({"dp": 2}, "dp 1"),
    ({"ep": True, "dp": 2, "placement": "round-robin"}, "ignores it for this model"),
    ({"ep": True, "dp": 2, "redundant_experts": 2}, "num_redundant_experts 2"),
    ({"ep": True, "dp": 2, "expert_map": ((0, 1), (2, 3))}, "vLLM places experts itself"),
    ({"ep": True, "dp": 5}, "hold no expert"),
]


@pytest.mark.parametrize(("options", "note"), NOTES)
def test_notes_say_how_to_serve(options: dict[str, Any], note: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "src", "mixtral").root
    assert any(note in one for one in api.plan(source, layout="vllm", **options).notes)


def test_experts_without_a_gate_are_up_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    layer, tensors = "backbone.layers.0.mixer", {}
    for expert in range(3):
        tensors[f"{layer}.experts.{expert}.up_proj.weight"] = torch.randn(8, 16).bfloat16()
        tensors[f"{layer}.experts.{expert}.down_proj.weight"] = torch.randn(16, 8).bfloat16()
    source = tmp_path / "src"
    source.mkdir()
    config = {"model_type": "nemotron_h", "hidden_size": 16, "moe_intermediate_size": 8}
    config |= {"n_routed_experts": 3, "num_hidden_layers": 1, "torch_dtype": "bfloat16"}
    (source / "config.json").write_text(json.dumps(config))
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    ranks = convert(source, tmp_path / "out", tp=2, experts_only=True)
    for rank, found in enumerate(ranks):
        mine = slice(rank * 4, rank * 4 + 4)
        for expert in range(3):
            up = tensors[f"{layer}.experts.{expert}.up_proj.weight"]
            down = tensors[f"{layer}.experts.{expert}.down_proj.weight"]
            assert torch.equal(found[PREFIX + "w13_weight"][expert], up[mine])
            assert torch.equal(found[PREFIX + "w2_weight"][expert], down[:, mine])


CUT = [
    ("kimik2-int4-packed-g32", {"tp": 2}, "1 x 32", "1, 3"),
    ("qwen3moe-gptq-int4-g128", {"tp": 2, "experts_only": True}, "1 x 128", "1"),
    ("deepseekv3-fp8-block128", {}, "128 x 128 .* fused_qkv_a_proj", ""),
]


@pytest.mark.parametrize(("name", "options", "block", "works"), CUT)
def test_blocks_that_ranks_would_cut_are_refused(
    name: str, options: dict[str, Any], block: str, works: str
) -> None:
    with pytest.raises(Refused, match=block.replace(" .* ", r" \(rows.*")) as caught:
        api.plan(CHECKPOINTS / name, layout="vllm", dtype="keep", **options)
    assert "--dtype bf16 decodes it" in caught.value.hint
    assert caught.value.hint.endswith(f"with keep: {works}" if works else "any split")
    assert api.plan(CHECKPOINTS / name, layout="vllm", **options).files


def test_activation_order_is_refused(tmp_path: Path) -> None:
    source, torn = CHECKPOINTS / "qwen3moe-gptq-int4-g128", tmp_path / "src"
    torn.mkdir()
    tensors = load_file(source / "model.safetensors")
    torch.manual_seed(1)
    for name in [name for name in tensors if name.endswith(".g_idx")]:
        stem, columns = name.removesuffix("g_idx"), tensors[name].numel()
        for part in ("scales", "qzeros"):  # one group of 128 becomes groups of 16, all alike
            tensors[stem + part] = tensors[stem + part][:1].repeat(columns // 16, 1)
        groups = torch.arange(columns, dtype=torch.int32) // 16
        tensors[name] = groups[torch.randperm(columns)].contiguous()
    save_file(tensors, torn / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] |= {"group_size": 16, "desc_act": True}
    (torn / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refused, match="activation order") as caught:
        api.plan(torn, layout="vllm", dtype="keep")
    assert "--dtype bf16 decodes it" in caught.value.hint
    assert api.plan(torn, layout="vllm").files


def test_layers_may_have_different_numbers_of_experts() -> None:
    layers = {("main", 1): 4, ("main", 3): 2, ("mtp", 4): 4}
    view = View("mixtral", {}, layers, heads=1, kv_heads=1, layers=4, tied=False, config={})
    facts = expert_facts(view, Options(layout="vllm", tp=2, ep=True))
    assert facts["experts"] == [[0, 1], [2, 3]]
    assert facts["experts_by_layer"] == {"1": [[0, 1], [2, 3]], "3": [[0], [1]]}


def all_names(source: Path) -> list[str]:
    return list(load_file(source / "model.safetensors"))


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)
