"""GGUF metadata -> config.json, for the architectures whose tensors moeconv translates.

A GGUF file holds what llama.cpp needs; what it leaves out is a constant of the architecture
(`_Row.constants`) or has its default in transformers.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import NamedTuple

from moeconv.errors import BadSource
from moeconv.families.gguf_names import ARCHITECTURES
from moeconv.types import Json, TensorRef

_F32 = struct.Struct("<f")
_F32_LIMIT = 3e38
_ARCH = "general.architecture"
_EMBEDDING = "token_embd.weight"
_OUTPUT = "output.weight"

_MODEL: Mapping[str, str] = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_HEAD_DIM: Mapping[str, str] = {"attention.key_length": "head_dim"}
_USED: Mapping[str, str] = {"expert_used_count": "num_experts_per_tok"}
_MOE_SIZE: Mapping[str, str] = {"expert_feed_forward_length": "moe_intermediate_size"}
_ROUTED: Mapping[str, str] = {
    **_USED,
    **_MOE_SIZE,
    "expert_count": "n_routed_experts",
    "expert_shared_count": "n_shared_experts",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob",
    "leading_dense_block_count": "first_k_dense_replace",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
}
_TOKENS: Mapping[str, str] = {
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}
# What a file may lack: llama.cpp has the same defaults as transformers.
_OPTIONAL = frozenset(
    (
        "attention.head_count_kv",
        "attention.key_length",
        "expert_group_count",
        "expert_group_used_count",
        "expert_weights_scale",
        "nextn_predict_layers",
    )
)


class _Row(NamedTuple):
    """Metadata keys (without the architecture) -> config fields, beside those of every model."""

    architecture: str
    fields: Mapping[str, str]
    constants: Mapping[str, Json]


_EXPERTS: Mapping[str, str] = {**_USED, "expert_count": "num_experts"}
_LOCAL_EXPERTS: Mapping[str, str] = {**_USED, "expert_count": "num_local_experts"}
_PARTIAL_ROTARY = ("glm4moe", "minimax-m2")
_SILU: Mapping[str, Json] = {"hidden_act": "silu"}
_ROWS: Mapping[str, _Row] = {
    "qwen2moe": _Row(
        "Qwen2MoeForCausalLM",
        {
            **_EXPERTS,
            **_MOE_SIZE,
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        },
        {**_SILU, "norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "olmoe": _Row("OlmoeForCausalLM", _EXPERTS, {**_SILU, "norm_topk_prob": False}),
    "qwen3moe": _Row(
        "Qwen3MoeForCausalLM",
        {**_EXPERTS, **_MOE_SIZE, **_HEAD_DIM},
        # llama.cpp always normalizes
        {**_SILU, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "dots1": _Row("Dots1ForCausalLM", _ROUTED, {**_SILU, "scoring_func": "noaux_tc"}),
    "ernie4_5-moe": _Row(
        "Ernie4_5_MoeForCausalLM",
        {
            **_MOE_SIZE,
            "expert_used_count": "moe_k",
            "expert_count": "moe_num_experts",
            "expert_shared_count": "moe_num_shared_experts",
            "interleave_moe_layer_step": "moe_layer_interval",
            "leading_dense_block_count": "moe_layer_start_index",
        },
        _SILU,
    ),
    "glm4moe": _Row(
        "Glm4MoeForCausalLM",
        {**_ROUTED, **_HEAD_DIM, "nextn_predict_layers": "num_nextn_predict_layers"},
        _SILU,
    ),
    "gpt-oss": _Row(
        "GptOssForCausalLM",
        {**_LOCAL_EXPERTS, **_HEAD_DIM, "attention.sliding_window": "sliding_window"},
        # the limit is a constant of llama.cpp's graph too
        {**_SILU, "attention_bias": True, "swiglu_limit": 7.0},
    ),
    "minimax-m2": _Row(
        "MiniMaxM2ForCausalLM",
        {**_LOCAL_EXPERTS, **_HEAD_DIM, "rope.dimension_count": "rotary_dim"},
        {**_SILU, "scoring_func": "sigmoid", "use_qk_norm": True, "use_routing_bias": True},
    ),
}


def config_from_metadata(
    metadata: Mapping[str, Json], tensors: Mapping[str, TensorRef]
) -> dict[str, Json] | None:
    """Return a config.json of the model in a GGUF file; None for an unknown architecture.

    `tensors`: by GGUF name; they say the vocabulary, tied embeddings, biases and norms.
    BadSource names metadata that the architecture cannot lack.
    """
    arch = str(metadata.get(_ARCH, ""))
    row = _ROWS.get(arch)
    if row is None:
        return None
    config: dict[str, Json] = {
        "architectures": [row.architecture],
        "model_type": next(each.model_type for each in ARCHITECTURES if each.arch == arch),
        "dtype": "bfloat16",
    }
    for key, field in {**_MODEL, **row.fields}.items():
        value = _number(metadata, f"{arch}.{key}")
        if value is not None:
            config[field] = value
        elif key not in _OPTIONAL:
            raise _unclear(f"the GGUF metadata has no {arch}.{key}")
    heads = config["num_attention_heads"]
    if heads < 1:
        raise _unclear(f"{arch}.attention.head_count is {heads}")
    config.setdefault("num_key_value_heads", heads)
    if "attention.key_length" in row.fields:
        config.setdefault("head_dim", config["hidden_size"] // heads)
    config["num_hidden_layers"] = _layers(metadata, arch)
    config.update(_from_tensors(arch, tensors))
    config.update(_rope(metadata, arch, config))
    config.update(row.constants)
    for key, field in _TOKENS.items():
        if isinstance(metadata.get(key), int):
            config[field] = metadata[key]
    return config


def _unclear(what: str) -> BadSource:
    return BadSource(what, hint="give the model's own config: --config FILE")


def _number(metadata: Mapping[str, Json], key: str) -> Json:
    """Return a number; None: no such key. An array counts as what all of its elements are."""
    value = metadata.get(key)
    if isinstance(value, list) and value and value == [value[0]] * len(value):
        value = value[0]
    if value is not None and not isinstance(value, int | float):
        raise _unclear(f"{key} is {value!r:.80}, not one number for all layers")
    return _shortest(value, key) if isinstance(value, float) else value


def _shortest(value: float, key: str) -> float:
    """Return the number that was meant: F32 has 1e-06 as 9.999999974752427e-07."""
    if not abs(value) < _F32_LIMIT:
        raise _unclear(f"{key} is {value}")
    for digits in range(6, 10):
        short = float(f"{value:.{digits}g}")
        if abs(short) < _F32_LIMIT and _F32.unpack(_F32.pack(short))[0] == value:
            return short
    return value


def _layers(metadata: Mapping[str, Json], arch: str) -> int:
    """Return the decoder's layers: block_count counts those of the predictors too."""
    blocks = _number(metadata, f"{arch}.block_count") or 0
    predictors = _number(metadata, f"{arch}.nextn_predict_layers") or 0
    if blocks <= predictors:
        raise _unclear(f"{arch}.block_count is {blocks}, of which {predictors} predict tokens")
    return int(blocks - predictors)


