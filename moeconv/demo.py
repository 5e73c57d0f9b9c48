"""A small MXFP4 mixture-of-experts checkpoint in gpt-oss's form, made of random numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moeconv.store.safetensors import build_header
from moeconv.store.writer import OutputFile, write_small_file
from moeconv.types import Json, tensor_nbytes

FILE_NAME = "model-{:05d}-of-{:05d}.safetensors"
MXFP4_GROUP = 32  # elements per scale
SCALE_CODES = (116, 126)  # 2^-11 to 2^-2, the scales of weights

Tensor = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


@dataclass(frozen=True, slots=True)
class DemoSizes:
    """The sizes of the checkpoint; hidden and intermediate are multiples of 32."""

    layers: int = 4
    experts: int = 8
    hidden: int = 256
    intermediate: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    vocab: int = 512
    files: int = 2


def make_checkpoint(directory: Path, sizes: DemoSizes | None = None, seed: int = 0) -> int:
    """Write the checkpoint, the same for the same arguments; return the bytes of its tensors."""
    sizes = sizes or DemoSizes()
    random = np.random.default_rng(seed)
    tensors = list(_tensors(sizes))
    per_file = -(-len(tensors) // sizes.files)
    weight_map: dict[str, str] = {}
    total = 0
    for index in range(sizes.files):
        name = FILE_NAME.format(index + 1, sizes.files)
        chosen = tensors[index * per_file : (index + 1) * per_file]
        weight_map |= {tensor[0]: name for tensor in chosen}
        total += _write_file(directory / name, chosen, random)
    index_data = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_small_file(directory / "model.safetensors.index.json", _json(index_data))
    write_small_file(directory / "generation_config.json", _json({"eos_token_id": 2}))
    write_small_file(directory / "config.json", _json(_config(sizes)))
    return total


def _json(value: Json) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"


def _write_file(path: Path, tensors: list[Tensor], random: np.random.Generator) -> int:
    """Write one file; return the bytes of its tensors."""
    header = build_header(
        [(name, dtype, shape, tensor_nbytes(dtype, shape)) for name, dtype, shape in tensors],
        {"format": "pt"},
        align=8,
    )
    total = sum(tensor_nbytes(dtype, shape) for _, dtype, shape in tensors)
    with OutputFile(path, len(header) + total, direct=False) as output:
        output.write(0, memoryview(header))
        at = len(header)
        for tensor in tensors:
            data = _values(tensor, random).view(np.uint8).reshape(-1)
            output.write(at, data)
            at += data.size
        output.commit()
    return total


def _values(tensor: Tensor, random: np.random.Generator) -> npt.NDArray[Any]:
    """Return random bytes for codes and scales, bfloat16 bits for anything else."""
    name, dtype, shape = tensor
    if name.endswith("_scales"):
        return random.integers(*SCALE_CODES, shape, np.uint8, endpoint=True)
    if dtype == "U8":
        return random.integers(0, 256, shape, np.uint8)
    values = random.standard_normal(shape, np.float32) * np.float32(0.02)
    if "norm" in name:
        values += np.float32(1)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def _tensors(sizes: DemoSizes) -> Iterator[Tensor]:
    """Yield the tensors as gpt-oss names them."""
    yield "model.embed_tokens.weight", "BF16", (sizes.vocab, sizes.hidden)
    for layer in range(sizes.layers):
        for name, dtype, shape in _layer_tensors(sizes):
            yield f"model.layers.{layer}.{name}", dtype, shape
    yield "model.norm.weight", "BF16", (sizes.hidden,)
    yield "lm_head.weight", "BF16", (sizes.vocab, sizes.hidden)


def _layer_tensors(sizes: DemoSizes) -> Iterator[Tensor]:
    hidden, experts = sizes.hidden, sizes.experts
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    yield "input_layernorm.weight", "BF16", (hidden,)
    for name, rows, cols in (
        ("q_proj", queries, hidden),
        ("k_proj", keys, hidden),
        ("v_proj", keys, hidden),
        ("o_proj", hidden, queries),
    ):
        yield f"self_attn.{name}.weight", "BF16", (rows, cols)
        yield f"self_attn.{name}.bias", "BF16", (rows,)
    yield "self_attn.sinks", "BF16", (sizes.heads,)
    yield "post_attention_layernorm.weight", "BF16", (hidden,)
    yield "mlp.router.weight", "BF16", (experts, hidden)
    yield "mlp.router.bias", "BF16", (experts,)
    for name, rows, cols in (
        ("gate_up_proj", 2 * sizes.intermediate, hidden),
        ("down_proj", hidden, sizes.intermediate),
    ):
        groups = cols // MXFP4_GROUP
        yield f"mlp.experts.{name}_blocks", "U8", (experts, rows, groups, MXFP4_GROUP // 2)
        yield f"mlp.experts.{name}_scales", "U8", (experts, rows, groups)
        yield f"mlp.experts.{name}_bias", "BF16", (experts, rows)


def _config(sizes: DemoSizes) -> Json:
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "dtype": "bfloat16",
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "layer_types": [
            "full_attention" if layer % 2 else "sliding_attention" for layer in range(sizes.layers)
        ],
        "max_position_embeddings": 512,
        "num_attention_heads": sizes.heads,
        "num_experts_per_tok": min(4, sizes.experts),
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.kv_heads,
        "num_local_experts": sizes.experts,
        "rms_norm_eps": 1e-05,
        "sliding_window": 128,
        "tie_word_embeddings": False,
        "vocab_size": sizes.vocab,
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
