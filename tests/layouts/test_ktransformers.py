"""The ktransformers layout: kt-kernel's own bytes, any source, any cut; refusals that help."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moeconv.api as api
from moeconv.codecs import amx
from moeconv.errors import NonFiniteValue, Refused, UsageError
from moeconv.layouts.ktransformers import FORMS, launch_hint
from moeconv.resources import Resources
from moeconv.store.space import human
from tests import amx_oracle
from tests.checkpoints import Size, config_of, save, write_checkpoint

FIXTURES = Path(__file__).parents[1] / "fixtures"
KT = FIXTURES / "ktransformers"
PROJECTIONS = ("gate", "up", "down")
Stored = dict[str, tuple[str, list[int], bytes]]
Experts = dict[tuple[int, int, str], np.ndarray]


def convert(src: Path, dst: Path, resources: Resources | None = None, **options: Any) -> Stored:
    """Return the tensors of a ktransformers output, all files together."""
    plan = api.plan(src, dst, layout="ktransformers", **options)
    api.convert(plan, dst, resources=resources)
    found: Stored = {}
    for path in sorted(dst.glob("*.safetensors")):
        tensors = amx_oracle.stored(path)
        assert not found.keys() & tensors.keys()
        found |= tensors
    return found


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)


def expected(experts: Experts, form: str, numa: int) -> Stored:
    """Return what kt-kernel would write of BF16 bits, by the reference of the codec."""
    found: Stored = {}
    for (layer, expert, name), bits in experts.items():
        axis = 1 if name == "down" else 0
        for part, piece in enumerate(np.split(bits, numa, axis=axis)):
            values = amx_oracle.floats(np.ascontiguousarray(piece))
            packed, scales = amx.encode(values, amx.FORMS[form])
            key = f"blk.{layer}.ffn_{name}_exps.{expert}.numa.{part}"
            found[f"{key}.weight"] = ("I8", [packed.size], packed.tobytes())
            found[f"{key}.scale"] = ("F32", [scales.size], scales.tobytes())
    return found


@pytest.mark.parametrize("dtype", ["int4", "int8"])
def test_equals_what_kt_kernel_wrote(tmp_path: Path, dtype: str) -> None:
    """From one BF16 source: kt-kernel 0.7.2's converter, two NUMA parts, and this layout."""
    theirs: Stored = {}
    for path in (KT / f"{dtype}-numa2").glob("*.safetensors"):
        theirs |= amx_oracle.stored(path)
    theirs = {key: value for key, value in theirs.items() if "_exps." in key}
    assert len(theirs) == 24
    assert convert(KT / "bf16", tmp_path / "out", dtype=dtype) == theirs


@pytest.mark.parametrize(
    ("dtype", "numa", "intermediate"),
    [("int8", 1, 192), ("int8", 3, 192), ("int8", 4, 256), ("int4", 1, 384), ("int4", 3, 384)],
)
def test_any_number_of_parts(tmp_path: Path, dtype: str, numa: int, intermediate: int) -> None:
    """Against the second oracle, element by element."""
    size = Size(hidden=128, intermediate=intermediate, experts=1)
    made = write_checkpoint(tmp_path / "src", "qwen3moe", size)
    got = convert(tmp_path / "src", tmp_path / "out", dtype=dtype, numa=numa)
    assert len(got) == 3 * numa * 2
    for (layer, expert, name), tensor in made.experts.items():
        pieces = np.split(bits_of(tensor), numa, axis=1 if name == "down" else 0)
        for part, piece in enumerate(pieces):
            packed, scales = amx_oracle.encode(piece, f"amx{dtype}")
            key = f"blk.{layer}.ffn_{name}_exps.{expert}.numa.{part}"
            assert got[f"{key}.weight"] == ("I8", [len(packed)], packed)
            assert got[f"{key}.scale"] == ("F32", [scales.size], scales.tobytes())


@pytest.mark.parametrize(
    ("name", "dtype", "numa"),
    [
        ("deepseekv3-fp8-block128", "int4", 1),
        ("deepseekv3-fp8-block128", "int8", 2),
        ("qwen3moe-gptq-int4-g128", "int4", 1),
        ("qwen3moe-awq-int4-g32", "int8", 2),
        ("mixtral-mxfp8-ct", "int8", 1),
    ],
)
def test_quantized_sources_are_rounded_to_bf16_first(
    tmp_path: Path, name: str, dtype: str, numa: int
) -> None:
    src = FIXTURES / "checkpoints" / name
    experts = decoded_experts(src, tmp_path / "bf16")
    got = convert(src, tmp_path / "out", dtype=dtype, numa=numa)
    assert got == expected(experts, f"amx{dtype}", numa)


