"""Checkpoints that other tools wrote, converted whole and compared with those tools' own numbers.

The oracles hold `layers.L.experts.E.{gate,up,down}.weight` [out, in] and `other.MODULE.weight`;
which output tensor that is, and where in it, is written down here and not asked of moeconv.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from moeconv import api

Tensors = Mapping[str, torch.Tensor]
Slice = Callable[[Tensors, str, int, str], torch.Tensor]
W123 = {"gate": "w1", "up": "w3", "down": "w2"}


def one_by_one(pattern: str, names: Mapping[str, str] | None = None) -> Slice:
    def take(tensors: Tensors, layer: str, expert: int, what: str) -> torch.Tensor:
        projection, _, part = what.partition(".")
        word = names[projection] if names else f"{projection}_proj"
        return tensors[f"{pattern.format(layer)}.{expert}.{word}.{part}"]

    return take


def packed_rows(pattern: str) -> Slice:
    def take(tensors: Tensors, layer: str, expert: int, what: str) -> torch.Tensor:
        if what == "down.weight":
            return tensors[f"{pattern.format(layer)}.down_proj"][expert]
        gate, up = tensors[f"{pattern.format(layer)}.gate_up_proj"][expert].chunk(2)
        return gate if what == "gate.weight" else up

    return take


def gpt_oss(tensors: Tensors, layer: str, expert: int, what: str) -> torch.Tensor:
    projection, _, part = what.partition(".")
    base = f"model.layers.{layer}.mlp.experts"
    name = "down_proj" if projection == "down" else "gate_up_proj"
    stored = tensors[f"{base}.{name}" + ("_bias" if part == "bias" else "")][expert]
    if projection == "down":
        return stored if part == "bias" else stored.T
    rows = stored[..., (0 if projection == "gate" else 1) :: 2]
    return rows if part == "bias" else rows.T


class Case(NamedTuple):
    """A fixture: where its experts are in the output, and what its oracle is written in."""

    name: str
    take: Slice
    dtype: str = "bf16"
    unsigned_zero: bool = False  # ModelOpt's table of FP4 values has no -0


QWEN = one_by_one("model.layers.{}.mlp.experts")
MIXTRAL = one_by_one("model.layers.{}.block_sparse_moe.experts", W123)
CASES = (
    Case("deepseekv3-bf16-mtp", QWEN),
    Case("deepseekv3-fp8-block128", QWEN),
    Case("deepseekv4-mxfp4", one_by_one("layers.{}.ffn.experts", W123)),
    Case("glm4moe-fp8-channel", QWEN),
    Case("gptoss-bf16", gpt_oss),
    Case("gptoss-mxfp4", gpt_oss),
    Case("kimik2-int4-packed-g32", QWEN),
    Case("mixtral-bf16", MIXTRAL),
    Case("mixtral-mxfp8-ct", MIXTRAL),
    Case("qwen35moe-vl-bf16-packed", packed_rows("model.language_model.layers.{}.mlp.experts")),
    Case("qwen3moe-awq-int4-g32", QWEN),
    Case("qwen3moe-bf16", QWEN),
    Case("qwen3moe-gptq-int4-g128", QWEN, "fp16"),
    Case("qwen3moe-nvfp4-ct", QWEN),
    Case("qwen3moe-nvfp4-modelopt-dev", QWEN, unsigned_zero=True),
)


def convert(fixtures: Path, tmp_path: Path, name: str, dtype: str) -> dict[str, torch.Tensor]:
    """Return every tensor of the fixture's conversion."""
    plan = api.plan(fixtures / "checkpoints" / name, layout="hf", dtype=dtype)
    api.convert(plan, tmp_path / "out")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(set(index["weight_map"].values())):
        tensors |= load_file(tmp_path / "out" / file)
    assert set(tensors) == set(index["weight_map"])
    return tensors


def pairs(oracle: Tensors, output: Tensors, take: Slice) -> dict[str, tuple[torch.Tensor, ...]]:
    """Return the oracle's name -> (its tensor, the output's)."""
    found = {}
    for name, expected in oracle.items():
        if name.startswith("other."):
            found[name] = (expected, output[name.removeprefix("other.")])
            continue
        _, layer, _, expert, what = name.split(".", 4)
        found[name] = (expected, take(output, layer, int(expert), what))
    return found


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_tools_own_numbers(case: Case, fixtures: Path, tmp_path: Path) -> None:
    oracle = load_file(fixtures / "oracles" / case.name / "dequantized.safetensors")
    output = convert(fixtures, tmp_path, case.name, case.dtype)
    for name, (expected, found) in pairs(oracle, output, case.take).items():
        assert found.dtype == expected.dtype, name
        if case.unsigned_zero:
            found = torch.where(found == 0, torch.zeros_like(found), found)
        assert torch.equal(bits(found), bits(expected)), name


