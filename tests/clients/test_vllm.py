"""vLLM itself loads what the vllm layout writes, and computes what it computes of the hf form.

MOECONV_VLLM_PYTHON names an interpreter that has vLLM (0.32; its CPU build will do); without it,
this one. Where vLLM sees GPUs it needs two, and may want --pad-intermediate.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

import moeconv.api as api
from tests.checkpoints import Size, write_checkpoint

pytestmark = pytest.mark.client
PYTHON = os.environ.get("MOECONV_VLLM_PYTHON", sys.executable)
SCRIPT = Path(__file__).with_name("vllm_client.py")
RANKS = 2
VOCABULARY = 300
# The CPU build takes heads of 32 and more, and for gpt-oss multiples of 32 columns a rank.
GPT_OSS = Size(layers=2, intermediate=128, head_dim=32, vocab=VOCABULARY)
NAMES = ("gptoss-mxfp4", "qwen3_moe", "qwen3_moe_fp8", "deepseek_v3")


@cache
def missing() -> str:
    """Return why vLLM cannot run, "" if it can."""
    code = "import importlib.util as u; print('there' if u.find_spec('vllm') else '')"
    ran = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=False)
    if "there" in ran.stdout:
        return ""
    return f"{PYTHON} has no vllm: set MOECONV_VLLM_PYTHON"


def write_source(name: str, fixtures: Path, target: Path) -> None:
    if name == "gptoss-mxfp4":
        write_checkpoint(target, name, GPT_OSS)
    else:
        shutil.copytree(fixtures / "vllm" / name / "hf", target)


def generate(directory: Path, load_format: str, target: Path) -> dict[str, Any]:
    """Return what vLLM computes from a directory."""
    command = [PYTHON, SCRIPT, directory, load_format, str(RANKS), target]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    found: dict[str, Any] = json.loads(target.read_text())
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_model_computes_the_same(name: str, fixtures: Path, tmp_path: Path) -> None:
    if missing():
        pytest.skip(missing())
    source, whole, ranks = (tmp_path / one for one in ("source", "hf", "ranks"))
    write_source(name, fixtures, source)
    api.convert(api.plan(source, layout="hf"), whole)
    api.convert(api.plan(source, layout="vllm", tp=RANKS), ranks)

    expected = generate(whole, "auto", tmp_path / "hf.json")
    found = generate(ranks, "sharded_state", tmp_path / "ranks.json")

    print(f"{name}: vLLM {found['version']}, tokens {found['tokens']}")
    numbers = list(chain.from_iterable(expected["logprobs"]))
    assert len(numbers) == len(expected["tokens"]) * VOCABULARY
    assert len(set(numbers)) > len(numbers) // 2  # a model without content would prove nothing
    assert found == expected