def decoded_experts(src: Path, dst: Path) -> Experts:
    """Return the BF16 bits of every expert, of an hf output of the same source."""
    api.convert(api.plan(src, dst, dtype="bf16", experts_only=True), dst)
    names = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
    names |= {"w1": "gate", "w3": "up", "w2": "down"}
    found: Experts = {}
    for path in dst.glob("*.safetensors"):
        for key, (_, shape, data) in amx_oracle.stored(path).items():
            parts = key.split(".")
            place = (int(parts[2]), int(parts[-3]), names[parts[-2]])
            found[place] = np.frombuffer(data, np.uint16).reshape(shape)
    return found


def packed_checkpoint(root: Path, *, transposed: bool) -> Experts:
    """Write experts that are fused and stacked, [E, 2I, H] or [E, H, 2I]; return their bits."""
    size = Size(hidden=128, intermediate=256, experts=2)
    torch.manual_seed(3)
    gate_up = torch.randn(2, 512, 128).bfloat16()
    down = torch.randn(2, 128, 256).bfloat16()
    config = config_of("qwen3moe", size)
    config["model_type"] = "qwen3_vl_moe_text" if transposed else "qwen3_5_moe_text"
    turn = (lambda one: one.transpose(1, 2)) if transposed else (lambda one: one)
    prefix = "model.layers.0.mlp.experts."
    save(root, config, {f"{prefix}gate_up_proj": turn(gate_up), f"{prefix}down_proj": turn(down)})
    return {
        (0, expert, name): bits_of(matrix)
        for expert in range(2)
        for name, matrix in (
            ("gate", gate_up[expert, :256]),
            ("up", gate_up[expert, 256:]),
            ("down", down[expert]),
        )
    }


@pytest.mark.parametrize("memory", [None, 1 << 20], ids=["whole", "small"])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
def test_fused_and_transposed_experts(tmp_path: Path, transposed: bool, memory: int | None) -> None:
    experts = packed_checkpoint(tmp_path / "src", transposed=transposed)
    resources = Resources(memory_nbytes=memory, jobs=1)
    got = convert(tmp_path / "src", tmp_path / "out", resources, dtype="int4")
    assert got == expected(experts, "amxint4", 2)


@pytest.mark.parametrize("dtype", ["int4", "int8"])
def test_memory_does_not_change_a_byte(tmp_path: Path, dtype: str) -> None:
    """Cut into blocks of rows, where the whole would not fit; the floor is said."""
    size = Size(hidden=1024, intermediate=1024, experts=2)
    write_checkpoint(tmp_path / "src", "mixtral", size)
    whole = convert(tmp_path / "src", tmp_path / "whole", dtype=dtype)
    with pytest.raises(Refused, match="too small") as caught:
        convert(tmp_path / "src", tmp_path / "no", Resources(1 << 16, jobs=1), dtype=dtype)
    floor = int(str(caught.value.hint).split("--memory ")[1].split("MiB")[0])
    assert floor < 4, human(floor)  # one matrix and its parts: more than 3 MiB
    small = Resources((floor + 1) << 20, jobs=1)
    assert convert(tmp_path / "src", tmp_path / "small", small, dtype=dtype) == whole


def test_files_hold_whole_pairs(tmp_path: Path) -> None:
    size = Size(layers=2, hidden=128, intermediate=128, experts=4)
    write_checkpoint(tmp_path / "src", "qwen3moe", size)
    (tmp_path / "src" / "tokenizer.json").write_text("{}")
    whole = convert(tmp_path / "src", tmp_path / "one", dtype="int8", numa=1)
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "moeconv-experts-layer-00000.safetensors",
        "moeconv-experts-layer-00001.safetensors",
        "moeconv.json",
    ]
    limit = 2 * (16384 + 512) + 16400  # two weights with their scales; a third without its own
    cut = convert(tmp_path / "src", tmp_path / "cut", dtype="int8", numa=1, max_file_size=limit)
    assert cut == whole
    names = sorted(path.name for path in (tmp_path / "cut").glob("*.safetensors"))
    assert len(names) == 12
    assert names[0] == "moeconv-experts-layer-00000-part-00000.safetensors"
    for name in names:
        keys = amx_oracle.stored(tmp_path / "cut" / name).keys()
        weights = {key.removesuffix(".weight") for key in keys if key.endswith(".weight")}
        assert {key.removesuffix(".scale") for key in keys if key.endswith(".scale")} == weights