def test_modelopt_rounds_its_fp8_scale_first(fixtures: Path, tmp_path: Path) -> None:
    """ModelOpt's FP8QTensor.dequantize rounds the scale to bf16 before it multiplies."""
    name = "mixtral-fp8-tensor-modelopt"
    oracle = load_file(fixtures / "oracles" / name / "dequantized.safetensors")
    source = load_file(fixtures / "checkpoints" / name / "model.safetensors")
    output = convert(fixtures, tmp_path, name, "bf16")
    differing = 0
    for key, (expected, found) in pairs(oracle, output, MIXTRAL).items():
        base = key.removeprefix("other.").removesuffix(".weight")
        if not key.startswith("other."):
            _, layer, _, expert, what = key.split(".", 4)
            word = W123[what.partition(".")[0]]
            base = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{word}"
        codes, scale = source[f"{base}.weight"], source[f"{base}.weight_scale"]
        rounded = codes.to(torch.bfloat16) * scale.to(torch.bfloat16)
        assert torch.equal(bits(rounded), bits(expected)), key  # what the tool does
        exact = (codes.float() * scale).to(torch.bfloat16)
        assert torch.equal(bits(exact), bits(found)), key  # what moeconv does
        differing += int((bits(exact) != bits(rounded)).sum())
    assert differing > 0


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_keys_say_which_projection_it_is(case: Case, fixtures: Path) -> None:
    """gate is what the oracle calls gate: converting to the source's own names cannot show that."""
    root = fixtures / "checkpoints" / case.name
    oracle = load_file(fixtures / "oracles" / case.name / "dequantized.safetensors")
    numbers = iter(range(1 << 30))
    marks: dict[str, torch.Tensor] = {}
    lands: dict[tuple[str, int | None, str], torch.Tensor] = {}
    for file in api.plan(root).files:
        for draft in (tensor.draft for tensor in file.tensors):
            mark = torch.tensor([next(numbers) for _ in range(draft.slots * draft.rows)])
            wide = mark.reshape(draft.slots, draft.rows, 1).expand(-1, -1, draft.cols)
            stored = wide.transpose(1, 2) if draft.transposed else wide
            marks[draft.name] = stored.reshape(draft.shape)
            for fill in draft.fills:
                rows = slice(fill.at_row, None, fill.row_step)
                for slot, expert in enumerate(fill.experts or ()):
                    key = (f"{fill.layer}", expert, fill.name)
                    lands[key] = wide[slot, rows][: fill.own_rows]
    for name in oracle:
        if not name.startswith("other."):
            _, layer, _, expert, what = name.split(".", 4)
            found = lands[layer, int(expert), what.removesuffix(".weight")]
            expected = case.take(marks, layer, int(expert), what)
            assert torch.equal(found.reshape(expected.shape), expected), name


# Published models hold these in F32; the fixtures' were cast to BF16 before they became GGUF.
F32_ENDINGS: Mapping[str, tuple[str, ...]] = {
    "dots1": ("mlp.gate.e_score_correction_bias",),
    "ernie45moe": ("mlp.moe_statics.e_score_correction_bias", "mlp.gate.weight"),
    "glm4moe": ("mlp.gate.e_score_correction_bias",),
}
GGUF_MODELS = ("dots1", "ernie45moe", "glm4moe", "gptoss", "olmoe", "qwen2moe", "qwen3moe")


@pytest.mark.parametrize("name", GGUF_MODELS)
def test_gguf_comes_back_as_the_model_that_it_was(
    name: str, fixtures: Path, tmp_path: Path
) -> None:
    """BF16 -> GGUF by llama.cpp -> BF16: every tensor's name, shape, dtype and bits."""
    oracle = load_file(fixtures / "oracles" / f"gguf-llamacpp-{name}" / "model.safetensors")
    for key in oracle:
        if key.endswith(F32_ENDINGS.get(name, ())):
            oracle[key] = oracle[key].float()
    output = convert(fixtures, tmp_path, f"gguf-llamacpp-{name}", "bf16")
    assert {key: (t.dtype, t.shape) for key, t in output.items()} == {
        key: (t.dtype, t.shape) for key, t in oracle.items()
    }
    for key, expected in oracle.items():
        assert torch.equal(bits(output[key]), bits(expected)), key


GGUF_EXPERTS = (
    Case("gguf-gptoss-mxfp4", gpt_oss),
    Case("gguf-qwen3moe-bf16", QWEN),
    Case("gguf-qwen3moe-q4_k_m", QWEN),
    Case("gguf-qwen3moe-q8_0", QWEN),
)


@pytest.mark.parametrize("case", GGUF_EXPERTS, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gguf_experts_equal_ggmls_own_numbers(
    case: Case, dtype: str, fixtures: Path, tmp_path: Path
) -> None:
    """F32 as gguf-py and ggml decode them; BF16 is that rounded once."""
    oracle = load_file(fixtures / "oracles" / case.name / "dequantized.safetensors")
    output = convert(fixtures, tmp_path, case.name, dtype)
    for name, (exact, found) in pairs(oracle, output, case.take).items():
        expected = exact if dtype == "fp32" else exact.to(torch.bfloat16)
        assert torch.equal(bits(found), bits(expected)), name


def test_every_fixture_has_a_case(fixtures: Path) -> None:
    here = {case.name for case in CASES} | {"mixtral-fp8-tensor-modelopt"}
    folders = {path.name for path in (fixtures / "checkpoints").iterdir()}
    here |= {case.name for case in GGUF_EXPERTS} | {f"gguf-llamacpp-{n}" for n in GGUF_MODELS}
    assert folders == here
