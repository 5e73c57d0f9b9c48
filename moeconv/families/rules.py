"""The ways in which experts are stored; a family has one or more of them."""

from __future__ import annotations

from moeconv.families.base import GATE_UP_DOWN, PACKED, W123, Rule, packed, per_expert

# P: [out, in], all rows of gate before those of up. T: the same stored [in, out].
_ROWS, _TURNED = "E (P R) C", "E C (P R)"

PER_EXPERT = per_expert("mlp.experts")
PER_EXPERT_W123 = per_expert("block_sparse_moe.experts", W123)
PER_EXPERT_FFN = per_expert("ffn.experts", W123)
PER_EXPERT_NATIVE = per_expert("experts", W123)
PER_EXPERT_BARE = per_expert("experts")
PER_EXPERT_FEED_FORWARD = per_expert("feed_forward.experts")
PER_EXPERT_FEED_FORWARD_W123 = per_expert("feed_forward.experts", W123)
PER_EXPERT_NO_GATE = per_expert("mixer.experts", {"up_proj": ("up",), "down_proj": ("down",)})

PACKED_ROWS = packed("mlp.experts", _ROWS)
PACKED_TURNED = packed("mlp.experts", _TURNED)
PACKED_FEED_FORWARD = packed("feed_forward.experts", _TURNED)
PACKED_BARE = packed("experts", _ROWS)
PACKED_ARIA = packed("mlp.experts", _TURNED, {"fc1": ("gate", "up"), "fc2": ("down",)})
_LINEARS = {"input_linear": ("gate", "up"), "output_linear": ("down",)}
PACKED_GRANITE = packed("block_sparse_moe", _ROWS, _LINEARS)
PACKED_JETMOE = packed("mlp", _ROWS, _LINEARS)
STACKED_STEP = packed("moe", "E R C", GATE_UP_DOWN)
FLAT_DBRX = (
    *packed("ffn.experts.mlp", "(E R) C", {"w1": ("gate",), "v1": ("up",)}),
    *packed("ffn.experts.mlp", "(E C) R", {"w2": ("down",)}),
)

GPT_OSS = (
    Rule("mlp.experts.{proj}", "E (R P) C", PACKED, form="E C (R P)", parts=("blocks", "scales")),
    Rule("mlp.experts.{proj}", "E C (R P)", PACKED, parts=("weight",)),
    Rule("mlp.experts.{proj}", "E (R P)", PACKED, suffix=".bias", parts=("bias",)),
)
# openai/gpt-oss/torch/model.py: einsum("beck,bk->bec", mlp1_weight, ...), swiglu of x[..., ::2].
GPT_OSS_ORIGINAL = (
    Rule("mlp.{proj}", "E (R P) C", {"mlp1_weight": ("gate", "up"), "mlp2_weight": ("down",)}),
    Rule(
        "mlp.{proj}",
        "E (R P)",
        {"mlp1": ("gate", "up"), "mlp2": ("down",)},
        suffix=".bias",
        parts=("bias",),
    ),
)
