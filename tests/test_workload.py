"""What a plan's workload says is what a conversion then does."""

from __future__ import annotations

from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import moeconv
from moeconv import process, strips
from moeconv.convert import chosen_files
from moeconv.demo import DemoSizes, make_checkpoint
from moeconv.device.choose import Chosen
from moeconv.device.gpu import GpuDecoder
from moeconv.device.ways import KERNEL, way_of
from moeconv.kernels.cpu import copies
from moeconv.measure.figures import COPY, DIGEST, TRANSPOSE
from moeconv.tasks import build_tasks
from moeconv.workload import Workload, workload_of

SIZES = DemoSizes(2, 4, 64, 64, heads=4, kv_heads=2, head_dim=16, vocab=128)


def planned(src: Path, gpu: bool = False, **options: Any) -> tuple[moeconv.Plan, Workload]:
    plan = moeconv.plan(src, **options)
    tasks = build_tasks(plan.weights, plan.files)
    return plan, workload_of(plan, tasks, frozenset(chosen_files(plan)), gpu=gpu)


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
    done = copied(monkeypatch)
    plan, found = planned(fixtures / "checkpoints" / name, **options)
    result = moeconv.convert(plan, tmp_path / "dst")
    assert found.written_nbytes == result.nbytes
    totals = plan.accounting.totals()
    read = sum(totals[state][1] for state in ("decoded", "copied", "codec part"))
    assert found.read_nbytes == pytest.approx(read, rel=0.01)
    assert (found.work.get(TRANSPOSE, 0), found.work.get(COPY, 0)) == (done[TRANSPOSE], done[COPY])


def copied(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Return a count of the bytes that conversions turn and copy from now on."""
    done: Counter[str] = Counter()
    real = copies.copy_into

    def copy_into(dst: Any, src: Any) -> None:
        crossed = src.size and src.flags.f_contiguous != dst.flags.f_contiguous
        done[TRANSPOSE if crossed else COPY] += dst.size * 2 if crossed else dst.nbytes
        real(dst, src)

    monkeypatch.setattr(process, "copy_into", copy_into)
    monkeypatch.setattr(strips, "copy_into", copy_into)
    return done


class Watched(GpuDecoder):
    """A GPU that is the CPU: counts what goes there and comes back."""

    def __init__(self) -> None:
        super().__init__([torch.device("cpu")], 1 << 26)
        self.moved: Counter[str] = Counter()

    def decode(self, weight: Any, parts: Any, window: Any, dtype: str, out: Any) -> Any:
        if way_of(weight) == KERNEL:
            self.moved["up"] += sum(part.nbytes for part in parts.values())
            self.moved["down"] += out.nbytes
        return super().decode(weight, parts, window, dtype, out)

    def encode(self, form: str, part: str, values: Any, out: Any) -> int:
        self.moved["up"] += values.nbytes
        self.moved["down"] += out.nbytes
        return super().encode(form, part, values, out)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gptoss-mxfp4", {"layers": (0,)}),
        ("gptoss-bf16", {"layout": "vllm", "layers": (0,)}),
        ("qwen3moe-gptq-int4-g128", {"layout": "vllm", "tp": 2, "layers": (0,)}),
        ("qwen3moe-gptq-int4-g128", {"layout": "ktransformers", "dtype": "int8", "layers": (0,)}),
    ],
)
def test_a_conversion_on_a_gpu_does_as_much(
    name: str,
    options: dict[str, Any],
    fixtures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done, decoder = copied(monkeypatch), Watched()
    room = import_module("moeconv.convert")
    monkeypatch.setattr(room, "choose_decoder", lambda *_: Chosen(decoder, ("gpu",)))
    plan, found = planned(fixtures / "checkpoints" / name, gpu=True, **options)
    result = moeconv.convert(plan, tmp_path / "dst")
    assert found.written_nbytes == result.nbytes
    assert found.down_nbytes == decoder.moved["down"]
    assert found.up_nbytes == pytest.approx(decoder.moved["up"], rel=0.01)
    assert (found.work.get(TRANSPOSE, 0), found.work.get(COPY, 0)) == (done[TRANSPOSE], done[COPY])


def test_only_the_chosen_ranks(fixtures: Path) -> None:
    source = fixtures / "checkpoints" / "mixtral-bf16"
    _, both = planned(source, layout="vllm", tp=2)
    _, one = planned(source, layout="vllm", tp=2, ranks=(1,))
    assert 0 < one.written_nbytes < both.written_nbytes