def test_manifest_says_method_and_parts(tmp_path: Path) -> None:
    convert(KT / "bf16", tmp_path / "out", dtype="int8", numa=4)
    manifest = json.loads((tmp_path / "out" / "moeconv.json").read_text())
    facts = manifest["layout_facts"]
    assert (facts["method"], facts["numa"], facts["tested_kt_kernel"]) == ("AMXINT8", 4, ["0.7.2"])
    assert manifest["partial"] is False
    assert manifest["configs"] == [] and manifest["auxiliary"] == [] and manifest["beside"] == {}
    (rule, names), *more = manifest["accounting"]["dropped"].items()
    assert "experts alone" in rule and not more
    assert names == ["model.layers.0.input_layernorm.weight", "model.layers.0.mlp.gate.weight"]
    hint = launch_hint(facts, "/data/kt")
    assert hint == "--kt-weight-path /data/kt --kt-method AMXINT8 --kt-threadpool-count 4"


def test_part_of_the_layers_and_of_the_tensors(tmp_path: Path) -> None:
    size = Size(layers=2, hidden=128, intermediate=128, experts=2)
    write_checkpoint(tmp_path / "src", "qwen3moe", size)
    whole = convert(tmp_path / "src", tmp_path / "whole", dtype="int4", numa=1)
    one = convert(tmp_path / "src", tmp_path / "one", dtype="int4", numa=1, layers=(1,))
    assert one == {key: value for key, value in whole.items() if key.startswith("blk.1.")}
    scales = convert(tmp_path / "src", tmp_path / "s", dtype="int4", numa=1, include=("*.scale",))
    assert scales == {key: value for key, value in whole.items() if key.endswith(".scale")}


def test_bf16_takes_the_names_that_kt_kernel_tries_first(tmp_path: Path) -> None:
    """Mixtral's block_sparse_moe.experts.0.w1 becomes mlp.experts.0.gate_proj."""
    size = Size(hidden=64, intermediate=96, experts=2)
    made = write_checkpoint(tmp_path / "src", "mixtral", size)
    plan = api.plan(tmp_path / "src", layout="ktransformers", dtype="bf16")
    assert plan.notes[-1].endswith("into parts: 1, 3")  # 48 rows make kt-kernel end the process
    got = convert(tmp_path / "src", tmp_path / "out", dtype="bf16")
    assert got == {
        f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight": (
            "BF16",
            list(tensor.shape),
            bits_of(tensor).tobytes(),
        )
        for (layer, expert, name), tensor in made.experts.items()
    }
    facts = json.loads((tmp_path / "out" / "moeconv.json").read_text())["layout_facts"]
    assert launch_hint(facts, "d") == "--kt-weight-path d --kt-method BF16"


def test_mtp_layers_are_left_out_by_name(tmp_path: Path) -> None:
    size = Size(layers=2, hidden=128, intermediate=128, experts=2)
    made = write_checkpoint(tmp_path / "src", "qwen3moe", size)
    config = config_of("qwen3moe", size) | {
        "num_hidden_layers": 1,
        "num_nextn_predict_layers": 1,
    }
    (tmp_path / "src" / "config.json").write_text(json.dumps(config))
    got = convert(tmp_path / "src", tmp_path / "out", dtype="int8", numa=1)
    bits = {key: bits_of(tensor) for key, tensor in made.experts.items() if key[0] == 0}
    assert got == expected(bits, "amxint8", 1)
    manifest = json.loads((tmp_path / "out" / "moeconv.json").read_text())
    dropped = manifest["accounting"]["dropped"]
    (beyond,) = (names for rule, names in dropped.items() if "layers of the decoder" in rule)
    assert {name for name in beyond if ".experts." in name} == {
        f"model.layers.1.mlp.experts.{expert}.{name}_proj.weight"
        for expert in range(2)
        for name in PROJECTIONS
    }


@pytest.mark.parametrize(
    ("value", "name"), [(float("nan"), "NaN"), (float("inf"), "Inf"), (-float("inf"), "-Inf")]
)
@pytest.mark.parametrize("dtype", ["int4", "int8"])
def test_refuses_what_is_not_finite(tmp_path: Path, dtype: str, value: float, name: str) -> None:
    size = Size(hidden=128, intermediate=256, experts=2)
    made = write_checkpoint(tmp_path / "src", "qwen3moe", size)
    bad = made.experts[0, 1, "up"].clone()
    bad[200, 77] = value
    key = "model.layers.0.mlp.experts.1.up_proj.weight"
    save(tmp_path / "src", config_of("qwen3moe", size), made.form | {key: bad})
    with pytest.raises(NonFiniteValue, match="expert 1, row 200 of up") as caught:
        convert(tmp_path / "src", tmp_path / "out", dtype=dtype)
    assert key in str(caught.value) and caught.value.exit_code == 4, name
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert "moeconv.json" not in left
    assert not [one for one in left if one.endswith(".safetensors")]


