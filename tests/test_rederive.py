"""Does deriving from the source once more find what digests cannot: a wrong conversion?"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

from moeconv import rederive
from moeconv.codecs.base import Window
from moeconv.element_bits import rounded_bits
from moeconv.errors import UsageError, VerifyFailed
from moeconv.finished import read_finished
from moeconv.kernels.cpu import KERNELS, Counts
from moeconv.rederive import block_nbytes_within, choose_units, slots_of
from moeconv.store import space
from moeconv.store.safetensors import read_header
from moeconv.verify import Effort, recorded_plan, verify
from tests.outputs import convert, flip, rewrite_manifest

ONE = Effort(jobs=1)
GPTOSS = "checkpoints/gptoss-mxfp4"
MIXTRAL = "vllm/mixtral/hf"
KT = "ktransformers/bf16"
QWEN = "vllm/qwen3_moe/hf"

# What conversions are like: every way in which an output may be cut, placed and padded.
CONVERSIONS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "transposed and interleaved": (GPTOSS, {}),
    "rounded to fp16": (GPTOSS, {"dtype": "fp16"}),
    "wide": (GPTOSS, {"dtype": "fp32", "dense_dtype": "bf16"}),
    "zero bias off rank 0": (GPTOSS, {"layout": "vllm", "tp": 2}),
    "whole experts, twice": (
        QWEN,
        {"layout": "vllm", "tp": 2, "ep": True, "redundant_experts": 2},
    ),
    "round-robin": (QWEN, {"layout": "vllm", "tp": 2, "ep": True, "placement": "round-robin"}),
    "ranks without experts": (QWEN, {"layout": "vllm", "tp": 2, "dp": 4, "ep": True}),
    "padded": (
        MIXTRAL,
        {"layout": "vllm", "tp": 2, "pad_intermediate": 48, "pad_hidden": 96, "experts_only": True},
    ),
    "uneven": (MIXTRAL, {"layout": "vllm", "tp": 3, "experts_only": True}),
    "one layer": (GPTOSS, {"layers": (1,)}),
    "groups along columns": ("checkpoints/qwen3moe-gptq-int4-g128", {"layout": "vllm", "dp": 2}),
    "packed rows": ("checkpoints/qwen3moe-awq-int4-g32", {"layout": "vllm", "tp": 2}),
    "two scales": ("checkpoints/qwen3moe-nvfp4-modelopt-dev", {"layout": "vllm", "tp": 2}),
    "packed for AMX, 4 bits": (KT, {"layout": "ktransformers", "dtype": "int4"}),
    "packed for AMX, 8 bits": (KT, {"layout": "ktransformers", "dtype": "int8", "numa": 1}),
    "raw for kt-kernel": (KT, {"layout": "ktransformers", "dtype": "bf16"}),
    "as stored": ("checkpoints/deepseekv3-fp8-block128", {"dtype": "keep"}),
    "one scale": ("checkpoints/mixtral-fp8-tensor-modelopt", {}),
}


@pytest.mark.parametrize("memory_nbytes", [1 << 30, 40 * 256])
@pytest.mark.parametrize("name", CONVERSIONS)
def test_right_conversions_are_right(
    name: str, memory_nbytes: int, fixtures: Path, tmp_path: Path
) -> None:
    source, options = CONVERSIONS[name]
    dst = convert(fixtures / source, tmp_path / "out", **options)
    report = verify(dst, fixtures / source, effort=Effort(memory_nbytes=memory_nbytes, jobs=1))
    assert report.problems == ()
    headers = [read_header(path, path.name) for path in dst.glob("*.safetensors")]
    tensors = [ref for header in headers for ref in header.tensors if ref.nbytes]
    assert report.rederived.tensors == len(tensors)
    assert report.rederived.nbytes == sum(ref.nbytes for ref in tensors)


def test_no_more_memory_than_is_free(
    fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dst = convert(fixtures / MIXTRAL, tmp_path / "out")
    monkeypatch.setattr(space, "memory_limit", lambda: 200 << 20)
    given: list[int] = []

    def recorded(memory_nbytes: int, jobs: int) -> int:
        given.append(memory_nbytes)
        return block_nbytes_within(memory_nbytes, jobs)

    monkeypatch.setattr(rederive, "block_nbytes_within", recorded)
    verify(dst, fixtures / MIXTRAL, effort=ONE).require_ok()
    assert given == [100 << 20]


def test_no_kernel_takes_part(
    fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dst = convert(fixtures / GPTOSS, tmp_path / "out")

    def broken(*arguments: Any) -> Counts:
        raise AssertionError("a kernel was called")

    for name in list(KERNELS):
        monkeypatch.setitem(KERNELS, name, broken)  # type: ignore[arg-type]
    assert verify(dst, fixtures / GPTOSS, effort=ONE).ok


def test_a_wrong_kernel_is_found(
    fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bit of one element: row 3, column 5 of the second expert of a fused gate and up."""
    right = KERNELS["mxfp4"]
    calls = 0

    def wrong(parts: Any, window: Window, params: Any, dtype: str, out: Any) -> Counts:
        nonlocal calls
        counts = right(parts, window, params, dtype, out)
        calls += 1
        if calls == 2:
            out[3, 5] ^= 1
        return counts

    with monkeypatch.context() as patch:
        patch.setitem(KERNELS, "mxfp4", wrong)  # type: ignore[arg-type]
        dst = convert(fixtures / GPTOSS, tmp_path / "out")
    assert verify(dst, effort=ONE).ok, "the digests are those of the wrong bytes"
    (problem,) = verify(dst, fixtures / GPTOSS, effort=ONE).problems
    assert problem.where.startswith("model-00001")
    assert "layers.0.mlp.experts." in problem.what
    assert "of expert 1: 1 elements differ" in problem.what
    assert "= (3, 5) is " in problem.what


