"""The families, one row each."""

from __future__ import annotations

from moeconv.families.base import GATE_UP_DOWN, PACKED, W123, Family, Rule

PER_EXPERT = Rule("mlp.experts.{expert}.{proj}", "R C", GATE_UP_DOWN)
PER_EXPERT_W123 = Rule("block_sparse_moe.experts.{expert}.{proj}", "R C", W123)

FAMILIES: tuple[Family, ...] = (
    Family(
        "mixtral",
        ("mixtral",),
        # GPTQModel re-saves Mixtral under mlp.experts
        (PER_EXPERT_W123, PER_EXPERT),
        "mistralai/Mixtral-8x7B-v0.1",
        intermediate=("intermediate_size",),
    ),
    Family("qwen3_moe", ("qwen3_moe",), (PER_EXPERT,), "Qwen/Qwen3-30B-A3B"),
    Family(
        "gpt_oss",
        ("gpt_oss",),
        (
            Rule(
                "mlp.experts.{proj}",
                "E (R P) C",
                PACKED,
                form="E C (R P)",
                parts=("blocks", "scales"),
            ),
            Rule("mlp.experts.{proj}", "E C (R P)", PACKED, parts=("weight",)),
            Rule("mlp.experts.{proj}", "E (R P)", PACKED, suffix=".bias", parts=("bias",)),
        ),
        "openai/gpt-oss-120b",
        intermediate=("intermediate_size",),
    ),
)

# Names of one fact in config.json, the first present counts; read at the top, then in text_config,
# ffn_config and llm_config.
CONFIG_ALIASES = {
    "layers": ("num_hidden_layers", "n_layers", "num_layers", "n_layer"),
    "hidden": ("hidden_size", "d_model", "dim", "n_embd"),
    "experts": (
        "num_local_experts",
        "n_routed_experts",
        "num_experts",
        "moe_num_experts",
        "num_routed_experts",
    ),
    "heads": ("num_attention_heads", "n_heads"),
    "kv_heads": ("num_key_value_heads", "kv_n_heads", "n_kv_heads"),
    "head_dim": ("head_dim",),
    "vocab": ("vocab_size",),
    "mtp_layers": ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules"),
}
CONFIG_SECTIONS = ("", "text_config", "llm_config", "ffn_config", "attn_config", "moe")

# The runs of layers that are the decoder itself; any other run keeps its own prefix as its name.
MAIN_STACKS = (
    "model.layers",
    "layers",
    "model.language_model.layers",
    "language_model.model.layers",
    "language_model.model.blocks",
    "language_model.layers",
    "backbone.layers",
    "model.backbone.layers",
    "transformer.blocks",
    "transformer.layers",
    "block",
)
