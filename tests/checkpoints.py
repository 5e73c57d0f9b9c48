"""Synthetic checkpoints of any size, with what their weights are worth, decoded independently."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # OCP MX v1.0, table of E2M1
KINDS = ("gptoss-mxfp4", "gptoss-bf16", "qwen3moe", "mixtral")
MEMORY = Path("/dev/shm")


class Size(NamedTuple):
    """Sizes of a model; every default is small and divides."""

    layers: int = 1
    hidden: int = 64
    intermediate: int = 64
    experts: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    vocab: int = 96


class Checkpoint(NamedTuple):
    """What was written: `experts`: (layer, expert, "gate"|"up"|"down"[+".bias"]) -> BF16 [out, in];

    `dense`: every other tensor by its name; `form`: the tensors of the decoded hf model.
    """

    root: Path
    size: Size
    experts: dict[tuple[int, int, str], torch.Tensor]
    dense: Tensors
    form: Tensors


@contextmanager
def quick_directory() -> Iterator[Path]:
    """Yield a directory in memory where there is one: these tests are about bytes, not disks."""
    place = MEMORY if MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="moeconv-", dir=place) as name:
        yield Path(name)


def write_checkpoint(
    root: Path, kind: str, size: Size | None = None, *, seed: int = 0, files: int = 1
) -> Checkpoint:
    """Write a random checkpoint of one of KINDS into `root`, its tensors over `files` files."""
    size = size or Size()
    torch.manual_seed(seed)
    stored: Tensors = {}
    experts: dict[tuple[int, int, str], torch.Tensor] = {}
    form: Tensors = {}
    for layer in range(size.layers):
        parts, made = _experts(kind, size, layer)
        stored |= parts
        experts |= made
        form |= _form(kind, size, layer, made)
    dense = _dense(kind, size)
    save(root, config_of(kind, size), stored | dense, files=files)
    return Checkpoint(root, size, experts, dense, form | dense)


def save(root: Path, config: dict[str, Any], tensors: Tensors, *, files: int = 1) -> None:
    """Write tensors and their config as a model's directory."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text(json.dumps(config))
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if files == 1:
        save_file(plain, root / "model.safetensors", {"format": "pt"})
        return
    weight_map = {}
    for index in range(files):
        name = f"model-{index + 1:05d}-of-{files:05d}.safetensors"
        mine = {key: plain[key] for key in list(plain)[index::files]}
        save_file(mine, root / name, {"format": "pt"})
        weight_map |= dict.fromkeys(mine, name)
    total = sum(tensor.nbytes for tensor in plain.values())
    index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    (root / "model.safetensors.index.json").write_text(index_text)


