"""What a plan's workload says is what a conversion then does."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import moeconv
from moeconv import decoding, process
from moeconv.convert import chosen_files
from moeconv.demo import DemoSizes, make_checkpoint
from moeconv.kernels.cpu import copies
from moeconv.measure.figures import COPY, DIGEST, TRANSPOSE
from moeconv.tasks import build_tasks
from moeconv.workload import Workload, workload_of

SIZES = DemoSizes(2, 4, 64, 64, heads=4, kv_heads=2, head_dim=16, vocab=128)


def planned(src: Path, **options: Any) -> tuple[moeconv.Plan, Workload]:
    plan = moeconv.plan(src, **options)
    tasks = build_tasks(plan.weights, plan.files)
    return plan, workload_of(plan, tasks, frozenset(chosen_files(plan)))


def test_by_hand(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, SIZES)
    plan, found = planned(tmp_path)
    experts = SIZES.layers * SIZES.experts * 3 * SIZES.hidden * SIZES.intermediate * 2
    tensors = sum(tensor.nbytes for file in plan.files for tensor in file.tensors)
    assert found.read_nbytes == sum(ref.nbytes for ref in plan.model.source.tensors.values())
    assert found.written_nbytes == tensors
    assert found.slow == {}
    assert found.work["mxfp4"] == experts
    assert found.work[TRANSPOSE] == experts  # gpt-oss' BF16 form is [in, out]
    assert found.work[DIGEST] == tensors


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gptoss-mxfp4", {"layout": "vllm", "tp": 2}),
        ("gptoss-bf16", {"layout": "vllm"}),
        ("gptoss-bf16", {"dtype": "fp16"}),
        ("mixtral-bf16", {"layout": "vllm", "tp": 2}),
        ("deepseekv3-fp8-block128", {}),
        ("deepseekv3-fp8-block128", {"layout": "vllm", "tp": 2, "ep": True}),
        ("qwen3moe-gptq-int4-g128", {"layout": "ktransformers", "dtype": "int4", "numa": 1}),
        ("qwen3moe-gptq-int4-g128", {"dtype": "keep"}),
        ("gptoss-mxfp4", {"dtype": "fp32"}),
        ("kimik2-int4-packed-g32", {"dtype": "fp32"}),
        ("gguf-qwen3moe-q4_k_m", {}),
    ],
)
def test_a_conversion_does_as_much(
    name: str,
    options: dict[str, Any],
    fixtures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: Counter[str] = Counter()
    real = copies.copy_into

    def copy_into(dst: Any, src: Any) -> None:
        crossed = src.size and src.flags.f_contiguous != dst.flags.f_contiguous
        done[TRANSPOSE if crossed else COPY] += dst.size * 2 if crossed else dst.nbytes
        real(dst, src)

    monkeypatch.setattr(process, "copy_into", copy_into)
    monkeypatch.setattr(decoding, "copy_into", copy_into)
    plan, found = planned(fixtures / "checkpoints" / name, **options)
    result = moeconv.convert(plan, tmp_path / "dst")
    assert found.written_nbytes == result.nbytes
    assert found.read_nbytes == pytest.approx(result.read_nbytes, rel=0.01)
    assert (found.work.get(TRANSPOSE, 0), found.work.get(COPY, 0)) == (done[TRANSPOSE], done[COPY])


def test_only_the_chosen_ranks(fixtures: Path) -> None:
    source = fixtures / "checkpoints" / "mixtral-bf16"
    _, both = planned(source, layout="vllm", tp=2)
    _, one = planned(source, layout="vllm", tp=2, ranks=(1,))
    assert 0 < one.written_nbytes < both.written_nbytes
