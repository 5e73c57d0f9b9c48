"""Holes in what surrounds the experts: each is named, and no published form is taken for one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from moeconv.errors import BadSource, IncompleteModel, UnrecognizedTensor
from moeconv.layouts.options import Options
from moeconv.model import Model, build_model
from moeconv.plan import build_plan
from tests.families.sources import Names, source_of
from tests.families.test_families import names_of


class Hole(NamedTuple):
    """The tensors called `gone` are taken away; `says` is what remains to tell."""

    case: str
    gone: tuple[str, ...]
    says: str


def of_layers(name: str) -> tuple[str, ...]:
    return tuple(f"model.layers.{layer}.{name}.weight" for layer in range(4))


HOLES = (
    Hole("qwen3_moe", ("lm_head.weight",), "no output head"),
    Hole("qwen3_moe", ("model.norm.weight",), "no norm after the last layer"),
    Hole("qwen3_moe", ("model.embed_tokens.weight",), "no embedding"),
    Hole("cohere2_moe", ("model.embed_tokens.weight",), "no embedding"),
    Hole("nemotron_h", ("backbone.norm_f.weight",), "no norm after the last layer"),
    Hole("mistral4", ("model.layers.2.mlp.gate.weight",), "layer 2 has experts, but no router"),
    Hole("qwen3_moe", of_layers("mlp.gate"), "layer 0 has experts, but no router"),
    Hole(
        "longcat_flash",
        ("model.layers.1.mlp.router.classifier.weight",),
        "layer 1 has experts, but no router",
    ),
    Hole("qwen3_moe", of_layers("self_attn.q_proj"), "no 'self_attn.q_proj.weight'"),
    Hole("qwen3_moe", of_layers("self_attn.o_proj"), "no 'self_attn.o_proj.weight'"),
    Hole("qwen3_moe", of_layers("self_attn.k_norm"), "no 'self_attn.k_norm.weight'"),
    Hole("qwen3_moe", ("model.layers.0.self_attn.q_proj.weight",), "layer 0 has '"),
    Hole(
        "qwen3_moe",
        ("model.layers.1.self_attn.v_proj.weight",),
        "layer 1 has no 'self_attn.v_proj.weight', which layer 0 has",
    ),
    Hole(
        "qwen3_moe",
        ("model.layers.3.input_layernorm.weight",),
        "layer 3 has no 'input_layernorm.weight', which layer 0 has",
    ),
    Hole(
        "granitemoe",
        ("model.layers.3.input_layernorm.weight",),
        "layer 3 has no 'input_layernorm.weight', which layer 0 has",
    ),
)


def planned(names: Names, root: Path, **options: Any) -> Model:
    """Return the model after a conversion of it was planned."""
    model = build_model(source_of(names, root))
    build_plan(model, Options(**options))
    return model


def without(names: Names, gone: tuple[str, ...]) -> Names:
    left = {name: what for name, what in names.tensors.items() if name not in gone}
    assert len(left) == len(names.tensors) - len(gone)
    return names._replace(tensors=left)


@pytest.mark.parametrize("hole", HOLES, ids=lambda hole: f"{hole.case}-{hole.gone[0]}")
def test_holes_are_named(hole: Hole, tmp_path: Path) -> None:
    names = without(names_of(hole.case), hole.gone)
    with pytest.raises(IncompleteModel, match=hole.says) as raised:
        planned(names, tmp_path)
    assert raised.value.hint


def test_experts_alone_need_nothing_around_them(tmp_path: Path) -> None:
    names = without(names_of("qwen3_moe"), ("lm_head.weight", "model.norm.weight"))
    assert planned(names, tmp_path, experts_only=True)


def test_layers_of_kinds_that_the_config_names_may_differ(tmp_path: Path) -> None:
    """Gemma 4 has no v_proj in its global layers, of which a small model has one."""
    names = without(names_of("qwen3_moe"), ("model.layers.3.self_attn.v_proj.weight",))
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    names = names._replace(config={**names.config, "layer_types": kinds})
    assert planned(names, tmp_path).expert_layers


def test_more_layers_than_the_config_says_are_refused(tmp_path: Path) -> None:
    names = names_of("qwen3_moe")
    config = {**names.config, "num_hidden_layers": 3}
    with pytest.raises(BadSource, match="says 3 layers; the files have layer 3"):
        planned(names._replace(config=config), tmp_path)
    marked = {**names.tensors, "model.layers.3.enorm.weight": ("BF16", (64,))}
    model = planned(Names(config, marked), tmp_path)
    assert {stack for stack, _ in model.expert_layers} == {"main", "mtp"}


def test_a_vocabulary_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    names = names_of("qwen3_moe")
    for vocab, fits in ((63, True), (64, True), (65, False)):
        changed = names._replace(config={**names.config, "vocab_size": vocab})
        if fits:
            planned(changed, tmp_path)
            continue
        with pytest.raises(BadSource, match=r"has 64 rows; config.json says a vocabulary of 65"):
            planned(changed, tmp_path)


def test_a_billion_layers_are_refused_at_once(tmp_path: Path) -> None:
    names = names_of("qwen3_moe")
    config = {**names.config, "num_hidden_layers": 10**9}
    with pytest.raises(IncompleteModel, match=r"says 1000000000 layers; no tensor of layer 4, 5"):
        planned(names._replace(config=config), tmp_path)


INTEGERS = (
    ("model.layers.1.mlp.experts.0.up_proj.weight", UnrecognizedTensor),
    ("model.layers.1.self_attn.q_proj.weight", BadSource),
    ("model.layers.1.mlp.gate.weight", BadSource),
    ("model.norm.weight", BadSource),
)


@pytest.mark.parametrize("dtype", ["I16", "U16", "I32", "I64", "BOOL"])
@pytest.mark.parametrize(("name", "error"), INTEGERS)
def test_integers_are_no_weights(
    name: str, error: type[BadSource], dtype: str, tmp_path: Path
) -> None:
    names = names_of("dots1")
    shape = names.tensors[name][1]
    tensors = {**names.tensors, name: (dtype, shape)}
    with pytest.raises(error, match=rf"'{name}' is {dtype}"):
        planned(names._replace(tensors=tensors), tmp_path)


def test_tables_of_integers_are_kept(tmp_path: Path) -> None:
    names = names_of("dots1")
    table = {"model.visual.embeddings.position_ids": ("I64", (1, 8))}
    model = planned(names._replace(tensors=names.tensors | table), tmp_path)
    assert [weight.name for weight in model.weights if weight.codec == "raw"] == list(table)


HEADS = (
    ({"num_attention_heads": 2}, "'self_attn.q_proj.weight' has 64 rows; 2 heads of 16 take 32"),
    ({"num_attention_heads": 8}, "'self_attn.q_proj.weight' has 64 rows; 8 heads of 16 take 128"),
    ({"num_key_value_heads": 1}, "'self_attn.k_proj.weight' has 32 rows; 1 heads of 16 take 16"),
    ({"num_key_value_heads": 4}, "'self_attn.k_proj.weight' has 32 rows; 4 heads of 16 take 64"),
    ({"head_dim": 32}, "'self_attn.q_proj.weight' has 64 rows; 4 heads of 32 take 128"),
)


@pytest.mark.parametrize(("said", "says"), HEADS)
def test_heads_that_the_rows_do_not_hold_are_refused(
    said: dict[str, int], says: str, tmp_path: Path
) -> None:
    names = names_of("qwen3_moe")
    names = names._replace(config={**names.config, "head_dim": 16})
    planned(names, tmp_path, layout="vllm", tp=2)
    changed = names._replace(config={**names.config, **said})
    with pytest.raises(BadSource) as raised:
        planned(changed, tmp_path, layout="vllm", tp=1)
    assert says in str(raised.value)
