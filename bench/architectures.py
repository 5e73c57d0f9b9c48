"""The tensors and the config.json of the architectures that the benchmarks make checkpoints of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple


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
    q_lora: int = 1536
    kv_lora: int = 512
    dense_layers: int = 0


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


NOPE, ROPE, VALUE = 128, 64, 128  # DeepSeek-V3's extents of a head
FP8_BLOCK = 128


def fp8_linear(name: str, rows: int, cols: int) -> Iterator[Tensor]:
    """Yield an FP8 weight and its scale per block of 128 x 128."""
    yield Tensor(f"{name}.weight", "F8_E4M3", (rows, cols), "fp8")
    grid = (-(-rows // FP8_BLOCK), -(-cols // FP8_BLOCK))
    yield Tensor(f"{name}.weight_scale_inv", "F32", grid, "scale")


def latent_attention(prefix: str, size: Size) -> Iterator[Tensor]:
    """Yield DeepSeek's attention of one layer."""
    base, heads = f"{prefix}.self_attn", size.heads
    yield from fp8_linear(f"{base}.q_a_proj", size.q_lora, size.hidden)
    yield Tensor(f"{base}.q_a_layernorm.weight", "BF16", (size.q_lora,), "normal")
    yield from fp8_linear(f"{base}.q_b_proj", heads * (NOPE + ROPE), size.q_lora)
    yield from fp8_linear(f"{base}.kv_a_proj_with_mqa", size.kv_lora + ROPE, size.hidden)
    yield Tensor(f"{base}.kv_a_layernorm.weight", "BF16", (size.kv_lora,), "normal")
    yield from fp8_linear(f"{base}.kv_b_proj", heads * (NOPE + VALUE), size.kv_lora)
    yield from fp8_linear(f"{base}.o_proj", size.hidden, heads * VALUE)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield Tensor(f"{prefix}.{name}.weight", "BF16", (size.hidden,), "normal")


def fp8_experts(base: str, hidden: int, inner: int) -> Iterator[Tensor]:
    """Yield the three projections of a gated expert, or of a dense layer."""
    yield from fp8_linear(f"{base}.gate_proj", inner, hidden)
    yield from fp8_linear(f"{base}.up_proj", inner, hidden)
    yield from fp8_linear(f"{base}.down_proj", hidden, inner)


def deepseek_v3(size: Size) -> Iterator[Tensor]:
    """Yield the tensors of a DeepSeek-V3 checkpoint: FP8, a scale per block of 128 x 128."""
    hidden, inner = size.hidden, size.intermediate
    yield Tensor("model.embed_tokens.weight", "BF16", (size.vocab, hidden), "normal")
    for layer in range(size.layers):
        prefix = f"model.layers.{layer}"
        yield from latent_attention(prefix, size)
        if layer < size.dense_layers:
            yield from fp8_experts(f"{prefix}.mlp", hidden, 9 * inner)
            continue
        yield Tensor(f"{prefix}.mlp.gate.weight", "BF16", (size.experts, hidden), "normal")
        bias = f"{prefix}.mlp.gate.e_score_correction_bias"
        yield Tensor(bias, "F32", (size.experts,), "scale")
        for expert in range(size.experts):
            yield from fp8_experts(f"{prefix}.mlp.experts.{expert}", hidden, inner)
        yield from fp8_experts(f"{prefix}.mlp.shared_experts", hidden, inner)
    yield Tensor("model.norm.weight", "BF16", (hidden,), "normal")
    yield Tensor("lm_head.weight", "BF16", (size.vocab, hidden), "normal")


def deepseek_v3_config(size: Size) -> dict[str, object]:
    """Return the config.json of such a checkpoint."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": size.hidden,
        "intermediate_size": 9 * size.intermediate,
        "moe_intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "n_routed_experts": size.experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": min(8, size.experts),
        "first_k_dense_replace": size.dense_layers,
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "q_lora_rank": size.q_lora,
        "kv_lora_rank": size.kv_lora,
        "qk_nope_head_dim": NOPE,
        "qk_rope_head_dim": ROPE,
        "v_head_dim": VALUE,
        "vocab_size": size.vocab,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        },
    }


class Kind(NamedTuple):
    """The tensors and the config.json of an architecture; `size`: about 1.3 GB.

    `shard_nbytes`: tensors of one file.
    """

    tensors: Callable[[Size], Iterator[Tensor]]
    config: Callable[[Size], dict[str, object]]
    size: Size
    shard_nbytes: int = 16 << 30


KINDS = {
    "gpt-oss": Kind(gpt_oss, gpt_oss_config, Size(2, 32, 2880, 2880)),
    "qwen3-moe": Kind(
        qwen3_moe,
        qwen3_moe_config,
        Size(1, 128, 2048, 768, heads=32, kv_heads=8, head_dim=128),
    ),
    # In four files: others share files out to their workers.
    "deepseek-v3": Kind(
        deepseek_v3, deepseek_v3_config, Size(1, 24, 7168, 2048, vocab=4096, heads=128), 360 << 20
    ),
}
DEEPSEEK_V3 = Size(61, 256, 7168, 2048, vocab=129280, heads=128, dense_layers=3)
DEEPSEEK_V3_SHARD_NBYTES = 4300 << 20
