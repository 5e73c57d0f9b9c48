"""`--dtype keep` into the vllm layout against vLLM's own states of quantized checkpoints."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import moeconv
import moeconv.api as api
from tests.layouts.test_vllm_state import read_output

FIXTURES = Path(__file__).parents[1] / "fixtures"
STATES = FIXTURES / "vllm"
WHOLE = [
    (STATES / name / "hf", dump)
    for name in ("qwen3_moe_fp8", "qwen3_moe_fp8_refined", "gpt_oss_mxfp4")
    for dump in sorted((STATES / name).glob("tp*.json"))
]
CHECKPOINTS = [
    (FIXTURES / "checkpoints" / path.name.split(".")[0], path)
    for path in sorted((STATES / "checkpoints").glob("*.json"))
]
# vLLM has no place for Kimi-K2's correction bias unless its config says these.
EXTRA_CONFIG = {
    "kimik2-int4-packed-g32": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
}
# Groups of 128 over 32 columns: vLLM rounds their number down and holds no scales at all.
WITHOUT_ROOM = {
    "qwen3moe-gptq-int4-g128": {
        "model.layers.0.self_attn.o_proj.scales",
        "model.layers.0.self_attn.o_proj.qzeros",
    },
}


def test_there_are_dumps_of_every_kind() -> None:
    assert len(WHOLE) == 3
    assert len(CHECKPOINTS) >= 8


def as_loaded(out: Path, rank: int, key: str) -> list[object]:
    """Return what a BF16 parameter holds once vLLM has copied a kept F16 tensor into it."""
    (path,) = out.glob(f"model-rank-{rank}-part-*.safetensors")
    with safe_open(path, framework="pt") as file:
        value = file.get_tensor(key).bfloat16()
    digest = hashlib.sha256(value.view(torch.int16).numpy().tobytes()).hexdigest()
    return ["BF16", list(value.shape), digest]


@pytest.mark.parametrize(
    ("source", "dump"), WHOLE + CHECKPOINTS, ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_state_is_vllms_own(source: Path, dump: Path, tmp_path: Path) -> None:
    match = re.search(r"tp(\d+)(ep)?$", dump.stem)
    assert match is not None
    tp = int(match[1])
    shutil.copytree(source, tmp_path / "in")
    config = json.loads((source / "config.json").read_text())
    config |= EXTRA_CONFIG.get(source.name, {})
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    plan = api.plan(tmp_path / "in", out, layout="vllm", dtype="keep", tp=tp, ep=bool(match[2]))
    api.convert(plan, out)
    expected = json.loads(dump.read_text())
    for rank in range(tp):
        found, wanted = read_output(out, rank), expected[str(rank)]
        assert found.keys() - wanted.keys() == WITHOUT_ROOM.get(source.name, set())
        assert not wanted.keys() - found.keys()
        for key, (dtype, shape, digest) in wanted.items():
            if found[key][0] == "F16" and dtype == "BF16":
                found[key] = as_loaded(out, rank, key)
            assert found[key][:2] == [dtype, shape], key
            assert digest is None or found[key][2] == digest, key
    assert json.loads((out / "config.json").read_text()) == config


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_of_16_bits_are_repeated(dtype: torch.dtype, tmp_path: Path) -> None:
    """Ranks that cut a block take a finer grid of the same numbers, in vLLM's float32."""
    source, tp = STATES / "qwen3_moe_fp8_refined" / "hf", 2
    shutil.copytree(source, tmp_path / "narrow")
    for path in (tmp_path / "narrow").glob("*.safetensors"):
        stored = load_file(path)
        stored |= {key: value.to(dtype) for key, value in stored.items() if is_scale(key)}
        save_file(stored, path, {"format": "pt"})
    for name, root in (("wide", source), ("narrow", tmp_path / "narrow")):
        out = tmp_path / f"{name}-out"
        plan = api.plan(root, out, layout="vllm", dtype="keep", tp=tp)
        assert "repeated" in {weight.codec for weight in plan.weights}
        api.convert(plan, out)
    for rank in range(tp):
        wide, narrow = (read_rank(tmp_path / f"{name}-out", rank) for name in ("wide", "narrow"))
        assert wide.keys() == narrow.keys()
        for key, value in wide.items():
            assert equal(narrow[key], value.to(dtype).float() if is_scale(key) else value), key


def is_scale(key: str) -> bool:
    return key.endswith("scale_inv")


