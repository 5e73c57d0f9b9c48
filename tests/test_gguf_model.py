"""GGUF models whose architecture or arrangement the fixtures do not have."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moeconv import api
from moeconv.errors import BadSource, IncompleteModel, UnrecognizedTensor

HIDDEN, INNER, EXPERTS = 16, 24, 3
Tensors = dict[str, np.ndarray]


def experts(layers: int, *, fused: bool = False) -> Tensors:
    """Return random stacked experts as llama.cpp writes them: numpy shapes [E, rows, cols]."""
    random = np.random.default_rng(3)
    tensors: Tensors = {}
    for layer in range(layers):
        gate, up = random.standard_normal((2, EXPERTS, INNER, HIDDEN)).astype(np.float32)
        if fused:
            both = np.concatenate([gate, up], axis=1)
            tensors[f"blk.{layer}.ffn_gate_up_exps.weight"] = both
        else:
            tensors[f"blk.{layer}.ffn_gate_exps.weight"] = gate
            tensors[f"blk.{layer}.ffn_up_exps.weight"] = up
        down = random.standard_normal((EXPERTS, HIDDEN, INNER)).astype(np.float32)
        tensors[f"blk.{layer}.ffn_down_exps.weight"] = down
        tensors[f"blk.{layer}.ffn_gate_inp.weight"] = np.ones((EXPERTS, HIDDEN), np.float32)
    return tensors


def write(path: Path, arch: str, tensors: Tensors, **metadata: int) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    sizes = {
        "block_count": 2,
        "embedding_length": HIDDEN,
        "feed_forward_length": INNER,
        "expert_count": EXPERTS,
        **metadata,
    }
    for key, value in sizes.items():
        writer.add_uint32(f"{arch}.{key}", value)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def expected(tensors: Tensors, pattern: str, words: tuple[str, str, str]) -> dict[str, np.ndarray]:
    """Return every expert's matrices [out, in] by the name that the model gives them."""
    found = {}
    for name, values in tensors.items():
        layer, kind = name.split(".")[1:3]
        for expert, matrix in enumerate(values if kind != "ffn_gate_inp" else ()):
            base = f"model.layers.{layer}.{pattern}.{expert}"
            if kind == "ffn_gate_up_exps":
                found[f"{base}.{words[0]}.weight"] = matrix[:INNER]
                found[f"{base}.{words[1]}.weight"] = matrix[INNER:]
                continue
            word = words[("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps").index(kind)]
            found[f"{base}.{word}.weight"] = matrix
    return found


@pytest.mark.parametrize(
    ("arch", "pattern", "words"),
    [
        ("llama", "block_sparse_moe.experts", ("w1", "w3", "w2")),
        ("deepseek2", "mlp.experts", ("gate_proj", "up_proj", "down_proj")),
        ("never-heard-of", "mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    ],
)
@pytest.mark.parametrize("fused", [False, True])
def test_experts_of_an_architecture_that_was_never_compared(
    tmp_path: Path, arch: str, pattern: str, words: tuple[str, str, str], fused: bool
) -> None:
    """Their other tensors are refused, the experts alone are exact: fused or apart."""
    tensors = experts(2, fused=fused)
    (tmp_path / "in").mkdir()
    path = write(tmp_path / "in" / "m.gguf", arch, tensors)
    with pytest.raises(BadSource, match="--experts-only") as raised:
        api.plan(path)
    assert arch in str(raised.value)
    plan = api.plan(path, experts_only=True, dtype="fp32")
    api.convert(plan, tmp_path / "out")
    (file,) = (tmp_path / "out").glob("*.safetensors")
    found = load_file(file)
    wanted = expected(tensors, pattern, words)
    assert set(found) == set(wanted)
    for name, values in wanted.items():
        assert torch.equal(found[name], torch.from_numpy(values)), name


def test_a_layer_that_routes_to_nothing_is_refused(tmp_path: Path) -> None:
    tensors = experts(2)
    for name in ("gate", "up", "down"):
        del tensors[f"blk.1.ffn_{name}_exps.weight"]
    path = write(tmp_path / "m.gguf", "deepseek2", tensors)
    with pytest.raises(IncompleteModel, match=r"layer 1 has a router, 'blk\.1\.ffn_gate_inp"):
        api.plan(path, experts_only=True)


def test_a_missing_projection_is_refused(tmp_path: Path) -> None:
    tensors = experts(2)
    del tensors["blk.1.ffn_up_exps.weight"]
    path = write(tmp_path / "m.gguf", "deepseek2", tensors)
    with pytest.raises(IncompleteModel, match="no 'up' of expert 0, 1, 2"):
        api.plan(path, experts_only=True)


@pytest.mark.parametrize("key", ["embedding_length", "expert_count", "feed_forward_length"])
def test_metadata_that_the_tensors_contradict_is_refused(tmp_path: Path, key: str) -> None:
    path = write(tmp_path / "m.gguf", "deepseek2", experts(2), **{key: 20})
    with pytest.raises(BadSource, match="20"):
        api.plan(path, experts_only=True)


def test_an_unknown_tensor_of_a_known_architecture_is_refused(
    tmp_path: Path, fixtures: Path
) -> None:
    source = fixtures / "checkpoints/gguf-llamacpp-qwen3moe/model.gguf"
    data = source.read_bytes()
    assert data.count(b"blk.0.attn_k.weight") == 1
    broken = tmp_path / "model.gguf"
    broken.write_bytes(data.replace(b"blk.0.attn_k.weight", b"blk.0.attn_x.weight"))
    with pytest.raises(UnrecognizedTensor, match=r"blk\.0\.attn_x\.weight"):
        api.plan(broken)
