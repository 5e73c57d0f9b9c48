"""The tensors that load gives: what safetensors gives, without a copy, and nothing else."""

from __future__ import annotations

import gc
import importlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import load_file

from moeconv import numa
from moeconv.errors import Refused, UsageError, VerifyFailed
from moeconv.load import expert_map, load
from moeconv.store.safetensors import build_header
from moeconv.types import DTYPE_BITS, element_count
from tests.outputs import convert, flip, rewrite_manifest

# The package's `load` is the function.
loading = importlib.import_module("moeconv.load")
GPTOSS = "checkpoints/gptoss-mxfp4"
# Every dtype that torch has, in falling size, so that each is aligned.
DTYPES = [
    *("I64", "F64", "U64", "C64", "I32", "F32", "U32", "BF16", "F16", "I16", "U16"),
    *("U8", "I8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
]


@pytest.fixture(scope="module")
def tp2ep(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("load")
    return convert(fixtures / GPTOSS, root / "tp2ep", layout="vllm", tp=2, ep=True)


@pytest.fixture(scope="module")
def hf(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("load")
    source = fixtures / "checkpoints/qwen3moe-nvfp4-ct"
    return convert(source, root / "hf", max_file_size=60_000)


def made_by_hand(dst: Path, files: dict[str, tuple[list[Any], int | None]]) -> Path:
    """Write an output whose manifest says what no layout does yet: dtypes, NUMA parts."""
    dst.mkdir()
    entries = []
    for name, (tensors, part) in files.items():
        header = build_header(tensors, {}, 4096)
        data = header + bytes(index % 2 for index in range(sum(row[3] for row in tensors)))
        (dst / name).write_bytes(data)
        segments = [[0, len(header), xxhash.xxh3_128_hexdigest(header)]]
        if data[len(header) :]:
            digest = xxhash.xxh3_128_hexdigest(data[len(header) :])
            segments.append([len(header), len(data) - len(header), digest])
        entry = {"name": name, "rank": 0, "nbytes": len(data), "segments": segments}
        entries.append(entry | {"tensors": len(tensors), "numa": part})
    facts: dict[str, Any] = {"moeconv": "0", "format": 1, "plan": "", "source": "", "layout": "x"}
    facts |= {"family": "x", "partial": True, "options": {}, "accounting": {}, "experts": {}}
    facts |= {"auxiliary": [], "notes": [], "configs": [], "layout_facts": {}, "beside": {}}
    (dst / "moeconv.json").write_text('{"digest": ""}')
    rewrite_manifest(dst, **facts, files=entries)
    return dst


def rows(*shapes: tuple[str, str, tuple[int, ...]]) -> list[tuple[str, str, tuple[int, ...], int]]:
    return [
        (name, dtype, shape, element_count(shape) * DTYPE_BITS[dtype] // 8)
        for name, dtype, shape in shapes
    ]


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    flat = [tensor.reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*flat)


def test_a_whole_model(hf: Path) -> None:
    expected = {}
    for path in hf.glob("*.safetensors"):
        expected |= load_file(path)
    found = load(hf)
    assert set(found) == set(expected) and len(found) == len(expected)
    assert all(same(found[name], tensor) for name, tensor in expected.items())
    assert found.bound_node is None and "missing" not in found
    with pytest.raises(KeyError):
        found["missing"]
    with pytest.raises(TypeError):
        found["x"] = found  # type: ignore[index]


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank(rank: int, tp2ep: Path) -> None:
    expected = load_file(tp2ep / f"model-rank-{rank}-part-0.safetensors")
    found = load(tp2ep, rank)
    assert set(found) == set(expected)
    assert all(same(found[name], tensor) for name, tensor in expected.items())


def test_every_dtype(tmp_path: Path) -> None:
    shapes = [(dtype.lower(), dtype, (3, 8)) for dtype in DTYPES]
    tensors = rows(*shapes, ("empty", "F32", (0, 4)), ("scalar", "U8", ()))
    dst = made_by_hand(tmp_path / "x", {"a.safetensors": (tensors, None)})
    expected = load_file(dst / "a.safetensors")
    found = load(dst)
    assert list(found) == [row[0] for row in tensors]
    assert all(same(found[name], tensor) for name, tensor in expected.items())
    arrays = load(dst, framework="numpy")
    for name, tensor in expected.items():
        if not name.startswith(("f8", "bf16")):
            assert arrays[name].dtype == tensor.numpy().dtype
        assert arrays[name].shape == tuple(tensor.shape)
        assert arrays[name].tobytes() == bytes(tensor.reshape(-1).view(torch.uint8).numpy())


def test_numpy_without_ml_dtypes_shows_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading.numpy_dtype.cache_clear()
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    tensors = rows(("a", "BF16", (2,)), ("b", "F8_E4M3", (2,)))
    arrays = load(
        made_by_hand(tmp_path / "x", {"a.safetensors": (tensors, None)}), framework="numpy"
    )
    assert [arrays[name].dtype for name in arrays] == [np.uint16, np.uint8]
    assert arrays["a"].tolist() == [0x0100, 0x0100]
    loading.numpy_dtype.cache_clear()


def test_nothing_is_copied_and_no_file_changes(tp2ep: Path) -> None:
    path = tp2ep / "model-rank-0-part-0.safetensors"
    before = path.read_bytes()
    found = load(tp2ep)
    name = "model.norm.weight"
    one, again = found[name], found[name]
    assert one.data_ptr() == again.data_ptr()
    start = min(found[other].data_ptr() for other in found)
    assert 0 <= one.data_ptr() - start < len(before)
    one.fill_(3.5)
    assert again.tolist() == [3.5] * again.numel()
    found_numpy = load(tp2ep, framework="numpy")
    found_numpy[name][:] = 0
    assert path.read_bytes() == before
    assert not same(load(tp2ep)[name], one), "each load has its own copy of what is changed"


def test_a_tensor_keeps_its_memory(tp2ep: Path) -> None:
    name = "model.norm.weight"
    expected = load_file(tp2ep / "model-rank-0-part-0.safetensors")[name]
    tensor, array = load(tp2ep)[name], load(tp2ep, framework="numpy")[name]
    gc.collect()
    assert same(tensor, expected)
    assert array.tobytes() == bytes(expected.view(torch.uint8).numpy())


def test_large_tensors_are_read_ahead(tmp_path: Path) -> None:
    tensors = rows(("large", "F32", (1 << 19,)), ("small", "U8", (4,)))
    dst = made_by_hand(tmp_path / "x", {"a.safetensors": (tensors, None)})
    assert same(load(dst)["large"], load_file(dst / "a.safetensors")["large"])


def test_tensors_are_made_on_access(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = rows(*((f"layers.{index}.weight", "U8", (1,)) for index in range(20_000)))
    dst = made_by_hand(tmp_path / "x", {"a.safetensors": (tensors, None)})
    made: list[object] = []
    monkeypatch.setitem(loading._MAKERS, "torch", lambda stored: made.append(stored))
    found = load(dst)
    assert len(list(found)) == 20_000 and "layers.7.weight" in found and made == []
    found["layers.7.weight"]
    assert len(made) == 1


@pytest.mark.parametrize("rank", [2, -1, 99])
def test_a_rank_that_is_not_there(rank: int, tp2ep: Path, hf: Path) -> None:
    with pytest.raises(Refused, match=f"no rank {rank}") as caught:
        load(tp2ep, rank)
    assert "ranks 0 to 1" in caught.value.hint
    with pytest.raises(Refused) as caught:
        load(hf, rank)
    assert "it has rank 0" in caught.value.hint
    with pytest.raises(Refused, match="no rank"):
        expert_map(tp2ep, rank)


def test_what_cannot_be_asked_for(tp2ep: Path) -> None:
    with pytest.raises(Refused, match="no NUMA part 0") as caught:
        load(tp2ep, numa=0)
    assert "NUMA parts (none)" in caught.value.hint
    with pytest.raises(UsageError, match="NUMA part"):
        load(tp2ep, bind=True)
    with pytest.raises(UsageError, match="framework 'jax'"):
        load(tp2ep, framework="jax")


def test_an_output_that_is_not_whole(tp2ep: Path, tmp_path: Path) -> None:
    dst = Path(shutil.copytree(tp2ep, tmp_path / "x"))
    name = "model-rank-0-part-0.safetensors"
    whole = (dst / name).read_bytes()
    flip(dst / name, 4095)
    with pytest.raises(VerifyFailed, match="not valid JSON"):
        load(dst)
    (dst / name).write_bytes(whole.replace(b"w13_weight", b"w31_weight"))
    with pytest.raises(VerifyFailed, match="not the one that the manifest tells"):
        load(dst)
    load(dst, 1)
    (dst / name).unlink()
    with pytest.raises(VerifyFailed, match="missing"):
        load(dst)
    (dst / ".moeconv").mkdir()
    (dst / ".moeconv" / "plan.json").write_text("{}")
    with pytest.raises(VerifyFailed, match="unfinished"):
        load(dst, 1)


def test_experts_of_a_rank(tp2ep: Path, hf: Path) -> None:
    assert expert_map(tp2ep) == (0, 1) and expert_map(tp2ep, 1) == (2, 3)
    with pytest.raises(Refused, match="hf output has no map"):
        expert_map(hf)


def test_numa_parts(tmp_path: Path) -> None:
    files = {
        f"{part}.safetensors": (rows((f"w{part}", "F32", (1 << 18,))), part) for part in (0, 1)
    }
    files["common.safetensors"] = (rows(("c", "F32", (4,))), None)
    dst = made_by_hand(tmp_path / "x", files)
    assert set(load(dst)) == {"w0", "w1", "c"}
    assert set(load(dst, numa=0)) == {"w0", "c"}
    bound = load(dst, numa=1, bind=True)
    assert set(bound) == {"w1", "c"}
    assert same(bound["w1"], load_file(dst / "1.safetensors")["w1"])
    assert bound.bound_node in numa.memory_nodes()
    if len(numa.memory_nodes()) == 1:
        (note,) = bound.notes
        assert f"its part lies on node {bound.bound_node}" in note
    with pytest.raises(Refused, match="no NUMA part 2") as caught:
        load(dst, numa=2)
    assert "NUMA parts 0, 1" in caught.value.hint


def test_numa_parts_by_name(tmp_path: Path) -> None:
    """As kt-kernel names them: several parts in one file, each copied alone."""
    tensors = rows(
        *(
            (f"blk.0.ffn_up_exps.{expert}.numa.{part}.{kind}", dtype, shape)
            for part in (0, 1)
            for expert in (0, 1)
            for kind, dtype, shape in (("weight", "I8", (4100,)), ("scale", "F32", (3,)))
        )
    )
    # aligned, as a layout lays them out
    tensors.sort(key=lambda row: -DTYPE_BITS[row[1]])
    dst = made_by_hand(tmp_path / "x", {"a.safetensors": (tensors, None)})
    expected = load_file(dst / "a.safetensors")
    bound = load(dst, numa=1, bind=True)
    assert sorted(bound) == sorted(name for name in expected if ".numa.1." in name)
    assert list(bound) == list(load(dst, numa=1))
    assert all(same(bound[name], expected[name]) for name in bound)
    with pytest.raises(Refused, match="no NUMA part 2"):
        load(dst, numa=2)


def test_binding_needs_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dst = made_by_hand(tmp_path / "x", {"0.safetensors": (rows(("w", "F32", (4,))), 0)})
    monkeypatch.setattr(loading, "memory_limit", lambda: 10)
    with pytest.raises(Refused, match="copies 16 B into memory; 10 B are free"):
        load(dst, numa=0, bind=True)
    assert set(load(dst, numa=0)) == {"w"}
