"""One table per vLLM model class: every parameter of its sharded state, before post-processing."""

from __future__ import annotations

from moeconv.layouts.vllm_rows import (
    Architecture,
    Piece,
    Row,
    correction,
    experts,
    gate,
    qkv,
    same,
    scales,
    shared,
)

NORMS = (
    same("input_layernorm.weight"),
    same("post_attention_layernorm.weight"),
)
MODEL = (
    Row("model.embed_tokens.weight", (Piece("model.embed_tokens.weight", "rows vocab"),), "model"),
    Row("lm_head.weight", (Piece("lm_head.weight", "rows vocab"),), "model"),
    Row("model.norm.weight", (Piece("model.norm.weight"),), "model"),
)
GQA = (
    qkv("self_attn", "self_attn", "weight"),
    qkv("self_attn", "self_attn", "bias", optional=True),
    same("self_attn.o_proj.weight", "cols heads"),
    *scales("self_attn.attn"),
)
QK_NORM = (same("self_attn.q_norm.weight"), same("self_attn.k_norm.weight"))
DENSE_MLP = (
    Row(
        "mlp.gate_up_proj.weight",
        (Piece("mlp.gate_proj.weight", "rows inter"), Piece("mlp.up_proj.weight", "rows inter")),
        when="dense",
    ),
    same("mlp.down_proj.weight", "cols inter", when="dense"),
)

SHARED_GATE = Row(
    "mlp.experts._shared_experts._layer.expert_gate.weight",
    (Piece("mlp.shared_expert_gate.weight"),),
    when="moe",
    plain="mlp.shared_expert_gate.weight",
)

MIXTRAL = Architecture(
    "MixtralForCausalLM",
    ("mixtral",),
    (
        *MODEL,
        *NORMS,
        *GQA,
        gate("block_sparse_moe.gate.weight"),
        *experts("block_sparse_moe.experts"),
    ),
)
QWEN2_MOE = Architecture(
    "Qwen2MoeForCausalLM",
    ("qwen2_moe",),
    (
        *MODEL,
        *NORMS,
        *GQA,
        *DENSE_MLP,
        gate("mlp.gate.weight"),
        *shared("mlp.shared_expert"),
        SHARED_GATE,
        *experts("mlp.experts"),
    ),
)
QWEN3_MOE = Architecture(
    "Qwen3MoeForCausalLM",
    ("qwen3_moe",),
    (
        *MODEL,
        *NORMS,
        *GQA,
        *QK_NORM,
        *DENSE_MLP,
        gate("mlp.experts.gate.weight", plain="mlp.gate.weight"),
        *experts("mlp.experts"),
    ),
)
OLMOE = Architecture(
    "OlmoeForCausalLM",
    ("olmoe",),
    (*MODEL, *NORMS, *GQA, *QK_NORM, gate("mlp.gate.weight"), *experts("mlp.experts")),
)
_Q_A = "self_attn.q_a_proj.weight"
MLA = (
    Row(
        "self_attn.fused_qkv_a_proj.weight",
        (Piece(_Q_A), Piece("self_attn.kv_a_proj_with_mqa.weight")),
        given=_Q_A,
    ),
    Row(
        "self_attn.mla_attn.q_a_layernorm.weight",
        (Piece("self_attn.q_a_layernorm.weight"),),
        given=_Q_A,
        plain="self_attn.q_a_layernorm.weight",
    ),
    Row(
        "self_attn.mla_attn.q_b_proj.weight",
        (Piece("self_attn.q_b_proj.weight", "rows heads"),),
        given=_Q_A,
        plain="self_attn.q_b_proj.weight",
    ),
    same("self_attn.kv_a_proj_with_mqa.weight", given=f"!{_Q_A}"),
    Row(
        "self_attn.mla_attn.q_proj.weight",
        (Piece("self_attn.q_proj.weight", "rows heads"),),
        given=f"!{_Q_A}",
        plain="self_attn.q_proj.weight",
    ),
    same("self_attn.kv_a_layernorm.weight"),
    same("self_attn.kv_b_proj.weight", "rows heads"),
    Row(
        "self_attn.mla_attn.o_proj.weight",
        (Piece("self_attn.o_proj.weight", "cols heads"),),
        plain="self_attn.o_proj.weight",
    ),
    *scales("self_attn.mla_attn.mla_attn"),
)
DEEPSEEK = Architecture(
    "DeepseekV3ForCausalLM",  # and DeepseekV2ForCausalLM, which has no correction bias
    ("deepseek_v2", "deepseek_v3", "kimi_k2"),
    (
        *MODEL,
        *NORMS,
        *MLA,
        *DENSE_MLP,
        gate("mlp.experts.gate.weight", plain="mlp.gate.weight"),
        correction("mlp.experts.gate.e_score_correction_bias", "mlp.gate.e_score_correction_bias"),
        *shared("mlp.shared_experts"),
        *experts("mlp.experts"),
    ),
)
GLM4_MOE = Architecture(
    "Glm4MoeForCausalLM",
    ("glm4_moe",),
    (
        *MODEL,
        *NORMS,
        *GQA,
        *tuple(row._replace(optional=True) for row in QK_NORM),
        *DENSE_MLP,
        gate("mlp.gate.weight", dtype="F32"),
        correction(
            "mlp.experts.routed_experts.e_score_correction_bias",
            "mlp.gate.e_score_correction_bias",
        ),
        *shared("mlp.shared_experts"),
        *experts("mlp.experts"),
    ),
)
MINIMAX_M2 = Architecture(
    "MiniMaxM2ForCausalLM",
    ("minimax_m2",),
    (
        *MODEL,
        *NORMS,
        *GQA,
        same("self_attn.q_norm.weight", "rows heads"),
        same("self_attn.k_norm.weight", "rows kv"),
        gate("block_sparse_moe.gate.weight", dtype="F32"),
        correction(
            "block_sparse_moe.e_score_correction_bias",
            "block_sparse_moe.e_score_correction_bias",
            flag="use_routing_bias",
        ),
        *experts("block_sparse_moe.experts"),
    ),
)
GPT_OSS = Architecture(
    "GptOssForCausalLM",
    ("gpt_oss",),
    (
        Row(
            "model.embedding.weight",
            (Piece("model.embed_tokens.weight", "rows vocab"),),
            "model",
        ),
        *MODEL[1:],
        *NORMS,
        qkv("self_attn", "attn", "weight"),
        qkv("self_attn", "attn", "bias"),
        Row("attn.o_proj.weight", (Piece("self_attn.o_proj.weight", "cols heads"),)),
        Row("attn.o_proj.bias", (Piece("self_attn.o_proj.bias"),)),
        Row("attn.sinks", (Piece("self_attn.sinks", "rows heads"),)),
        *scales("attn.attn"),
        same("mlp.router.weight", when="moe"),
        same("mlp.router.bias", when="moe"),
        *experts("mlp.experts", interleaved=True),
        Row(
            "mlp.experts.routed_experts.w13_bias",
            (Piece("gate.bias", "rows expert"), Piece("up.bias", "rows expert")),
            when="moe",
            experts=True,
            interleaved=True,
            plain="mlp.experts.w13_bias",
        ),
        Row(
            "mlp.experts.routed_experts.w2_bias",
            (Piece("down.bias", "rank0"),),
            when="moe",
            experts=True,
            plain="mlp.experts.w2_bias",
        ),
    ),
    even_only=True,
)

