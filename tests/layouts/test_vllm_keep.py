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