def quantize_blocks(root: Path, source: Path, block: int) -> dict[str, torch.Tensor]:
    """Write a model's linears as random FP8 blocks; return all of its tensors."""
    generator = torch.Generator().manual_seed(5)
    tensors: dict[str, torch.Tensor] = {}
    for name, value in load_file(source / "model.safetensors").items():
        tensors[name] = value
        if name.endswith("_proj.weight") or name.endswith("kv_a_proj_with_mqa.weight"):
            codes = torch.randint(0, 0x7F, value.shape, generator=generator, dtype=torch.uint8)
            tensors[name] = codes.view(torch.float8_e4m3fn)
            grid = [-(-size // block) for size in value.shape]
            tensors[f"{name}_scale_inv"] = torch.rand(grid, generator=generator)
    root.mkdir()
    save_file(tensors, root / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [block, block],
    }
    (root / "config.json").write_text(json.dumps(config))
    return tensors


def read_rank(out: Path, rank: int) -> dict[str, torch.Tensor]:
    return load_file(out / f"model-rank-{rank}-part-0.safetensors")


def share(value: torch.Tensor, rank: int, tp: int, dim: int = 0) -> torch.Tensor:
    return value.chunk(tp, dim=dim)[rank]


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether dtype, shape and bits are the same."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    views = [x.contiguous().flatten().view(torch.uint8) for x in (one, other)]
    return torch.equal(*views)


@pytest.mark.parametrize("ep", [False, True])
def test_fp8_mla_against_slices_by_hand(ep: bool, tmp_path: Path) -> None:
    """No dump of vLLM has quantized MLA: slices of every part, as the BF16 rows are split."""
    tp = 2
    source = quantize_blocks(tmp_path / "in", STATES / "deepseek_v3" / "hf", block=8)
    plan = api.plan(tmp_path / "in", tmp_path / "out", layout="vllm", dtype="keep", tp=tp, ep=ep)
    api.convert(plan, tmp_path / "out")
    assert moeconv.verify(tmp_path / "out", source=tmp_path / "in").ok
    attention = "model.layers.1.self_attn."
    for rank in range(tp):
        found = read_rank(tmp_path / "out", rank)
        assert not any(name.endswith("mla_attn.q_scale") for name in found)
        for part in ("weight", "weight_scale_inv"):

            def of(name: str, dim: int | None = None, part: str = part) -> torch.Tensor:
                value = source[f"{name}.{part}"]
                return value if dim is None else share(value, rank, tp, dim)  # noqa: B023

            a = torch.cat([of(attention + "q_a_proj"), of(attention + "kv_a_proj_with_mqa")])
            assert equal(found[f"{attention}fused_qkv_a_proj.{part}"], a)
            rows = of(attention + "q_b_proj", 0)
            assert equal(found[f"{attention}mla_attn.q_b_proj.{part}"], rows)
            assert equal(found[f"{attention}kv_b_proj.{part}"], of(attention + "kv_b_proj", 0))
            columns = of(attention + "o_proj", 1)
            assert equal(found[f"{attention}mla_attn.o_proj.{part}"], columns)
            for target, stem in (
                ("model.layers.0.mlp.", "model.layers.0.mlp."),
                ("model.layers.1.mlp.experts._shared_experts._layer.",) * 2,
            ):
                stem = stem.replace("experts._shared_experts._layer.", "shared_experts.")
                both = torch.cat([of(f"{stem}gate_proj", 0), of(f"{stem}up_proj", 0)])
                assert equal(found[f"{target}gate_up_proj.{part}"], both)
                assert equal(found[f"{target}down_proj.{part}"], of(f"{stem}down_proj", 1))
            mlp = "model.layers.1.mlp.experts."
            w13 = found[f"{mlp}routed_experts.w13_{part}"]
            w2 = found[f"{mlp}routed_experts.w2_{part}"]
            first = rank * len(w13) if ep else 0
            for slot in range(len(w13)):
                stem = f"{mlp}{first + slot}."
                halves = [of(f"{stem}{which}_proj", None if ep else 0) for which in ("gate", "up")]
                assert equal(w13[slot], torch.cat(halves))
                assert equal(w2[slot], of(f"{stem}down_proj", None if ep else 1))


def test_awq_against_slices_by_hand(tmp_path: Path) -> None:
    tp, root = 2, FIXTURES / "checkpoints" / "qwen3moe-awq-int4-g32"
    out = tmp_path / "out"
    api.convert(api.plan(root, out, layout="vllm", dtype="keep", tp=tp), out)
    source = load_file(root / "model.safetensors")
    layer = "model.layers.0."
    for rank in range(tp):
        found = read_rank(out, rank)
        for part in ("qweight", "qzeros", "scales"):  # K-major: out features are the columns
            query, key, value = (source[f"{layer}self_attn.{w}_proj.{part}"] for w in "qkv")
            heads = torch.cat([share(query, rank, tp, 1), key, value], dim=1)  # one kv head
            assert equal(found[f"{layer}self_attn.qkv_proj.{part}"], heads)
            for expert in range(found[f"{layer}mlp.experts.routed_experts.w13_{part}"].shape[0]):
                stem = f"{layer}mlp.experts.{expert}."
                names = [f"{stem}{which}_proj.{part}" for which in ("gate", "up")]
                w13 = torch.cat([share(source[name], rank, tp, 1) for name in names], dim=1)
                w2 = share(source[f"{stem}down_proj.{part}"], rank, tp, 0)
                assert equal(found[f"{layer}mlp.experts.routed_experts.w13_{part}"][expert], w13)
                assert equal(found[f"{layer}mlp.experts.routed_experts.w2_{part}"][expert], w2)
