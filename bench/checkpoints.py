"""Checkpoints of the sizes that the benchmarks need: random bytes in the right shapes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moeconv.store.safetensors import build_header
from moeconv.types import tensor_nbytes

CHUNK_NBYTES = 64 << 20


class Size(NamedTuple):
    """The sizes of a model; the same for every format."""

    layers: int
    experts: int
    hidden: int
    intermediate: int
    vocab: int = 32000
    heads: int = 64
    kv_heads: int = 8
    head_dim: int = 64


class Tensor(NamedTuple):
    """A tensor to write: `kind` says which numbers."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: str


def attention(prefix: str, size: Size, *, bias: bool) -> Iterator[Tensor]:
    """Yield the attention of one layer."""
    q, kv = size.heads * size.head_dim, size.kv_heads * size.head_dim
    for name, rows, cols in (
        ("q", q, size.hidden),
        ("k", kv, size.hidden),
        ("v", kv, size.hidden),
        ("o", size.hidden, q),
    ):
        yield Tensor(f"{prefix}.self_attn.{name}_proj.weight", "BF16", (rows, cols), "normal")
        if bias:
            yield Tensor(f"{prefix}.self_attn.{name}_proj.bias", "BF16", (rows,), "normal")
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield Tensor(f"{prefix}.{name}.weight", "BF16", (size.hidden,), "normal")


def gpt_oss(size: Size) -> Iterator[Tensor]:
    """Yield the tensors of a gpt-oss checkpoint with MXFP4 experts."""
    experts, hidden = size.experts, size.hidden
    yield Tensor("model.embed_tokens.weight", "BF16", (size.vocab, hidden), "normal")
    for layer in range(size.layers):
        prefix = f"model.layers.{layer}"
        yield from attention(prefix, size, bias=True)
        yield Tensor(f"{prefix}.self_attn.sinks", "BF16", (size.heads,), "normal")
        yield Tensor(f"{prefix}.mlp.router.weight", "BF16", (experts, hidden), "normal")
        yield Tensor(f"{prefix}.mlp.router.bias", "BF16", (experts,), "normal")
        for name, rows, cols in (
            ("gate_up_proj", 2 * size.intermediate, hidden),
            ("down_proj", hidden, size.intermediate),
        ):
            base = f"{prefix}.mlp.experts.{name}"
            yield Tensor(f"{base}_blocks", "U8", (experts, rows, cols // 32, 16), "bytes")
            yield Tensor(f"{base}_scales", "U8", (experts, rows, cols // 32), "e8m0")
            yield Tensor(f"{base}_bias", "BF16", (experts, rows), "normal")
    yield Tensor("model.norm.weight", "BF16", (hidden,), "normal")
    yield Tensor("lm_head.weight", "BF16", (size.vocab, hidden), "normal")


def gpt_oss_config(size: Size) -> dict[str, object]:
    """Return the config.json of such a checkpoint."""
    kinds = ("sliding_attention", "full_attention")
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_local_experts": size.experts,
        "num_experts_per_tok": min(4, size.experts),
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "vocab_size": size.vocab,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "max_position_embeddings": 4096,
        "sliding_window": 128,
        "layer_types": [kinds[layer % 2] for layer in range(size.layers)],
        "torch_dtype": "bfloat16",
        "pad_token_id": 2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
    }


def qwen3_moe(size: Size) -> Iterator[Tensor]:
    """Yield the tensors of a BF16 Qwen3-MoE checkpoint."""
    hidden, inner = size.hidden, size.intermediate
    yield Tensor("model.embed_tokens.weight", "BF16", (size.vocab, hidden), "normal")
    for layer in range(size.layers):
        prefix = f"model.layers.{layer}"
        yield from attention(prefix, size, bias=False)
        for name in ("q_norm", "k_norm"):
            yield Tensor(f"{prefix}.self_attn.{name}.weight", "BF16", (size.head_dim,), "normal")
        yield Tensor(f"{prefix}.mlp.gate.weight", "BF16", (size.experts, hidden), "normal")
        for expert in range(size.experts):
            base = f"{prefix}.mlp.experts.{expert}"
            for name, shape in (
                ("gate", (inner, hidden)),
                ("up", (inner, hidden)),
                ("down", (hidden, inner)),
            ):
                yield Tensor(f"{base}.{name}_proj.weight", "BF16", shape, "normal")
    yield Tensor("model.norm.weight", "BF16", (hidden,), "normal")
    yield Tensor("lm_head.weight", "BF16", (size.vocab, hidden), "normal")


def qwen3_moe_config(size: Size) -> dict[str, object]:
    """Return the config.json of such a checkpoint."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": size.hidden,
        "intermediate_size": 3 * size.hidden,
        "moe_intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_experts": size.experts,
        "num_experts_per_tok": min(8, size.experts),
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "vocab_size": size.vocab,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "dtype": "bfloat16",
    }


class Kind(NamedTuple):
    """The tensors and the config.json of an architecture."""

    tensors: Callable[[Size], Iterator[Tensor]]
    config: Callable[[Size], dict[str, object]]


KINDS = {
    "gpt-oss": Kind(gpt_oss, gpt_oss_config),
    "qwen3-moe": Kind(qwen3_moe, qwen3_moe_config),
}
# About 1.3 GB each.
SIZES = {
    "gpt-oss": Size(layers=2, experts=32, hidden=2880, intermediate=2880),
    "qwen3-moe": Size(1, 128, 2048, 768, heads=32, kv_heads=8, head_dim=128),
}


class Source(NamedTuple):
    """A checkpoint that is there, and the bytes of its safetensors files."""

    root: Path
    nbytes: int


def source(folder: Path, kind: str, size: Size | None = None) -> Source:
    """Return the checkpoint of this kind and size in `folder`, written if it is not there."""
    size = size or SIZES[kind]
    config = KINDS[kind].config(size)
    root = folder / kind
    told = root / "config.json"  # written last
    if not told.is_file() or json.loads(told.read_text()) != config:
        write_checkpoint(root, KINDS[kind].tensors(size), config)
    return Source(root, sum(path.stat().st_size for path in root.glob("*.safetensors")))


def write_checkpoint(root: Path, tensors: Iterator[Tensor], config: dict[str, object]) -> int:
    """Write one safetensors file with config and index; return the bytes of its tensors."""
    root.mkdir(parents=True, exist_ok=True)
    rows = [(tensor, tensor_nbytes(tensor.dtype, tensor.shape)) for tensor in tensors]
    name = "model-00001-of-00001.safetensors"
    header = build_header(
        [(t.name, t.dtype, t.shape, nbytes) for t, nbytes in rows], {"format": "pt"}
    )
    rng = np.random.default_rng(0)
    normal = (rng.standard_normal(CHUNK_NBYTES // 2).astype(np.float32) * 0.02).view(np.uint32)
    pools = {
        "normal": (normal >> 16).astype(np.uint16).view(np.uint8),
        "bytes": rng.integers(0, 256, CHUNK_NBYTES, dtype=np.uint8),
        "e8m0": rng.integers(112, 124, CHUNK_NBYTES, dtype=np.uint8),
    }
    with (root / name).open("wb", buffering=0) as file:
        file.write(header)
        for tensor, nbytes in rows:
            left = nbytes
            while left:
                left -= file.write(pools[tensor.kind][: min(left, CHUNK_NBYTES)].data)
    total = sum(nbytes for _, nbytes in rows)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {tensor.name: name for tensor, _ in rows},
    }
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    (root / "config.json").write_text(json.dumps(config))
    return total