_FULL = "self_attn.q_proj.weight"
_LINEAR = "linear_attn.A_log"
_QKV = "linear_attn.in_proj_qkv.weight"
LINEAR_ATTENTION = tuple(
    row._replace(given=_LINEAR)
    for row in (
        Row(
            "linear_attn.in_proj_qkvz.weight",
            (
                Piece(_QKV, "rows keys", 0),
                Piece(_QKV, "rows keys", 1),
                Piece(_QKV, "rows values", 2),
                Piece("linear_attn.in_proj_z.weight", "rows values"),
            ),
        ),
        Row(
            "linear_attn.in_proj_ba.weight",
            (
                Piece("linear_attn.in_proj_b.weight", "rows values"),
                Piece("linear_attn.in_proj_a.weight", "rows values"),
            ),
        ),
        Row(
            "linear_attn.conv1d.weight",
            (
                Piece("linear_attn.conv1d.weight", "rows keys", 0),
                Piece("linear_attn.conv1d.weight", "rows keys", 1),
                Piece("linear_attn.conv1d.weight", "rows values", 2),
            ),
        ),
        same("linear_attn.A_log", "rows values", dtype="F32"),
        same("linear_attn.dt_bias", "rows values"),
        same("linear_attn.norm.weight"),
        same("linear_attn.out_proj.weight", "cols values"),
    )
)
QWEN3_5_MOE = Architecture(
    "Qwen3_5MoeForCausalLM",  # and Qwen3_5MoeForConditionalGeneration's text model
    ("qwen3_5_moe",),
    (
        *MODEL,
        *NORMS,
        *tuple(row._replace(given=_FULL) for row in (*GQA, *QK_NORM)),
        *LINEAR_ATTENTION,
        gate("mlp.experts.gate.weight", plain="mlp.gate.weight"),
        *shared("mlp.shared_expert"),
        SHARED_GATE,
        *experts("mlp.experts"),
    ),
    wrapper="language_model.",
)

ARCHITECTURES: tuple[Architecture, ...] = (
    MIXTRAL,
    QWEN2_MOE,
    DEEPSEEK,
    OLMOE,
    QWEN3_MOE,
    GLM4_MOE,
    GPT_OSS,
    MINIMAX_M2,
    QWEN3_5_MOE,
)

# Families without a table of their own: their experts alone, under the usual names. Without a gate
# (Nemotron) w13 is up alone, as vLLM's is_act_and_mul=False has it.
_W13, _W2 = experts("mlp.experts")
GENERIC = Architecture(
    "experts only",
    (),
    (
        _W13._replace(given="gate"),
        _W13._replace(pieces=(Piece("up", "rows expert"),), given="!gate"),
        _W2,
        Row(
            "mlp.experts.routed_experts.w13_bias",
            (Piece("gate.bias", "rows expert"), Piece("up.bias", "rows expert")),
            when="moe",
            experts=True,
            given="gate.bias",
            plain="mlp.experts.w13_bias",
        ),
        Row(
            "mlp.experts.routed_experts.w13_bias",
            (Piece("up.bias", "rows expert"),),
            when="moe",
            experts=True,
            given="!gate.bias",
            optional=True,
            plain="mlp.experts.w13_bias",
        ),
        Row(
            "mlp.experts.routed_experts.w2_bias",
            (Piece("down.bias", "rank0"),),
            when="moe",
            experts=True,
            optional=True,
            plain="mlp.experts.w2_bias",
        ),
    ),
)
