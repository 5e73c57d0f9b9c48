"""`--dtype keep` into the hf layout: every tensor of the source, byte for byte, and its config."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import moeconv.api as api
from moeconv.errors import Refused
from moeconv.keeping import keeps_quantization
from moeconv.layouts.options import Options
from moeconv.store.safetensors import read_header
from moeconv.types import TensorRef

CHECKPOINTS = Path(__file__).parents[1] / "fixtures" / "checkpoints"
NAMES = sorted(path.parent.name for path in CHECKPOINTS.glob("*/model.safetensors"))
QUANTIZED = (
    "deepseekv3-fp8-block128",
    "deepseekv4-mxfp4",
    "glm4moe-fp8-channel",
    "gptoss-mxfp4",
    "kimik2-int4-packed-g32",
    "mixtral-fp8-tensor-modelopt",
    "mixtral-mxfp8-ct",
    "qwen3moe-awq-int4-g32",
    "qwen3moe-gptq-int4-g128",
    "qwen3moe-nvfp4-ct",
    "qwen3moe-nvfp4-modelopt-dev",
)


def read_tensors(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return {name: (dtype, shape, bytes)} of all files of a directory."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            for ref in read_header(path, path.name).tensors:
                file.seek(ref.offset)
                found[ref.name] = (ref.dtype, tuple(ref.shape), file.read(ref.nbytes))
    return found


def test_all_kinds_are_here() -> None:
    assert set(NAMES) >= set(QUANTIZED)


@pytest.mark.parametrize("name", NAMES)
def test_kept_tensors_are_the_sources_own(name: str, tmp_path: Path) -> None:
    source = CHECKPOINTS / name
    plan = api.plan(source, tmp_path / "out", layout="hf", dtype="keep")
    api.convert(plan, tmp_path / "out")
    assert read_tensors(tmp_path / "out") == read_tensors(source)
    configs = [path.name for path in source.glob("*.json") if not path.name.endswith("index.json")]
    for config in configs:
        expected = json.loads((source / config).read_text())
        assert json.loads((tmp_path / "out" / config).read_text()) == expected
    totals = plan.accounting.totals()
    assert totals["copied"][0] == len(read_tensors(source))
    assert not any(totals[state][0] for state in ("decoded", "codec part", "dropped"))


def test_experts_alone_keep_their_parts(tmp_path: Path) -> None:
    source = CHECKPOINTS / "mixtral-fp8-tensor-modelopt"
    plan = api.plan(source, tmp_path / "out", layout="hf", dtype="keep", experts_only=True)
    api.convert(plan, tmp_path / "out")
    expected = {name: one for name, one in read_tensors(source).items() if ".experts." in name}
    assert any(name.endswith("input_scale") for name in expected)
    assert read_tensors(tmp_path / "out") == expected
    assert not (tmp_path / "out" / "config.json").exists()


def test_unquantized_experts_may_stay_while_the_rest_is_cast(tmp_path: Path) -> None:
    source = CHECKPOINTS / "gptoss-mxfp4"
    plan = api.plan(source, tmp_path / "out", layout="hf", dtype="keep", dense_dtype="fp16")
    api.convert(plan, tmp_path / "out")
    before, after = read_tensors(source), read_tensors(tmp_path / "out")
    for name, one in before.items():
        if "experts" in name:
            assert after[name] == one
        else:
            assert after[name][0] == ("F16" if one[0] == "BF16" else one[0])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "mxfp4"
    assert config.get("dtype", config.get("torch_dtype")) == "float16"


@pytest.mark.parametrize("layout", ["hf", "vllm"])
def test_gguf_blocks_cannot_be_kept(layout: str) -> None:
    model = api.inspect(CHECKPOINTS / "gptoss-mxfp4")
    first = model.weights[0]
    ref = TensorRef("blk.0.ffn_up_exps.weight", "GGML:Q8_0", (4, 64, 34), "m.gguf", 0, 8704)
    block = replace(first, codec="ggml", parts={"weight": ref}, params={"type": "Q8_0"})
    held = replace(model, weights=(block, *model.weights[1:]))
    with pytest.raises(Refused, match="no dtype for GGUF's blocks") as caught:
        keeps_quantization(held, Options(layout=layout, dtype="keep"))
    assert "--dtype bf16" in caught.value.hint


@pytest.mark.parametrize("options", [{"dense_dtype": "bf16"}, {"dtype": "bf16"}])
def test_half_a_quantization_is_refused(options: dict[str, str], tmp_path: Path) -> None:
    source = CHECKPOINTS / "deepseekv3-fp8-block128"
    chosen = {"dtype": "keep", "dense_dtype": "keep", **options}
    with pytest.raises(Refused, match=r"config\.json cannot say so"):
        api.plan(source, tmp_path / "out", layout="hf", **chosen)
