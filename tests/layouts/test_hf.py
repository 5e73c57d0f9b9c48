"""The hf layout: the source's own names, order and shapes, each tensor in the dtype it is due."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import moeconv.api as api
from tests.checkpoints import (
    KINDS,
    Size,
    load_file,
    quick_directory,
    read_all,
    same_bits,
    save,
    write_checkpoint,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Return a directory in memory: these tests make many outputs, and no disk matters to them."""
    with quick_directory() as directory:
        yield directory


@pytest.mark.parametrize("dense", [None, "bf16", "fp16", "fp32", "keep"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_names_shapes_and_dtypes(kind: str, dtype: str, dense: str | None, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "src", kind, Size(hidden=32, intermediate=64))
    options: dict[str, Any] = {"dtype": dtype, "dense_dtype": dense, "nonfinite": "keep"}
    api.convert(api.plan(checkpoint.root, **options), tmp_path / "out")
    found = read_all(tmp_path / "out")
    assert set(found) == set(checkpoint.form)
    others = torch.bfloat16 if dense == "keep" else DTYPES[dense or dtype]
    for name, tensor in checkpoint.form.items():
        expected = tensor.to(DTYPES[dtype] if ".experts." in name else others)
        assert same_bits(found[name], expected), name


def test_float32_and_integers_outside_the_experts_stay(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "src", "mixtral")
    tensors = load_file(checkpoint.root / "model.safetensors")
    tensors["model.norm.weight"] = torch.linspace(-1, 1, 64)
    tensors["model.position_ids"] = torch.arange(12, dtype=torch.int64).reshape(3, 4)
    tensors["model.one"] = torch.tensor(3.25, dtype=torch.bfloat16)
    tensors["model.layers.0.self_attn.conv.weight"] = torch.randn(4, 1, 5).bfloat16()
    tensors["model.empty"] = torch.zeros(0, 4, dtype=torch.bfloat16)
    save(checkpoint.root, dict(api.plan(checkpoint.root).model.source.config), tensors)
    api.convert(api.plan(checkpoint.root, dtype="fp16"), tmp_path / "out")
    found = read_all(tmp_path / "out")
    for name, tensor in tensors.items():
        kept = tensor.dtype in (torch.float32, torch.int64)
        assert same_bits(found[name], tensor if kept else tensor.half()), name


def test_the_order_of_the_source_does_not_matter(tmp_path: Path) -> None:
    outputs = []
    for files in (1, 3):
        root = tmp_path / f"src{files}"
        checkpoint = write_checkpoint(root, "qwen3moe", Size(layers=2, experts=12), files=files)
        plan = api.plan(checkpoint.root)
        api.convert(plan, tmp_path / f"out{files}")
        outputs.append((tmp_path / f"out{files}" / "model-00001-of-00001.safetensors").read_bytes())
        names = [tensor.draft.name for tensor in plan.files[0].tensors]
        experts = [name for name in names if ".0.mlp.experts." in name]
        numbers = [int(name.split(".")[5]) for name in experts]
        assert numbers == sorted(numbers)
    assert outputs[0] == outputs[1]
