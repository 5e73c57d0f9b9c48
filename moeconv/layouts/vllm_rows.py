"""What vLLM's `--load-format sharded_state` finds per rank: one table per architecture.

Names are internal to vLLM: TESTED says which versions' own state each table was compared with.
"""

from __future__ import annotations

from typing import NamedTuple

TESTED = ("0.32.0",)


class Piece(NamedTuple):
    """A key (below its layer) and how ranks split it: "axis kind", "" where all hold it whole.

    rows or cols; heads, kv, vocab, inter (dense, over tp), expert (over all ranks); rank0: zeros
    elsewhere.
    """

    key: str
    split: str = ""


class Row(NamedTuple):
    """One output tensor of a layer or of the model; its pieces lie one after another in the rows.

    `when`: model, layer, dense (a layer without experts), moe. `interleaved`: the pieces' rows take
    turns. `dtype`: where it is not that of its pieces. `plain`: the name before vLLM 0.32. `given`:
    a key that the layer must have ("!key": must not). `flag`: a config field that must be true.
    """

    name: str
    pieces: tuple[Piece, ...] = ()
    when: str = "layer"
    dtype: str = ""
    constant: float | None = None
    optional: bool = False
    interleaved: bool = False
    experts: bool = False
    plain: str = ""
    given: str = ""
    flag: str = ""


class Architecture(NamedTuple):
    """The rows of one vLLM model class; `families` whose checkpoints it loads."""

    name: str
    families: tuple[str, ...]
    rows: tuple[Row, ...]
    even_only: bool = False  # vLLM asserts that ranks divide the intermediate size and the experts


def _same(name: str, split: str = "", **options: object) -> Row:
    return Row(name, (Piece(name, split),), **options)  # type: ignore[arg-type]  # named fields


def _scales(attention: str) -> tuple[Row, ...]:
    return tuple(
        Row(f"{attention}._{which}_scale", dtype="F32", constant=1.0)
        for which in ("q", "k", "v", "prob")
    )


def _qkv(source: str, target: str, part: str, optional: bool = False) -> Row:
    pieces = tuple(
        Piece(f"{source}.{which}_proj.{part}", split)
        for which, split in (("q", "rows heads"), ("k", "rows kv"), ("v", "rows kv"))
    )
    return Row(f"{target}.qkv_proj.{part}", pieces, optional=optional)


def _experts(prefix: str, *, interleaved: bool = False) -> tuple[Row, ...]:
    return (
        Row(
            f"{prefix}.routed_experts.w13_weight",
            (Piece("gate", "rows expert"), Piece("up", "rows expert")),
            when="moe",
            experts=True,
            interleaved=interleaved,
            plain=f"{prefix}.w13_weight",
        ),
        Row(
            f"{prefix}.routed_experts.w2_weight",
            (Piece("down", "cols expert"),),
            when="moe",
            experts=True,
            plain=f"{prefix}.w2_weight",
        ),
    )


NORMS = (
    _same("input_layernorm.weight"),
    _same("post_attention_layernorm.weight"),
)
MODEL = (
    Row("model.embed_tokens.weight", (Piece("model.embed_tokens.weight", "rows vocab"),), "model"),
    Row("lm_head.weight", (Piece("lm_head.weight", "rows vocab"),), "model"),
    Row("model.norm.weight", (Piece("model.norm.weight"),), "model"),
)
GQA = (
    _qkv("self_attn", "self_attn", "weight"),
    _qkv("self_attn", "self_attn", "bias", optional=True),
    _same("self_attn.o_proj.weight", "cols heads"),
    *_scales("self_attn.attn"),
)
QK_NORM = (_same("self_attn.q_norm.weight"), _same("self_attn.k_norm.weight"))
DENSE_MLP = (
    Row(
        "mlp.gate_up_proj.weight",
        (Piece("mlp.gate_proj.weight", "rows inter"), Piece("mlp.up_proj.weight", "rows inter")),
        when="dense",
    ),
    _same("mlp.down_proj.weight", "cols inter", when="dense"),
)


def _gate(name: str, *, dtype: str = "", plain: str = "") -> Row:
    source = name.replace("mlp.experts.gate", "mlp.gate")
    return Row(name, (Piece(source),), when="moe", dtype=dtype, plain=plain)


def _shared(source: str) -> tuple[Row, ...]:
    """Return the rows of shared experts: split over tp, also under expert parallelism."""
    target = "mlp.experts._shared_experts._layer"
    pieces = tuple(Piece(f"{source}.{which}_proj.weight", "rows inter") for which in ("gate", "up"))
    return (
        Row(
            f"{target}.gate_up_proj.weight",
            pieces,
            when="moe",
            optional=True,
            plain=f"{source}.gate_up_proj.weight",
        ),
        Row(
            f"{target}.down_proj.weight",
            (Piece(f"{source}.down_proj.weight", "cols inter"),),
            when="moe",
            optional=True,
            plain=f"{source}.down_proj.weight",
        ),
    )


