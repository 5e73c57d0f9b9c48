"""`--dtype keep` into the ktransformers layout: the source's bytes under kt-kernel's names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import moeconv.api as api
from moeconv.codecs import CODECS
from moeconv.errors import Refused
from moeconv.layouts.ktransformers import launch_hint
from moeconv.layouts.ktransformers_raw import RAW_FORMS
from moeconv.verify import verify
from tests import amx_oracle
from tests.checkpoints import Size, Tensors, config_of, save

CHECKPOINTS = Path(__file__).parents[1] / "fixtures" / "checkpoints"
Stored = dict[str, tuple[str, list[int], bytes]]


def stored(root: Path) -> Stored:
    """Return every tensor of a directory."""
    found: Stored = {}
    for path in sorted(root.glob("*.safetensors")):
        found |= amx_oracle.stored(path)
    return found


def keep(src: Path, dst: Path, **options: Any) -> Stored:
    """Return the tensors of a keep output, after it was verified against its source."""
    plan = api.plan(src, dst, layout="ktransformers", dtype="keep", **options)
    api.convert(plan, dst)
    report = verify(dst, src)
    assert not report.problems
    return stored(dst)


class Kept(NamedTuple):
    """A fixture: kt-kernel's method, and (in the source, in the output) ends of keys."""

    name: str
    method: str
    renamed: tuple[tuple[str, str], ...] = ()
    dropped: tuple[str, ...] = ()


KEPT = [
    Kept("deepseekv3-fp8-block128", "FP8"),
    Kept("glm4moe-fp8-channel", "FP8_PERCHANNEL"),
    Kept("kimik2-int4-packed-g32", "RAWINT4"),
    Kept("qwen3moe-gptq-int4-g128", "GPTQ_INT4", dropped=("qzeros", "g_idx")),
    Kept("deepseekv4-mxfp4", "MXFP4"),
    Kept("mixtral-mxfp8-ct", "MXFP8", renamed=((".weight_scale", ".weight_scale_inv"),)),
]


def renamed(key: str, kept: Kept) -> str:
    for end, new in kept.renamed:
        if key.endswith(end):
            return key.removesuffix(end) + new
    return key


@pytest.mark.parametrize("kept", KEPT, ids=[one.method for one in KEPT])
def test_the_source_bytes_under_the_names_of_kt_kernel(tmp_path: Path, kept: Kept) -> None:
    """Per expert, byte for byte; what is left out is dropped by a named rule."""
    src = CHECKPOINTS / kept.name
    got = keep(src, tmp_path / "out", numa=1)
    theirs = {key: value for key, value in stored(src).items() if ".experts." in key}
    theirs = {key: value for key, value in theirs.items() if not key.startswith("mtp")}
    left = {key for key in theirs if key.rpartition(".")[2] in kept.dropped}
    assert got == {renamed(key, kept): theirs[key] for key in theirs.keys() - left}
    manifest = json.loads((tmp_path / "out" / "moeconv.json").read_text())
    dropped = manifest["accounting"]["dropped"]
    assert left <= {key for names in dropped.values() for key in names}
    assert manifest["accounting"]["source"]["copied"]["tensors"] == len(got)
    facts = manifest["layout_facts"]
    assert (facts["method"], facts["quantization"]) == (kept.method, "kept")
    hint = f"--kt-weight-path d --kt-method {kept.method} --kt-threadpool-count 1"
    assert launch_hint(facts, "d") == hint


def fp8(*shape: int) -> torch.Tensor:
    return torch.randint(0, 120, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)


BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def fp8_experts(
    prefix: str, intermediate: int = 256, experts: int = 2, *, scale: str = "weight_scale_inv"
) -> Tensors:
    """Return FP8 experts of hidden size 256 with scales per 128 x 128."""
    tensors: Tensors = {}
    for expert in range(experts):
        for name, rows, cols in (
            ("gate", intermediate, 256),
            ("up", intermediate, 256),
            ("down", 256, intermediate),
        ):
            key = f"{prefix}{expert}.{name}_proj."
            tensors[f"{key}weight"] = fp8(rows, cols)
            grid = torch.rand(-(-rows // 128), -(-cols // 128))
            tensors[f"{key}{scale}"] = grid
    return tensors


def write_fp8(
    root: Path,
    tensors: Tensors,
    quantization: dict[str, Any] = BLOCKS,
    *,
    intermediate: int = 256,
) -> Path:
    config = config_of("qwen3moe", Size(hidden=256, intermediate=intermediate, experts=2))
    save(root, config | {"quantization_config": quantization}, tensors)
    return root


def turn(tensor: torch.Tensor, transposed: bool) -> torch.Tensor:
    return tensor.transpose(1, 2) if transposed else tensor


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
def test_stacked_fp8_is_taken_apart(tmp_path: Path, transposed: bool) -> None:
    """[E, 2I, H], or its transpose, becomes one matrix per expert and projection."""
    torch.manual_seed(3)
    gate_up, down = fp8(2, 768, 256), fp8(2, 256, 384)
    scale, down_scale = torch.rand(2, 6, 2), torch.rand(2, 2, 3)
    prefix = "model.layers.0.mlp.experts."
    src = write_fp8(
        tmp_path / "src",
        {
            f"{prefix}gate_up_proj": turn(gate_up, transposed),
            f"{prefix}gate_up_proj_scale_inv": turn(scale, transposed),
            f"{prefix}down_proj": turn(down, transposed),
            f"{prefix}down_proj_scale_inv": turn(down_scale, transposed),
        },
        intermediate=384,
    )
    config = json.loads((src / "config.json").read_text())
    config["model_type"] = "qwen3_vl_moe_text" if transposed else "qwen3_5_moe_text"
    (src / "config.json").write_text(json.dumps(config))
    got = keep(src, tmp_path / "out", numa=3)
    expected: Stored = {}
    for expert in range(2):
        for name, weight, grid in (
            ("gate", gate_up[expert, :384], scale[expert, :3]),
            ("up", gate_up[expert, 384:], scale[expert, 3:]),
            ("down", down[expert], down_scale[expert]),
        ):
            key = f"{prefix}{expert}.{name}_proj."
            data = weight.contiguous().view(torch.uint8).numpy().tobytes()
            expected[f"{key}weight"] = ("F8_E4M3", list(weight.shape), data)
            data = grid.contiguous().numpy().tobytes()
            expected[f"{key}weight_scale_inv"] = ("F32", list(grid.shape), data)
    assert got == expected


def test_input_scales_are_dropped_by_name(tmp_path: Path) -> None:
    tensors = fp8_experts("model.layers.0.mlp.experts.")
    extra = "model.layers.0.mlp.experts.1.up_proj.input_scale"
    src = write_fp8(tmp_path / "src", tensors | {extra: torch.ones(())})
    assert keep(src, tmp_path / "out").keys() == tensors.keys()
    facts = json.loads((tmp_path / "out" / "moeconv.json").read_text())
    assert facts["accounting"]["dropped"] == {"kt-kernel has no scales of activations": [extra]}


def test_plain_bf16_is_the_bf16_form(tmp_path: Path) -> None:
    src = CHECKPOINTS.parent / "ktransformers" / "bf16"
    keep(src, tmp_path / "keep")
    api.convert(api.plan(src, layout="ktransformers", dtype="bf16"), tmp_path / "bf16")
    assert stored(tmp_path / "keep") == stored(tmp_path / "bf16") != {}


def narrowed(tensors: Tensors) -> Tensors:
    key = "model.layers.0.mlp.experts.1.up_proj.weight_scale_inv"
    return tensors | {key: tensors[key].bfloat16()}


def half_plain(tensors: Tensors) -> Tensors:
    key = "model.layers.0.mlp.experts.1.up_proj.weight"
    found = tensors | {key: torch.zeros(256, 256, dtype=torch.bfloat16)}
    del found[f"{key}_scale_inv"]
    return found


@pytest.mark.parametrize(("change", "what"), [(narrowed, "F32"), (half_plain, "fp8-block, float")])
def test_experts_of_two_kinds_are_refused(
    tmp_path: Path, change: Callable[[Tensors], Tensors], what: str
) -> None:
    """kt-kernel looks at the first scale's dtype, and reads the others' bytes as that."""
    src = write_fp8(tmp_path / "src", change(fp8_experts("model.layers.0.mlp.experts.")))
    with pytest.raises(Refused, match=what):
        api.plan(src, layout="ktransformers", dtype="keep")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("mixtral-fp8-tensor-modelopt", "fp8-tensor"),
        ("qwen3moe-awq-int4-g32", "awq"),
        ("qwen3moe-nvfp4-ct", "nvfp4-ct"),
        ("qwen3moe-nvfp4-modelopt-dev", "nvfp4-modelopt"),
        ("gptoss-mxfp4", "down.bias, gate.bias, up.bias"),
    ],
)
def test_forms_that_kt_kernel_does_not_load_are_refused(name: str, what: str) -> None:
    with pytest.raises(Refused, match=what) as caught:
        api.plan(CHECKPOINTS / name, layout="ktransformers", dtype="keep")
    assert caught.value.exit_code == 3
    if "bias" not in what:
        for works in ("int4, int8 or bf16", "FP8", "RAWINT4", "GPTQ_INT4", "MXFP4", "MXFP8"):
            assert works in str(caught.value.hint)


