"""Missing pieces: every kind of hole in a model is found and named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from moeconv.errors import BadSource, IncompleteModel, ShapeMismatch
from moeconv.model import build_model
from tests.families.sources import Names, read_names, source_of

HUB: dict[str, Any] = json.loads((Path(__file__).parent / "fixtures/hub_names.json").read_text())


def names_of(case: str) -> Names:
    return read_names(HUB[case], HUB[case]["experts"])


class Hole(NamedTuple):
    """Every tensor whose name holds one of `gone` is taken away; `says` is what remains to tell."""

    why: str
    case: str
    gone: tuple[str, ...]
    says: str


HOLES = (
    Hole(
        "the first expert",
        "dots1",
        ("layers.2.mlp.experts.0.",),
        "layer 2 has 4 experts, but no '(gate|up|down)' of expert 0",
    ),
    Hole("a middle one", "dots1", ("layers.2.mlp.experts.2.",), "of expert 2"),
    Hole(
        "the last one of a layer",
        "dots1",
        ("layers.3.mlp.experts.3.",),
        "layer 3 has 3 experts; config.json says 4",
    ),
    Hole("the last one of every layer", "dots1", (".experts.3.",), "3 experts; config.json says 4"),
    Hole(
        "a projection of one expert",
        "dots1",
        ("layers.1.mlp.experts.1.up_proj",),
        "layer 1 has 4 experts, but no 'up' of expert 1",
    ),
    Hole(
        "a projection everywhere",
        "dots1",
        (".experts.0.gate_proj", ".experts.1.gate_proj", ".2.gate_proj", ".3.gate_proj"),
        "no 'gate' of expert 0, 1, 2, 3",
    ),
    Hole(
        "all experts of a layer",
        "dots1",
        ("layers.2.mlp.experts.",),
        "layer 2 has neither experts nor a dense mlp.down_proj",
    ),
    Hole(
        "the dense part of a layer",
        "dots1",
        ("layers.0.mlp.",),
        "layer 0 has neither experts nor a dense mlp.down_proj",
    ),
    Hole("a layer", "dots1", ("layers.3.",), "config.json says 4 layers; no tensor of layer 3"),
    Hole("all experts", "dots1", (".experts.",), "no expert tensors"),
    Hole(
        "an expert of an MTP layer",
        "deepseek_v3-fp8-mtp",
        ("layers.2.mlp.experts.1.",),
        "layer 2 of mtp has 4 experts, but no",
    ),
    Hole(
        "a packed tensor",
        "qwen3_vl_moe-hub",
        ("layers.1.mlp.experts.down_proj",),
        "no 'down' of expert 0, 1, 2, 3",
    ),
    Hole(
        "the biases of a layer",
        "gpt_oss-per-expert",
        ("layers.1.mlp.experts.0.up_proj.bias",),
        "no 'up.bias' of expert 0",
    ),
    Hole("a bias everywhere", "gpt_oss_original", ("mlp1_bias",), "no '(gate|up).bias' of expert"),
    Hole("up where there is no gate", "nemotron_h-latent", ("2.up_proj",), "no 'up' of expert 2"),
)


@pytest.mark.parametrize("hole", HOLES, ids=lambda hole: hole.why)
def test_holes_are_named(hole: Hole, tmp_path: Path) -> None:
    names = names_of(hole.case)
    left = {
        name: what
        for name, what in names.tensors.items()
        if not any(gone in name for gone in hole.gone)
    }
    assert len(left) < len(names.tensors)
    with pytest.raises(IncompleteModel, match=hole.says):
        build_model(source_of(names._replace(tensors=left), tmp_path))


def test_layers_may_not_differ_in_what_experts_have(tmp_path: Path) -> None:
    """Some GPTQ tools write a bias of zeros beside every weight: then it is one of them."""
    names = names_of("dots1")
    base = "model.layers.{}.mlp.experts.{}.up_proj.bias"
    biases = {
        base.format(layer, expert): ("BF16", (48,)) for layer in (1, 2, 3) for expert in range(4)
    }
    whole = names._replace(tensors={**names.tensors, **biases})
    model = build_model(source_of(whole, tmp_path))
    assert sum(key.name == "up.bias" for key in model.places) == 12
    del biases[base.format(2, 1)]
    with pytest.raises(IncompleteModel, match=r"layer 2 has 4 experts, but no 'up.bias' of"):
        build_model(source_of(names._replace(tensors={**names.tensors, **biases}), tmp_path))
    kept = {name: what for name, what in biases.items() if ".layers.2." not in name}
    with pytest.raises(IncompleteModel, match=r"layer 2 have no 'up.bias', which those of layer 1"):
        build_model(source_of(names._replace(tensors={**names.tensors, **kept}), tmp_path))


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("up_proj.weight", (40, 64), "projections disagree"),
        ("down_proj.weight", (64, 40), "projections disagree"),
        ("down_proj.weight", (48, 64), "expected R C"),
        ("up_proj.bias", (47,), "projections disagree"),
    ],
)
def test_projections_that_disagree_are_refused(
    name: str, shape: tuple[int, ...], says: str, tmp_path: Path
) -> None:
    names = names_of("gpt_oss-per-expert")
    tensors = {**names.tensors, f"model.layers.1.mlp.experts.2.{name}": ("BF16", shape)}
    with pytest.raises(ShapeMismatch, match=says) as raised:
        build_model(source_of(names._replace(tensors=tensors), tmp_path))
    assert "expert 2" in str(raised.value) or "experts.2" in str(raised.value)


def test_experts_of_two_kinds_have_their_own_sizes(tmp_path: Path) -> None:
    names = names_of("ernie4_5_vl_moe")
    assert set(build_model(source_of(names, tmp_path)).expert_layers.values()) == {8}
    config = {**names.config, "moe_intermediate_size": [48, 40]}
    with pytest.raises(BadSource, match=r"expert 4: intermediate size is 32; .* 48 or 40"):
        build_model(source_of(names._replace(config=config), tmp_path))


def test_a_layer_without_its_second_kind_of_experts_is_refused(tmp_path: Path) -> None:
    names = names_of("ernie4_5_vl_moe")
    gone = tuple(f"layers.1.mlp.experts.{expert}." for expert in range(4, 8))
    left = {n: what for n, what in names.tensors.items() if not any(g in n for g in gone)}
    with pytest.raises(IncompleteModel, match=r"layer 1 has 4 experts, layer 0 has 8"):
        build_model(source_of(names._replace(tensors=left), tmp_path))


def test_more_experts_than_declared_are_refused(tmp_path: Path) -> None:
    names = names_of("dots1")
    config = {**names.config, "n_routed_experts": 3}
    with pytest.raises(IncompleteModel, match=r"has 4 experts; config.json says 3"):
        build_model(source_of(names._replace(config=config), tmp_path))