def _from_tensors(arch: str, tensors: Mapping[str, TensorRef]) -> Mapping[str, Json]:
    if _EMBEDDING not in tensors:
        raise _unclear(f"the GGUF file has no {_EMBEDDING}")
    found: dict[str, Json] = {
        "vocab_size": tensors[_EMBEDDING].shape[0],
        "tie_word_embeddings": _OUTPUT not in tensors,
    }
    if arch == "qwen2moe":
        found["qkv_bias"] = "blk.0.attn_q.bias" in tensors
    if arch == "glm4moe":
        found["attention_bias"] = "blk.0.attn_q.bias" in tensors
        found["use_qk_norm"] = "blk.0.attn_q_norm.weight" in tensors
    return found


def _rope(
    metadata: Mapping[str, Json], arch: str, config: Mapping[str, Json]
) -> Mapping[str, Json]:
    """Return rope_parameters, and the fields that loaders before transformers 5 read."""

    def number(key: str) -> Json:
        return _number(metadata, f"{arch}.rope.{key}")

    theta = float(number("freq_base") or 10000.0)
    kind = metadata.get(f"{arch}.rope.scaling.type", "none")
    parameters: dict[str, Json] = {"rope_type": "default"}
    if kind != "none":
        parameters = {"rope_type": str(kind), "factor": number("scaling.factor")}
        original = number("scaling.original_context_length")
        if original:
            parameters["original_max_position_embeddings"] = original
    if arch == "gpt-oss":  # constants of the model; older files do not hold the first two
        parameters |= {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
    result: dict[str, Json] = {"rope_theta": theta}
    if kind != "none":
        result["rope_scaling"] = dict(parameters)
    if arch in _PARTIAL_ROTARY and number("dimension_count") and config["head_dim"]:
        result["partial_rotary_factor"] = number("dimension_count") / config["head_dim"]
        parameters["partial_rotary_factor"] = result["partial_rotary_factor"]
    return {**result, "rope_parameters": {**parameters, "rope_theta": theta}}