def test_a_gguf_source_is_not_kept() -> None:
    source = CHECKPOINTS / "gguf-qwen3moe-q8_0"
    with pytest.raises(Refused, match="safetensors has no dtype") as caught:
        api.plan(
            source / "model.gguf",
            config=source / "hf_config.json",
            layout="ktransformers",
            dtype="keep",
        )
    assert "kt-kernel reads the GGUF file" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("quantization", "what"),
    [
        ({"desc_act": True}, "activation order"),
        ({"sym": False}, "asymmetric"),
    ],
)
def test_gptq_is_symmetric_and_in_order(
    tmp_path: Path, quantization: dict[str, Any], what: str
) -> None:
    src = tmp_path / "src"
    source = CHECKPOINTS / "qwen3moe-gptq-int4-g128"
    src.mkdir()
    for path in source.iterdir():
        (src / path.name).write_bytes(path.read_bytes())
    for name in ("config.json", "quantize_config.json"):
        if (src / name).exists():
            config = json.loads((src / name).read_text())
            config.get("quantization_config", config).update(quantization)
            (src / name).write_text(json.dumps(config))
    with pytest.raises(Refused, match=what):
        api.plan(src, layout="ktransformers", dtype="keep", numa=1)


def test_fp8_parts_are_whole_blocks(tmp_path: Path) -> None:
    """kt-kernel ends the process where the slice of a NUMA node cuts a block."""
    tensors = fp8_experts("model.layers.0.mlp.experts.", intermediate=384)
    src = write_fp8(tmp_path / "src", tensors, intermediate=384)
    with pytest.raises(Refused, match=r"192 intermediate rows per NUMA part") as caught:
        api.plan(src, layout="ktransformers", dtype="keep", numa=2)
    assert "--dtype keep works with --numa 1, 3;" in str(caught.value.hint)
    plan = api.plan(src, layout="ktransformers", dtype="keep", numa=3)
    assert plan.notes[-1].endswith("into parts: 1, 3")
    blocks = BLOCKS | {"weight_block_size": [64, 128]}
    src = write_fp8(tmp_path / "fine", fine_blocks(), blocks)
    with pytest.raises(Refused, match="blocks have 64 rows, not 128"):
        api.plan(src, layout="ktransformers", dtype="keep")


def fine_blocks() -> Tensors:
    tensors = fp8_experts("model.layers.0.mlp.experts.")
    return {
        key: torch.rand(4, 2) if key.endswith("_inv") else value for key, value in tensors.items()
    }


def test_rawint4_says_which_backend_computes_it() -> None:
    src = CHECKPOINTS / "kimik2-int4-packed-g32"
    plan = api.plan(src, layout="ktransformers", dtype="keep", numa=3)
    assert "KT_RAWINT4_BACKEND=avxvnni" in plan.notes[-1]  # 32 rows per part


def test_a_clamp_goes_with_some_forms(tmp_path: Path) -> None:
    """deepseekv4-mxfp4 has one too; GPTQ_INT4 would ignore it."""
    src = tmp_path / "src"
    src.mkdir()
    for path in (CHECKPOINTS / "glm4moe-fp8-channel").iterdir():
        (src / path.name).write_bytes(path.read_bytes())
    config = json.loads((src / "config.json").read_text()) | {"swiglu_limit": 7.0}
    (src / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refused, match="clamps its experts"):
        api.plan(src, layout="ktransformers", dtype="keep", numa=1)


def test_every_form_is_a_codec() -> None:
    assert RAW_FORMS.keys() <= CODECS.keys()