def test_swapped_gate_and_up_are_found(fixtures: Path, tmp_path: Path) -> None:
    """Converted from a source in which two matrices are exchanged; headers tell nothing of it."""
    swapped = Path(shutil.copytree(fixtures / MIXTRAL, tmp_path / "swapped"))
    prefix = "model.layers.0.block_sparse_moe.experts.1"
    (path,) = swapped.glob("*.safetensors")
    refs = {ref.name: ref for ref in read_header(path, path.name).tensors}
    one, other = refs[f"{prefix}.w1.weight"], refs[f"{prefix}.w3.weight"]
    whole = path.read_bytes()
    data = bytearray(whole)
    data[one.offset : one.offset + one.nbytes] = whole[other.offset : other.offset + other.nbytes]
    data[other.offset : other.offset + other.nbytes] = whole[one.offset : one.offset + one.nbytes]
    path.write_bytes(data)
    dst = convert(swapped, tmp_path / "out", layout="vllm", tp=2, ep=True)
    assert verify(dst, swapped, effort=ONE).ok
    report = verify(dst, fixtures / MIXTRAL, effort=ONE)
    (problem,) = report.problems  # one slot of one tensor: gate, named first
    assert "'model.layers.0.block_sparse_moe.experts.routed_experts.w13_weight'" in problem.what
    assert "gate of expert 1" in problem.what


FORGED = {
    "a packed weight": (KT, {"layout": "ktransformers", "dtype": "int4"}, ".numa.1.weight"),
    "a packed scale": (KT, {"layout": "ktransformers", "dtype": "int8"}, ".numa.1.scale"),
    "a stored scale": ("checkpoints/deepseekv3-fp8-block128", {"dtype": "keep"}, "_scale_inv"),
    "a constant": (GPTOSS, {"layout": "vllm", "tp": 2}, "routed_experts.w2_bias"),
    "padding": (
        MIXTRAL,
        {"layout": "vllm", "tp": 2, "pad_hidden": 96, "experts_only": True},
        "w13_weight",
    ),
}


@pytest.mark.parametrize("name", FORGED)
def test_one_bit_under_a_right_digest_is_found(name: str, fixtures: Path, tmp_path: Path) -> None:
    """As if that bit had been written: of the last byte of a tensor, in the last file with one."""
    source, options, ending = FORGED[name]
    dst = convert(fixtures / source, tmp_path / "out", **options)
    refs = [
        (path, ref)
        for path in sorted(dst.glob("*.safetensors"))
        for ref in read_header(path, path.name).tensors
        if ref.name.endswith(ending)
    ]
    path, ref = refs[-1]
    flip(path, ref.offset + ref.nbytes - 1)
    files = json.loads(json.dumps(read_finished(dst).facts["files"]))
    data = path.read_bytes()
    for file in files:
        for segment in file["segments"] if file["name"] == path.name else ():
            begin, nbytes = segment[:2]
            segment[2] = xxhash.xxh3_128_hexdigest(data[begin : begin + nbytes])
    rewrite_manifest(dst, files=files)
    assert verify(dst, effort=ONE).ok
    (problem,) = verify(dst, fixtures / source, effort=ONE).problems
    assert f"'{ref.name}'" in problem.what and ": 1 elements differ" in problem.what
    assert problem.where == path.name


def test_not_a_number_and_friends(fixtures: Path, tmp_path: Path) -> None:
    """NaN with a payload, infinities, -0 and subnormals, copied and converted."""
    odd = Path(shutil.copytree(fixtures / MIXTRAL, tmp_path / "odd"))
    (path,) = odd.glob("*.safetensors")
    refs = [ref for ref in read_header(path, path.name).tensors if ref.name.endswith("w2.weight")]
    data = bytearray(path.read_bytes())
    values = np.array([0x7FC1, 0xFF81, 0x7F80, 0xFF80, 0x8000, 0x0001, 0x3F81], np.uint16)
    for ref in refs:
        data[ref.offset : ref.offset + values.nbytes] = values.tobytes()
    path.write_bytes(data)
    for dtype in ("bf16", "fp16", "fp32"):
        dst = convert(odd, tmp_path / dtype, dtype=dtype)
        assert verify(dst, odd, effort=ONE).problems == (), dtype