def _correction(name: str, source: str, *, flag: str = "") -> Row:
    return Row(
        name, (Piece(source),), when="moe", dtype="F32", optional=True, plain=source, flag=flag
    )


MIXTRAL = Architecture(
    "MixtralForCausalLM",
    ("mixtral",),
    (
        *MODEL,
        *NORMS,
        *GQA,
        _gate("block_sparse_moe.gate.weight"),
        *_experts("block_sparse_moe.experts"),
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
        _gate("mlp.gate.weight"),
        *_shared("mlp.shared_expert"),
        Row(
            "mlp.experts._shared_experts._layer.expert_gate.weight",
            (Piece("mlp.shared_expert_gate.weight"),),
            when="moe",
            plain="mlp.shared_expert_gate.weight",
        ),
        *_experts("mlp.experts"),
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
        _gate("mlp.experts.gate.weight", plain="mlp.gate.weight"),
        *_experts("mlp.experts"),
    ),
)
OLMOE = Architecture(
    "OlmoeForCausalLM",
    ("olmoe",),
    (*MODEL, *NORMS, *GQA, *QK_NORM, _gate("mlp.gate.weight"), *_experts("mlp.experts")),
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
    _same("self_attn.kv_a_proj_with_mqa.weight", given=f"!{_Q_A}"),
    Row(
        "self_attn.mla_attn.q_proj.weight",
        (Piece("self_attn.q_proj.weight", "rows heads"),),
        given=f"!{_Q_A}",
        plain="self_attn.q_proj.weight",
    ),
    _same("self_attn.kv_a_layernorm.weight"),
    _same("self_attn.kv_b_proj.weight", "rows heads"),
    Row(
        "self_attn.mla_attn.o_proj.weight",
        (Piece("self_attn.o_proj.weight", "cols heads"),),
        plain="self_attn.o_proj.weight",
    ),
    *_scales("self_attn.mla_attn.mla_attn"),
)
DEEPSEEK = Architecture(
    "DeepseekV3ForCausalLM",  # and DeepseekV2ForCausalLM, which has no correction bias
    ("deepseek_v2", "deepseek_v3", "kimi_k2"),
    (
        *MODEL,
        *NORMS,
        *MLA,
        *DENSE_MLP,
        _gate("mlp.experts.gate.weight", plain="mlp.gate.weight"),
        _correction("mlp.experts.gate.e_score_correction_bias", "mlp.gate.e_score_correction_bias"),
        *_shared("mlp.shared_experts"),
        *_experts("mlp.experts"),
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
        _gate("mlp.gate.weight", dtype="F32"),
        _correction(
            "mlp.experts.routed_experts.e_score_correction_bias",
            "mlp.gate.e_score_correction_bias",
        ),
        *_shared("mlp.shared_experts"),
        *_experts("mlp.experts"),
    ),
)
MINIMAX_M2 = Architecture(
    "MiniMaxM2ForCausalLM",
    ("minimax_m2",),
    (
        *MODEL,
        *NORMS,
        *GQA,
        _same("self_attn.q_norm.weight", "rows heads"),
        _same("self_attn.k_norm.weight", "rows kv"),
        _gate("block_sparse_moe.gate.weight", dtype="F32"),
        _correction(
            "block_sparse_moe.e_score_correction_bias",
            "block_sparse_moe.e_score_correction_bias",
            flag="use_routing_bias",
        ),
        *_experts("block_sparse_moe.experts"),
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
        _qkv("self_attn", "attn", "weight"),
        _qkv("self_attn", "attn", "bias"),
        Row("attn.o_proj.weight", (Piece("self_attn.o_proj.weight", "cols heads"),)),
        Row("attn.o_proj.bias", (Piece("self_attn.o_proj.bias"),)),
        Row("attn.sinks", (Piece("self_attn.sinks", "rows heads"),)),
        *_scales("attn.attn"),
        _same("mlp.router.weight", when="moe"),
        _same("mlp.router.bias", when="moe"),
        *_experts("mlp.experts", interleaved=True),
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

ARCHITECTURES: tuple[Architecture, ...] = (
    MIXTRAL,
    QWEN2_MOE,
    DEEPSEEK,
    OLMOE,
    QWEN3_MOE,
    GLM4_MOE,
    GPT_OSS,
    MINIMAX_M2,
)

# Families without a table of their own: their experts alone, under the usual names.
GENERIC = Architecture("experts only", (), _experts("mlp.experts"))
