"""What build_model says of damaged and mixed checkpoints, and of what headers leave open."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from moeconv import api
from moeconv.errors import (
    BadSource,
    IncompleteModel,
    MoeconvError,
    Refused,
    ShapeMismatch,
    UnrecognizedTensor,
)
from moeconv.model import Model, build_model
from moeconv.store.safetensors import read_header
from tests.families.sources import Names, read_names, source_of

FIXTURES = Path(__file__).parent / "fixtures"
HUB: dict[str, Any] = json.loads((FIXTURES / "hub_names.json").read_text())

Change = Callable[[dict[str, Any], dict[str, tuple[str, tuple[int, ...]]]], None]

LAYER = "model.layers.1.mlp.experts"


def names_of(case: str) -> Names:
    return read_names(HUB[case], HUB[case]["experts"])


def changed(case: str, change: Change) -> Names:
    names = names_of(case)
    config = json.loads(json.dumps(names.config))
    tensors = dict(names.tensors)
    change(config, tensors)
    return Names(config, tensors)


def drop(name: str) -> Change:
    return lambda config, tensors: tensors.pop(name) and None


def put(name: str, dtype: str, *shape: int) -> Change:
    return lambda config, tensors: tensors.update({name: (dtype, shape)})


def set_config(**values: object) -> Change:
    return lambda config, tensors: config.update(values)


def skip(*modules: str) -> Change:
    def change(config: dict[str, Any], tensors: object) -> None:
        config["quantization_config"]["modules_to_not_convert"] = list(modules)

    return change


def unpack_too(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    base = "model.language_model.layers.1.mlp.experts"
    for name in ("gate", "up", "down"):
        shape = (64, 48) if name == "down" else (48, 64)
        for expert in range(4):
            tensors[f"{base}.{expert}.{name}_proj.weight"] = ("BF16", shape)


class Case(NamedTuple):
    """A checkpoint with one fault: the error and what its text must name."""

    why: str
    base: str
    change: Change
    error: type[MoeconvError]
    says: tuple[str, ...]


REFUSALS = (
    Case(
        "the scale of one expert is missing",
        "kimi_k2-fp8",
        drop(f"{LAYER}.0.down_proj.weight_scale_inv"),
        IncompleteModel,
        (f"'{LAYER}.0.down_proj' has no weight_scale_inv",),
    ),
    Case(
        "the only scale of its shape is missing",
        "kimi_k2-fp8",
        drop("model.layers.0.mlp.down_proj.weight_scale_inv"),
        IncompleteModel,
        ("model.layers.0.mlp.down_proj", "weight_scale_inv"),
    ),
    Case(
        "the weight of a scale is missing",
        "kimi_k2-fp8",
        drop(f"{LAYER}.3.up_proj.weight"),
        IncompleteModel,
        (f"{LAYER}.3.up_proj.weight_scale_inv", "has no weight"),
    ),
    Case(
        "a grid of scales has another shape",
        "kimi_k2-fp8",
        put(f"{LAYER}.2.gate_proj.weight_scale_inv", "F32", 1, 2),
        ShapeMismatch,
        (f"{LAYER}.2.gate_proj.weight_scale_inv", "[1, 2]", "[2, 2]"),
    ),
    Case(
        "a module is quantized that the config leaves out",
        "kimi_k2-fp8",
        skip("model.layers.0.mlp"),
        BadSource,
        ("model.layers.0.mlp.",),
    ),
    Case(
        "the same, where its scales need no config",
        "llama4-fp8-channel",
        lambda config, tensors: config["quantization_config"]["ignore"].append("re:.*experts.*"),
        BadSource,
        ("experts.0.", "the config leaves it out"),
    ),
    Case(
        "an unknown quant_method",
        "kimi_k2-fp8",
        set_config(quantization_config={"quant_method": "hqq"}),
        BadSource,
        ("quant_method 'hqq'",),
    ),
    Case(
        "an unknown model_type",
        "kimi_k2-fp8",
        set_config(model_type="kimi_k9"),
        BadSource,
        ("model_type 'kimi_k9'",),
    ),
    Case(
        "no model_type",
        "kimi_k2-fp8",
        set_config(model_type=None),
        BadSource,
        ("no model_type",),
    ),
    Case(
        "two counts of experts",
        "kimi_k2-fp8",
        set_config(num_experts=8),
        BadSource,
        ("n_routed_experts is 4", "num_experts is 8"),
    ),
    Case(
        "a hidden size that the tensors have not",
        "dots1",
        set_config(hidden_size=96),
        ShapeMismatch,
        ("model.layers.1.mlp.experts.0", "[48, 64]", "hidden 96"),
    ),
    Case(
        "an intermediate size that the tensors have not",
        "dots1",
        set_config(moe_intermediate_size=40),
        BadSource,
        ("intermediate size is 48", "40"),
    ),
    Case(
        "a size that is no number",
        "dots1",
        set_config(hidden_size="64"),
        BadSource,
        ("hidden_size is '64'",),
    ),
    Case(
        "packed and one by one at once",
        "qwen3_5_moe-mixed",
        unpack_too,
        UnrecognizedTensor,
        ("are the same weight", "experts.gate_up_proj", "experts.0."),
    ),
    Case(
        "a dtype that no codec knows",
        "dots1",
        put(f"{LAYER}.0.up_proj.weight", "F8_E4M3FNUZ", 48, 64),
        BadSource,
        (f"{LAYER}.0.up_proj", "F8_E4M3FNUZ"),
    ),
    Case(
        "experts outside of any layer",
        "dots1",
        put("model.extra.experts.0.up_proj.weight", "BF16", 48, 64),
        UnrecognizedTensor,
        ("model.extra.experts.0.up_proj.weight",),
    ),
    Case(
        "an expert of a tensor that is no expert's",
        "dots1",
        put(f"{LAYER}.0.side_proj.weight", "BF16", 48, 64),
        UnrecognizedTensor,
        (f"{LAYER}.0.side_proj.weight", "family 'dots1'"),
    ),
)


@pytest.mark.parametrize("case", REFUSALS, ids=lambda case: case.why)
def test_refusals_name_what_is_wrong(case: Case, tmp_path: Path) -> None:
    source = source_of(changed(case.base, case.change), tmp_path)
    with pytest.raises(case.error) as raised:
        build_model(source)
    for text in case.says:
        assert text in str(raised.value)
    assert raised.value.hint


def packed(hidden: int, inner: int, *, turned: bool, **config: object) -> Names:
    """Return a Qwen3-VL-MoE of these sizes, its packed tensors [E, in, out] if turned."""

    def change(declared: dict[str, Any], tensors: dict[str, Any]) -> None:
        declared["text_config"] |= {"hidden_size": hidden, "moe_intermediate_size": inner, **config}
        for name in tuple(tensors):
            if name.endswith("experts.gate_up_proj"):
                shape = (hidden, 2 * inner) if turned else (2 * inner, hidden)
                tensors[name] = ("BF16", (4, *shape))
            elif name.endswith("experts.down_proj"):
                tensors[name] = ("BF16", (4, *((inner, hidden) if turned else (hidden, inner))))

    return changed("qwen3_vl_moe-hub", change)


def transposed(model: Model) -> set[bool]:
    return {weight.transposed for weight in model.weights if weight.is_expert}


@pytest.mark.parametrize("turned", [True, False])
def test_sizes_decide_the_orientation(tmp_path: Path, turned: bool) -> None:
    source = source_of(packed(64, 48, turned=turned), tmp_path)
    assert transposed(build_model(source)) == {turned}
    said, other = ("in-out", "out-in") if turned else ("out-in", "in-out")
    assert transposed(build_model(source, orientation=said)) == {turned}
    with pytest.raises(Refused, match=f"--orientation {other} contradicts"):
        build_model(source, orientation=other)


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize(
    ("hidden", "inner", "open_tensor"),
    [(64, 32, "gate_up_proj"), (64, 64, "down_proj")],
    ids=["2I == H", "I == H"],
)
def test_an_open_orientation_is_refused(
    tmp_path: Path, hidden: int, inner: int, open_tensor: str, turned: bool
) -> None:
    source = source_of(packed(hidden, inner, turned=turned), tmp_path)
    with pytest.raises(BadSource, match=open_tensor) as raised:
        build_model(source)
    assert "--orientation" in raised.value.hint
    said = "in-out" if turned else "out-in"
    model = build_model(source, orientation=said)
    assert transposed(model) == {turned}
    shapes = {(w.rows, w.cols) for w in model.weights if w.is_expert}
    assert shapes == {(2 * inner, hidden), (hidden, inner)}


@pytest.mark.parametrize("turned", [True, False])
def test_the_intermediate_size_decides_where_the_hidden_one_does_not(
    tmp_path: Path, turned: bool
) -> None:
    """Both axes can be the hidden one here: only one reading makes I the declared size."""
    source = source_of(packed(64, 32, turned=turned), tmp_path)
    with pytest.raises(BadSource):
        build_model(source)
    names = packed(64, 48, turned=turned, hidden_size=None)
    assert transposed(build_model(source_of(names, tmp_path))) == {turned}


GPTQ = "qwen3moe-gptq-int4-g128"


def copy_with_zeros(tmp_path: Path, choose: Callable[[str], int]) -> Path:
    """Return a copy of the GPTQ fixture whose qzeros of each tensor hold one nibble everywhere."""
    source = FIXTURES / "checkpoints" / GPTQ
    root = tmp_path / "gptq"
    root.mkdir()
    for path in source.iterdir():
        (root / path.name).write_bytes(path.read_bytes())
    name = "model.safetensors"
    header = read_header(root / name, name)
    data = bytearray((root / name).read_bytes())
    for ref in header.tensors:
        if ref.name.endswith(".qzeros"):
            data[ref.offset : ref.offset + ref.nbytes] = bytes([choose(ref.name) * 17]) * ref.nbytes
    (root / name).write_bytes(data)
    return root


def offsets(model: Model) -> set[object]:
    return {weight.params["zero_offset"] for weight in model.weights if weight.codec == "gptq"}


def test_gptq_zero_points_say_their_version(tmp_path: Path) -> None:
    assert offsets(api.inspect(FIXTURES / "checkpoints" / GPTQ)) == {1}
    mislabelled = api.inspect(copy_with_zeros(tmp_path, lambda name: 8))
    assert offsets(mislabelled) == {0}
    assert any("gptq_v2, although the config says gptq (v1)" in n for n in mislabelled.notes)


def test_gptq_zero_points_of_two_versions_are_refused(tmp_path: Path) -> None:
    root = copy_with_zeros(tmp_path, lambda name: 8 if ".experts.3.down" in name else 7)
    with pytest.raises(BadSource, match="stored differently") as raised:
        api.inspect(root)
    assert "experts.3.down_proj" in str(raised.value)


def test_gptq_zero_points_that_are_no_middle_are_refused(tmp_path: Path) -> None:
    root = copy_with_zeros(tmp_path, lambda name: 5)
    with pytest.raises(BadSource, match="zero points are \\[5\\]"):
        api.inspect(root)


def test_a_zero_point_that_turns_up_while_decoding_is_named(tmp_path: Path) -> None:
    """Planning looks at a sample; here the file changes after it looked."""
    root = copy_with_zeros(tmp_path, lambda name: 7)
    plan = api.plan(root)
    (ref,) = (
        ref
        for name, ref in plan.model.source.tensors.items()
        if name.endswith("experts.2.up_proj.qzeros")
    )
    with open(root / "model.safetensors", "r+b") as file:
        file.seek(ref.offset + ref.nbytes - 1)
        file.write(b"\x87")
    with pytest.raises(BadSource, match=r"experts\.2\.up_proj\.weight': .*zero points \[8, 9\]"):
        api.convert(plan, tmp_path / "out")


def test_a_weight_shape_unlike_its_weight_is_refused(tmp_path: Path) -> None:
    names = names_of("kimi_k25-int4")
    source = source_of(names, tmp_path)
    assert build_model(source).notes == ()
    for expert in (0, 3):
        ref = source.tensors[
            f"language_model.model.layers.1.mlp.experts.{expert}.down_proj.weight_shape"
        ]
        path = source.files[ref.file]
        before = path.read_bytes()
        with open(path, "r+b") as file:
            file.seek(ref.offset)
            file.write(np.array([64, 40], np.int32).tobytes())
        with pytest.raises(BadSource, match=rf"experts\.{expert}\.down_proj"):
            build_model(source)
        path.write_bytes(before)


def test_promised_mtp_layers_that_are_not_there_are_noted(tmp_path: Path) -> None:
    def without_mtp(config: dict[str, Any], tensors: dict[str, Any]) -> None:
        for name in tuple(tensors):
            if name.startswith("model.layers.2."):
                del tensors[name]

    whole = build_model(source_of(names_of("deepseek_v3-fp8-mtp"), tmp_path))
    assert whole.notes == ()
    assert {stack for stack, _ in whole.expert_layers} == {"main", "mtp"}
    cut = build_model(source_of(changed("deepseek_v3-fp8-mtp", without_mtp), tmp_path))
    assert cut.notes == ("config.json promises 1 MTP layers; the files have none",)


def test_activation_scales_are_dropped_by_name(tmp_path: Path) -> None:
    source = source_of(names_of("mistral_native"), tmp_path, native=True)
    model = build_model(source)
    assert {drop.rule for drop in model.dropped} == {"activation scale"}
    dropped = {drop.ref.name for drop in model.dropped}
    assert dropped == {name for name in source.tensors if name.endswith(".qscale_act")}