def config_of(kind: str, size: Size) -> dict[str, Any]:
    """Return the config.json of a kind, with the fields that transformers and vLLM need."""
    config: dict[str, Any] = {
        "num_hidden_layers": size.layers,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "vocab_size": size.vocab,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    if kind.startswith("gptoss"):
        config |= {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"]}
        config |= {"num_local_experts": size.experts, "sliding_window": 128, "attention_bias": True}
        config["layer_types"] = ["full_attention"] * size.layers
    elif kind == "qwen3moe":
        config |= {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
        config |= {"num_experts": size.experts, "moe_intermediate_size": size.intermediate}
        config |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    else:
        config |= {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
        config["num_local_experts"] = size.experts
    if kind == "gptoss-mxfp4":
        unquantized = ["model.layers.*.self_attn", "model.layers.*.mlp.router"]
        config["quantization_config"] = {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [*unquantized, "model.embed_tokens", "lm_head"],
        }
    return config


def random(*shape: int) -> torch.Tensor:
    """Return finite BF16 numbers, a few of them -0."""
    values = torch.randn(shape).mul_(0.05).bfloat16()
    flat = values.view(-1)
    flat[:: max(flat.numel() // 3, 1)] = -0.0
    return values


def decode_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return BF16 [..., cols] of blocks [..., groups, 16] and scales [..., groups] (uint8)."""
    table = torch.tensor([*FP4, *(-value for value in FP4)], dtype=torch.float64)
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2).long()
    values = table[codes] * torch.pow(2.0, scales.double() - 127)[..., None]
    values[scales == 255] = torch.nan
    decoded = values.bfloat16()
    decoded.view(torch.int16)[decoded.isnan()] = 0x7FC0
    return decoded.flatten(-2)


def _experts(
    kind: str, size: Size, layer: int
) -> tuple[Tensors, dict[tuple[int, int, str], torch.Tensor]]:
    """Return the stored tensors of a layer's experts, and what they are worth."""
    e, h, i = size.experts, size.hidden, size.intermediate
    prefix = f"model.layers.{layer}.mlp.experts"
    if kind in ("qwen3moe", "mixtral"):
        made = {
            (layer, index, name): random(*((h, i) if name == "down" else (i, h)))
            for index in range(e)
            for name in ("gate", "up", "down")
        }
        return _form(kind, size, layer, made), made
    if kind == "gptoss-bf16":
        gate_up, down = random(e, 2 * i, h), random(e, h, i)
        parts = {
            f"{prefix}.gate_up_proj": gate_up.transpose(1, 2),
            f"{prefix}.down_proj": down.transpose(1, 2),
        }
    else:
        parts = {}
        for name, shape in (("gate_up_proj", (e, 2 * i, h)), ("down_proj", (e, h, i))):
            groups = shape[2] // 32
            parts[f"{prefix}.{name}_blocks"] = torch.randint(
                0, 256, (*shape[:2], groups, 16), dtype=torch.uint8
            )
            parts[f"{prefix}.{name}_scales"] = torch.randint(
                110, 130, (*shape[:2], groups), dtype=torch.uint8
            )
        gate_up, down = (
            decode_mxfp4(parts[f"{prefix}.{name}_blocks"], parts[f"{prefix}.{name}_scales"])
            for name in ("gate_up_proj", "down_proj")
        )
    biases = random(e, 2 * i), random(e, h)
    parts |= {f"{prefix}.gate_up_proj_bias": biases[0], f"{prefix}.down_proj_bias": biases[1]}
    return parts, split_gptoss(layer, (gate_up, down), biases)


def split_gptoss(
    layer: int,
    weights: tuple[torch.Tensor, torch.Tensor],
    biases: tuple[torch.Tensor, torch.Tensor],
) -> dict[tuple[int, int, str], torch.Tensor]:
    """Return gpt-oss' experts apart: even rows of gate_up [E, 2I, H] are the gate, odd ones up."""
    made = {}
    for index in range(weights[0].shape[0]):
        made[layer, index, "gate"] = weights[0][index, 0::2]
        made[layer, index, "up"] = weights[0][index, 1::2]
        made[layer, index, "down"] = weights[1][index]
        made[layer, index, "gate.bias"] = biases[0][index, 0::2]
        made[layer, index, "up.bias"] = biases[0][index, 1::2]
        made[layer, index, "down.bias"] = biases[1][index]
    return made


def _form(
    kind: str, size: Size, layer: int, made: dict[tuple[int, int, str], torch.Tensor]
) -> Tensors:
    """Return the decoded tensors of a layer's experts as its hf model stores them."""
    prefix = f"model.layers.{layer}"
    names = {"gate": "w1", "up": "w3", "down": "w2"}
    if kind == "mixtral":
        return {
            f"{prefix}.block_sparse_moe.experts.{index}.{names[name]}.weight": tensor
            for (_, index, name), tensor in made.items()
        }
    if kind == "qwen3moe":
        return {
            f"{prefix}.mlp.experts.{index}.{name}_proj.weight": tensor
            for (_, index, name), tensor in made.items()
        }
    rows = {name: [made[layer, index, name] for index in range(size.experts)] for name in _NAMES}
    woven = [
        torch.stack(both, dim=-1) for both in zip(rows["gate.bias"], rows["up.bias"], strict=True)
    ]
    fused = [
        torch.stack(both, dim=1).flatten(0, 1)
        for both in zip(rows["gate"], rows["up"], strict=True)
    ]
    return {
        f"{prefix}.mlp.experts.gate_up_proj": torch.stack(fused).transpose(1, 2).contiguous(),
        f"{prefix}.mlp.experts.down_proj": torch.stack(rows["down"]).transpose(1, 2).contiguous(),
        f"{prefix}.mlp.experts.gate_up_proj_bias": torch.stack(woven).flatten(1),
        f"{prefix}.mlp.experts.down_proj_bias": torch.stack(rows["down.bias"]),
    }


_NAMES = ("gate", "up", "down", "gate.bias", "up.bias", "down.bias")


def _dense(kind: str, size: Size) -> Tensors:
    dense = {
        "model.embed_tokens.weight": random(size.vocab, size.hidden),
        "model.norm.weight": random(size.hidden),
        "lm_head.weight": random(size.vocab, size.hidden),
    }
    for layer in range(size.layers):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            dense[f"{prefix}.{norm}.weight"] = random(size.hidden)
        dense |= _attention(kind, size, f"{prefix}.self_attn")
        router = {"mixtral": "block_sparse_moe.gate", "qwen3moe": "mlp.gate"}.get(kind)
        dense[f"{prefix}.{router or 'mlp.router'}.weight"] = random(size.experts, size.hidden)
        if router is None:
            dense[f"{prefix}.mlp.router.bias"] = random(size.experts)
    return dense


def _attention(kind: str, size: Size, prefix: str) -> Tensors:
    extents = {"q": size.heads, "k": size.kv_heads, "v": size.kv_heads}
    dense = {
        f"{prefix}.{name}_proj.weight": random(count * size.head_dim, size.hidden)
        for name, count in extents.items()
    }
    dense[f"{prefix}.o_proj.weight"] = random(size.hidden, size.heads * size.head_dim)
    if kind.startswith("gptoss"):
        for name, count in extents.items():
            dense[f"{prefix}.{name}_proj.bias"] = random(count * size.head_dim)
        dense[f"{prefix}.o_proj.bias"] = random(size.hidden)
        dense[f"{prefix}.sinks"] = random(size.heads)
    if kind == "qwen3moe":
        for name in ("q_norm", "k_norm"):
            dense[f"{prefix}.{name}.weight"] = random(size.head_dim)
    return dense


def read_all(directory: Path, pattern: str = "*.safetensors") -> Tensors:
    """Return every tensor of an output, read by the official library; no name twice."""
    found: Tensors = {}
    for path in sorted(directory.glob(pattern)):
        tensors = load_file(path)
        assert not set(tensors) & set(found)
        found |= tensors
    return found


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors have one dtype, one shape and the same bits (NaN, -0 too)."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(bits(one), bits(other))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements as integers."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(integers[tensor.itemsize])


def files_of(directory: Path) -> dict[str, bytes]:
    """Return the bytes of every file in a directory, by name; none may lie deeper."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}
