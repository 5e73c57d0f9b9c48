"""Part names: what a tensor name's ending says about the tensor's role in a quantized weight."""

from __future__ import annotations

from collections.abc import Mapping

# Endings after the last dot of `X.{part}` that belong to a codec together with X's other parts.
LINEAR_PARTS = frozenset(
    (
        "weight",
        "weight_scale_inv",
        "weight_scale",
        "weight_scale_2",
        "weight_packed",
        "weight_shape",
        "weight_zero_point",
        "weight_g_idx",
        "weight_global_scale",
        "qweight",
        "qzeros",
        "scales",
        "g_idx",
        "qscale_weight",
        "scale",
        "blocks",
        # bitsandbytes
        "weight.absmax",
        "weight.quant_map",
        "weight.nested_absmax",
        "weight.nested_quant_map",
        "weight.quant_state.bitsandbytes__nf4",
    )
)
# Parts that hold the numbers; without one of them the others are orphans.
CARRIERS = ("weight", "weight_packed", "qweight", "blocks")
# Parts whose name alone does not make them part of a codec: a plain parameter may be called so.
AMBIGUOUS = frozenset(("scale", "scales", "blocks", "bias", "weight"))
# Endings of packed tensors without a dot: `experts.gate_up_proj_blocks`.
PACKED_PARTS: Mapping[str, str] = {
    "_blocks": "blocks",
    "_scales": "scales",
    "_scale_inv": "weight_scale_inv",
    "_weight_scale_inv": "weight_scale_inv",
    "_scale": "weight_scale",
    "_weight_scale": "weight_scale",
    "_weight_scale_2": "weight_scale_2",
    "_input_scale": "input_scale",
    "_activation_scale": "activation_scale",
    "_bias": "bias",
}
# Activation data: never applied to weights; dropped by name when decoding.
ACTIVATION_PARTS = frozenset(
    (
        "input_scale",
        "input_global_scale",
        "input_zero_point",
        "output_scale",
        "output_zero_point",
        "k_scale",
        "v_scale",
        "q_scale",
        "k_zero_point",
        "v_zero_point",
        "kv_scale",
        "activation_scale",
        "qscale_act",
    )
)


def split_part(name: str) -> tuple[str, str]:
    """Return (base, part) of `X.part`; part "" where the ending is not a part's name."""
    base, dot, ending = name.rpartition(".weight.")
    if dot and f"weight.{ending}" in LINEAR_PARTS:
        return base, f"weight.{ending}"
    base, dot, ending = name.rpartition(".")
    if dot and (ending in LINEAR_PARTS or ending in ACTIVATION_PARTS):
        return base, ending
    return name, ""


def split_packed_part(name: str) -> tuple[str, str]:
    """Return (base, part) of a packed tensor's name; part "weight" where it has no ending."""
    for ending in sorted(PACKED_PARTS, key=len, reverse=True):
        if name.endswith(ending):
            return name[: -len(ending)], PACKED_PARTS[ending]
    return name, "weight"