def test_rounding() -> None:
    bits = np.array(
        [0x3F808000, 0x3F818000, 0x3F808001, 0x7F800001, 0xFFFFFFFF, 0x80000000, 0x7F7FFFFF],
        np.uint32,
    )
    values = torch.from_numpy(bits.view(np.float32)).reshape(1, -1)
    assert rounded_bits(values, "BF16").tolist() == [
        [0x3F80, 0x3F82, 0x3F81, 0x7FC0, 0x7FC0, 0x8000, 0x7F80]
    ]
    assert rounded_bits(values, "F32").tolist() == [
        [0x3F808000, 0x3F818000, 0x3F808001, 0x7FC00000, 0x7FC00000, 0x80000000, 0x7F7FFFFF]
    ]
    halves = torch.tensor([[65519.0, 65520.0, 2.0**-25, 3 * 2.0**-26, float("nan")]])
    assert rounded_bits(halves, "F16").tolist() == [[0x7BFF, 0x7C00, 0, 1, 0x7E00]]


def test_a_sample_covers_every_kind_and_is_the_same_every_time(
    fixtures: Path, tmp_path: Path
) -> None:
    dst = convert(fixtures / GPTOSS, tmp_path / "out", layout="vllm", tp=2)
    plan = recorded_plan(read_finished(dst), fixtures / GPTOSS, None)
    everything = choose_units(plan, 1.0)
    assert len(everything) == sum(
        slots_of(tensor.draft) for file in plan.files for tensor in file.tensors
    )
    few = choose_units(plan, 0.01)
    assert few == choose_units(plan, 0.01)
    kinds = {
        "".join("N" if c.isdigit() else c for c in tensor.draft.name)
        for file in plan.files
        for tensor in file.tensors
    }
    covered = {
        "".join("N" if c.isdigit() else c for c in plan.files[f].tensors[t].draft.name)
        for f, t, _ in few
    }
    assert covered == kinds and len(few) < len(everything) // 2
    half = choose_units(plan, 0.5)
    assert len(everything) // 3 < len(half) < len(everything) * 2 // 3
    report = verify(dst, fixtures / GPTOSS, 0.01, effort=ONE)
    assert report.ok and report.sample == 0.01
    whole = verify(dst, fixtures / GPTOSS, effort=ONE)
    assert 0 < report.rederived.nbytes < whole.rederived.nbytes


@pytest.mark.parametrize("sample", [0.0, -1.0, 1.01, float("nan")])
def test_a_sample_is_a_share(sample: float, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="above 0"):
        verify(tmp_path, tmp_path, sample)


def test_another_source_is_refused(fixtures: Path, tmp_path: Path) -> None:
    dst = convert(fixtures / GPTOSS, tmp_path / "out")
    with pytest.raises(VerifyFailed, match="another source"):
        verify(dst, fixtures / MIXTRAL)
    rewrite_manifest(dst, plan="0" * 32)
    with pytest.raises(VerifyFailed, match="plans the conversion differently"):
        verify(dst, fixtures / GPTOSS)
    options = dict(read_finished(dst).facts["options"])
    rewrite_manifest(dst, options=options | {"colour": "red"})
    with pytest.raises(VerifyFailed, match="unknown options: colour"):
        verify(dst, fixtures / GPTOSS)


def test_what_the_manifest_says_is_checked_against_the_source(
    fixtures: Path, tmp_path: Path
) -> None:
    dst = convert(fixtures / GPTOSS, tmp_path / "out", layout="vllm", tp=2, ep=True)
    facts = dict(read_finished(dst).facts["layout_facts"])
    facts["experts"] = facts["experts"][::-1]
    rewrite_manifest(dst, layout_facts=facts)
    assert verify(dst, effort=ONE).ok
    (problem,) = verify(dst, fixtures / GPTOSS, effort=ONE).problems
    assert "'layout_facts' is not what the source gives" in problem.what


def test_what_is_held_at_once_is_bounded(
    fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dst = convert(fixtures / MIXTRAL, tmp_path / "out")
    areas: list[int] = []

    def spy(*arguments: Any) -> Window:
        window = window_of(*arguments)
        areas.append(window.rows * window.cols)
        return window

    window_of = rederive.window_of
    monkeypatch.setattr(rederive, "window_of", spy)
    elements = 200
    memory = elements * rederive.NBYTES_PER_ELEMENT * 2
    report = verify(dst, fixtures / MIXTRAL, effort=Effort(memory_nbytes=memory, jobs=2))
    assert report.ok
    assert 0 < max(areas) <= elements
    assert sum(areas) == report.rederived.elements