REFUSALS = [
    # checkpoint kind, sizes, options, what it says, what would work
    ("qwen3moe", (128, 768), {"dtype": "int4", "numa": 4}, "192 intermediate", "1, 2, 3, 6;"),
    ("qwen3moe", (128, 768), {"dtype": "int8", "numa": 5}, "not divided", "1, 2, 3, 4, 6, 12;"),
    ("qwen3moe", (2880, 2880), {"dtype": "int8"}, "1440 intermediate", "1, 3, 5, 9, 15, 45;"),
    ("qwen3moe", (2880, 2880), {"dtype": "int4"}, "hidden size 2880", "int4: never"),
    (
        "qwen3moe",
        (192, 256),
        {"dtype": "int4"},
        "hidden size 192",
        "int8 works with --numa 1, 2, 4",
    ),
    ("qwen3moe", (48, 64), {"dtype": "bf16"}, "hidden size 48", "bf16: never"),
    ("gptoss-bf16", (128, 128), {"dtype": "int8"}, "down.bias, gate.bias, up.bias", "hf"),
    (
        "qwen3moe",
        (128, 128),
        {"dtype": "fp16"},
        "cannot write --dtype fp16",
        "int4, int8, bf16, keep",
    ),
    ("qwen3moe", (128, 128), {"dtype": "int8", "tp": 2}, "--tp goes with", "--layout vllm"),
    ("qwen3moe", (128, 128), {"dtype": "int8", "dense_dtype": "fp16"}, "--dense-dtype", "leave"),
]


@pytest.mark.parametrize(("kind", "sizes", "options", "what", "hint"), REFUSALS)
def test_plan_refuses_and_says_what_would_work(
    tmp_path: Path, kind: str, sizes: tuple[int, int], options: dict[str, Any], what: str, hint: str
) -> None:
    size = Size(hidden=sizes[0], intermediate=sizes[1], experts=1)
    write_checkpoint(tmp_path / "src", kind, size)
    with pytest.raises(Refused) as caught:
        api.plan(tmp_path / "src", layout="ktransformers", **options)
    assert what in caught.value.what
    assert hint in f"{caught.value.hint};"


@pytest.mark.parametrize(
    ("fields", "what"),
    [({"hidden_act": "gelu_pytorch_tanh"}, "gelu"), ({"swiglu_limit": 7.0}, "clamps its experts")],
)
def test_refuses_activations_that_kt_kernel_does_not_compute(
    tmp_path: Path, fields: dict[str, Any], what: str
) -> None:
    size = Size(hidden=128, intermediate=128, experts=1)
    write_checkpoint(tmp_path / "src", "qwen3moe", size)
    config = config_of("qwen3moe", size)
    for place in (config | fields, config | {"text_config": fields}):
        (tmp_path / "src" / "config.json").write_text(json.dumps(place))
        with pytest.raises(Refused, match=what):
            api.plan(tmp_path / "src", layout="ktransformers", dtype="int8", numa=1)


def test_experts_without_a_gate_are_refused(tmp_path: Path) -> None:
    config = config_of("qwen3moe", Size(intermediate=128, experts=1))
    config["model_type"] = "nemotron_h"
    prefix = "backbone.layers.0.mixer.experts.0."
    tensors = {f"{prefix}up_proj.weight": torch.zeros(128, 64, dtype=torch.bfloat16)}
    tensors[f"{prefix}down_proj.weight"] = torch.zeros(64, 128, dtype=torch.bfloat16)
    save(tmp_path / "src", config, tensors)
    with pytest.raises(Refused, match="have no gate"):
        api.plan(tmp_path / "src", layout="ktransformers", dtype="int8")


def test_numa_is_a_number_of_parts_and_of_this_layout(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--numa 0"):
        api.plan(KT / "bf16", layout="ktransformers", dtype="int8", numa=0)
    with pytest.raises(Refused, match="--numa goes with --layout ktransformers"):
        api.plan(KT / "bf16", layout="hf", numa=4)


def test_the_layout_and_the_codec_speak_of_the_same_forms() -> None:
    packed = {form.encode: form for form in FORMS if form.encode}
    assert packed.keys() == amx.FORMS.keys()
    for name, form in amx.FORMS.items():
        assert packed[name].bits == form.bits
        # both sides of a slice are a side of a tile; no block of rows is cut short
        assert packed[name].multiple == form.tile_cols == form.block_rows
