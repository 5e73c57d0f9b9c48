"""Where configs say what: the names of one fact, the sections that hold it, the runs of layers."""

from __future__ import annotations

from collections.abc import Mapping

# The first present counts; those of CONTRADICTORY may not differ within a section.
CONFIG_ALIASES: Mapping[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layers", "num_layers", "n_layer"),
    "hidden": ("hidden_size", "d_model", "dim", "n_embd"),
    "experts": (
        "num_local_experts",
        "n_routed_experts",
        "num_experts",
        "moe_num_experts",
        "num_routed_experts",
    ),
    "intermediate": (
        "moe_intermediate_size",
        "expert_ffn_hidden_size",
        "expert_hidden_dim",
        "ffn_hidden_size",
        "intermediate_size",
    ),
    "heads": ("num_attention_heads", "n_heads", "n_head"),
    "kv_heads": ("num_key_value_heads", "kv_n_heads", "n_kv_heads"),
    "head_dim": ("head_dim",),
    "vocab": ("vocab_size",),
    "mtp_layers": ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules"),
    "latent": ("moe_latent_size",),
}
CONTRADICTORY = ("experts", "hidden")
# "": the config itself. The text model's own section comes first.
CONFIG_SECTIONS = (
    "text_config",
    "llm_config",
    "language_config",
    "",
    "ffn_config",
    "attn_config",
    "moe",
)

# The runs of layers that are the decoder itself; any other run keeps its own prefix as its name.
MAIN_STACKS = (
    "model.layers",
    "layers",
    "model.language_model.layers",
    "language_model.model.layers",
    "language_model.model.blocks",
    "language_model.layers",
    "language.model.layers",
    "backbone.layers",
    "model.backbone.layers",
    "transformer.blocks",
    "transformer.layers",
    "block",
)
