"""vLLM's own state, reproduced: same keys, dtypes, shapes and bytes of every tensor on every rank.

The dumps were made by vLLM 0.32.0 (tests/fixtures/vllm/README.md), not by this project.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
from safetensors import safe_open

import moeconv.api as api
from moeconv.store.safetensors import read_header

STATES = Path(__file__).parents[1] / "fixtures" / "vllm"
QUANTIZED = ("qwen3_moe_fp8", "qwen3_moe_fp8_refined", "gpt_oss_mxfp4")  # in test_vllm_keep
DUMPS = sorted(path for path in STATES.glob("*/tp*.json") if path.parent.name not in QUANTIZED)


def read_output(directory: Path, rank: int) -> dict[str, list[object]]:
    """Return {key: [dtype, shape, sha256 of the bytes]} of one rank's files."""
    found: dict[str, list[object]] = {}
    for path in sorted(directory.glob(f"model-rank-{rank}-part-*.safetensors")):
        with path.open("rb") as file:
            for ref in read_header(path, path.name).tensors:
                file.seek(ref.offset)
                digest = hashlib.sha256(file.read(ref.nbytes)).hexdigest()
                assert ref.name not in found
                found[ref.name] = [ref.dtype, list(ref.shape), digest]
        with safe_open(path, framework="np") as official:  # the official reader takes it too
            assert set(official.keys()) <= set(found)
    return found


def test_there_are_dumps() -> None:
    assert len(DUMPS) >= 15
    assert {path.parent.name for path in DUMPS} >= {"gpt_oss", "mixtral", "qwen3_moe"}


@pytest.mark.parametrize("dump", DUMPS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_state_is_vllms_own(dump: Path, tmp_path: Path) -> None:
    match = re.fullmatch(r"tp(\d+)(ep)?", dump.stem)
    assert match is not None
    tp = int(match[1])
    plan = api.plan(dump.parent / "hf", tmp_path / "out", layout="vllm", tp=tp, ep=bool(match[2]))
    api.convert(plan, tmp_path / "out")
    expected = json.loads(dump.read_text())
    for rank in range(tp):
        assert read_output(tmp_path / "out", rank) == expected[str(rank)]


@pytest.mark.parametrize(
    "source",
    [
        *(f"vllm/{name}/hf" for name in QUANTIZED),
        "checkpoints/deepseekv3-fp8-block128",
        "checkpoints/glm4moe-fp8-channel",
        "checkpoints/mixtral-fp8-tensor-modelopt",
        "checkpoints/mixtral-mxfp8-ct",
    ],
)
def test_a_decoded_model_has_the_state_of_one_that_never_was_quantized(
    source: str, tmp_path: Path
) -> None:
    whole, ranks, again = (tmp_path / name for name in ("whole", "ranks", "again"))
    given = STATES.parent / source
    api.convert(api.plan(given), whole)
    api.convert(api.plan(given, layout="vllm", tp=2), ranks)
    api.convert(api.plan(whole, layout="vllm", tp=2), again)
    for rank in range(2):
        assert read_output(ranks, rank) == read_output(again, rank)
