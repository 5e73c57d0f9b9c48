"""Every family on the names of real checkpoints: each tensor once, every expert there.

architectures.json: what transformers 5.23 writes for 45 architectures. hub_names.json: published
forms that it does not write. A family without names in either fails here.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from moeconv.errors import BadSource, IncompleteModel, UnrecognizedTensor
from moeconv.families.base import Family, Rule
from moeconv.families.tables import FAMILIES
from moeconv.grouping import Matcher
from moeconv.layouts.options import Options
from moeconv.model import Model, build_model
from moeconv.naming import compile_pattern, format_name
from moeconv.plan import build_plan
from tests.families.sources import Names, read_names, source_of

FIXTURES = Path(__file__).parents[1] / "fixtures"
ARCHITECTURES: dict[str, Any] = json.loads((FIXTURES / "architectures.json").read_text())
HUB: dict[str, Any] = json.loads((FIXTURES / "hub_names.json").read_text())
# The family of an architecture, where it is not called like it.
FAMILY_OF = {
    "granitemoeshared": "granitemoe",
    "granitemoehybrid": "granitemoe",
    "llama4_text": "llama4",
    "qwen3_5_moe_text": "qwen3_5_moe",
}
# is_moe is false in what transformers made, and its experts are no matrices [out, in].
WITHOUT_EXPERTS = ("doge",)
# A fresh model of transformers has gate and up, but no down, of LongCat's 256 zero experts; a
# published one has none of them.
ZERO_EXPERTS = {
    f"model.layers.N.mlp.experts.N.{name}_proj.weight": 8 for name in ("gate", "up", "down")
}
CASES = [*(name for name in ARCHITECTURES if name not in WITHOUT_EXPERTS), *HUB]


def entry_of(case: str) -> dict[str, Any]:
    if case in HUB:
        return HUB[case]
    entry = json.loads(json.dumps(ARCHITECTURES[case]))
    if case == "longcat_flash":
        for pattern, count in ZERO_EXPERTS.items():
            entry["tensors"][pattern][2] = count
    return entry


def names_of(case: str) -> Names:
    return read_names(entry_of(case), HUB.get(case, {}).get("experts", 4))


def model_of(case: str, root: Path, names: Names | None = None) -> Model:
    return build_model(source_of(names or names_of(case), root, native=case == "mistral_native"))


def test_every_architecture_and_family_is_here() -> None:
    assert len(ARCHITECTURES) == 45
    enrolled = {FAMILY_OF.get(case, HUB.get(case, {}).get("family", case)) for case in CASES}
    assert enrolled == {family.name for family in FAMILIES}


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_recognised_exactly_once(case: str, tmp_path: Path) -> None:
    names = names_of(case)
    model = model_of(case, tmp_path, names)
    assert model.family.name == FAMILY_OF.get(case, HUB.get(case, {}).get("family", case))
    used = Counter(ref.name for weight in model.weights for ref in weight.parts.values())
    used += Counter(drop.ref.name for drop in model.dropped)
    assert used == Counter(dict.fromkeys(names.tensors, 1))


@pytest.mark.parametrize("case", CASES)
def test_the_grid_of_experts_is_complete(case: str, tmp_path: Path) -> None:
    model = model_of(case, tmp_path)
    experts = HUB.get(case, {}).get("experts", 4)
    assert set(model.expert_layers.values()) == {experts}
    grid = Counter(
        (key.stack, key.layer, key.name) for key in model.places if key.expert is not None
    )
    assert set(grid.values()) == {experts}
    assert {name for _, _, name in grid} == set(model.family.projections)
    assert len({(stack, layer) for stack, layer, _ in grid}) == len(model.expert_layers)


@pytest.mark.parametrize("case", CASES)
def test_plain_checkpoints_keep_every_name_and_shape(case: str, tmp_path: Path) -> None:
    """What is not quantized leaves as it came; quantized weights leave under one plain name."""
    names = names_of(case)
    plan = build_plan(model_of(case, tmp_path, names), Options())
    written = {tensor.draft.name: tensor.draft.shape for f in plan.files for tensor in f.tensors}
    plain = {name: shape for name, (dtype, shape) in names.tensors.items() if dtype == "BF16"}
    scales = ("_scale", "_scale_inv")
    plain = {name: shape for name, shape in plain.items() if not name.endswith(scales)}
    kept = {name: shape for name, shape in plain.items() if written.get(name) == shape}
    assert kept == plain
    if all(dtype in ("BF16", "F32", "I64") for dtype, _ in names.tensors.values()):
        assert written == {name: shape for name, (_, shape) in names.tensors.items()}


def expert_tensors(model: Model) -> list[str]:
    return sorted(
        ref.name for weight in model.weights if weight.is_expert for ref in weight.parts.values()
    )


@pytest.mark.parametrize("case", CASES)
def test_a_missing_expert_tensor_is_refused(case: str, tmp_path: Path) -> None:
    names = names_of(case)
    every = expert_tensors(model_of(case, tmp_path, names))
    for gone in (every[0], every[len(every) // 2], every[-1]):
        left = {name: what for name, what in names.tensors.items() if name != gone}
        with pytest.raises(BadSource):
            model_of(case, tmp_path, names._replace(tensors=left))


@pytest.mark.parametrize("case", CASES)
def test_an_unknown_tensor_among_experts_is_refused(case: str, tmp_path: Path) -> None:
    names = names_of(case)
    model = model_of(case, tmp_path, names)
    base = next(weight.name for weight in model.weights if weight.is_expert)
    base = base.removesuffix("_bias").removesuffix(".weight").removesuffix(".bias")
    parents = [base]
    if "experts." in base:
        parents.append(base[: base.index("experts.") + 7])
    for parent in parents:
        more = {**names.tensors, f"{parent}.mystery": ("BF16", (4, 4))}
        with pytest.raises(UnrecognizedTensor, match="mystery"):
            model_of(case, tmp_path, names._replace(tensors=more))


@pytest.mark.parametrize("case", ["deepseek_v4", "kimi_k25"])
def test_other_prefixes_are_the_same_model(case: str, tmp_path: Path) -> None:
    """transformers writes other prefixes than are published: both are read alike."""
    prefixes = {
        "deepseek_v4": ("layers.", "model.layers."),
        "kimi_k25": ("language_model.model.blocks.", "language_model.model.layers."),
    }
    old, new = prefixes[case]
    names = names_of(case)
    if not any(name.startswith(old) for name in names.tensors):
        old, new = new, old
    renamed = {name.replace(old, new, 1): what for name, what in names.tensors.items()}
    assert set(renamed) != set(names.tensors)
    model, other = (
        model_of(case, tmp_path, names),
        model_of(case, tmp_path, names._replace(tensors=renamed)),
    )
    assert set(model.places) == set(other.places)


def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    names = read_names(ARCHITECTURES["doge"], 4)
    with pytest.raises(BadSource, match="'doge' is not a family"):
        build_model(source_of(names, tmp_path))
    mixtral = names._replace(config={**names.config, "model_type": "mixtral"})
    with pytest.raises(IncompleteModel, match="no expert tensors"):
        build_model(source_of(mixtral, tmp_path))


# What the words of expert tensors hold, whatever the family: formats of transformers' modules.
MEANINGS = {
    **{"gate_proj": ("gate",), "up_proj": ("up",), "down_proj": ("down",)},
    **{"w1": ("gate",), "w3": ("up",), "v1": ("up",), "w2": ("down",)},
    **{"gate_up_proj": ("gate", "up"), "fc1": ("gate", "up"), "fc2": ("down",)},
    **{"input_linear": ("gate", "up"), "output_linear": ("down",)},
    **{"mlp1_weight": ("gate", "up"), "mlp2_weight": ("down",)},
    **{"mlp1": ("gate", "up"), "mlp2": ("down",)},
}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_words_mean_the_same_everywhere(family: Family) -> None:
    for rule in family.rules:
        assert dict(rule.projections) == {word: MEANINGS[word] for word in rule.projections}
        interleaved = "(R P)" in rule.dims
        assert interleaved == (family.name.startswith("gpt_oss") and "{expert}" not in rule.pattern)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_patterns_are_not_ambiguous(family: Family) -> None:
    """A name fits rules of one pattern and one meaning; only the shape may decide the rest."""
    matcher = Matcher(family)
    for rule in family.rules:
        for word, projections in rule.projections.items():
            part = rule.parts[0] if rule.parts else "weight"
            name = format_name(rule.pattern, expert=1, proj=word)
            ending = {"weight": "", "bias": "_bias", "blocks": ".blocks"}[part]
            match = matcher.match(
                f"{name}.{part}" if "{expert}" in rule.pattern else f"{name}{ending}"
            )
            assert match is not None
            for other in match.rules:
                assert (other.pattern, other.suffix) == (rule.pattern, rule.suffix)
                assert other.projections[word] == projections
            assert len(others_with_part(family, rule, name, part)) == len(match.rules)


def others_with_part(family: Family, rule: Rule, name: str, part: str) -> list[Rule]:
    return [
        one
        for one in family.rules
        if compile_pattern(one.pattern, {"proj": one.projections}).fullmatch(name)
        and (part in one.parts if one.parts else part != "bias")
    ]


def test_names_and_model_types_are_given_once() -> None:
    names = Counter(family.name for family in FAMILIES)
    types = Counter(name for family in FAMILIES for name in family.model_types)
    assert not [name for name, count in (names + types).items() if count > 2]
    assert max(names.values()) == max(types.values()) == 1
    assert all(family.model_types or family.config_fields for family in FAMILIES)
