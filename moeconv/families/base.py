"""What a family is: rows that say how a published model names and arranges its experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

Projections = Mapping[str, tuple[str, ...]]  # text of {proj} -> the projections it holds, in order

GATE_UP_DOWN: Projections = {"gate_proj": ("gate",), "up_proj": ("up",), "down_proj": ("down",)}
W123: Projections = {"w1": ("gate",), "w3": ("up",), "w2": ("down",)}
PLAIN = ("gate", "up", "down")
BIASED = (*PLAIN, "gate.bias", "up.bias", "down.bias")
PACKED: Projections = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}


class Rule(NamedTuple):
    """One way in which experts are stored: `pattern` is what follows the layer, without the part.

    `form`: dims of the decoded Hugging Face tensor, where they are not `dims`.
    `suffix`: key suffix of what the rule holds, ".bias" for biases.
    `parts`: the tensor's part names this rule takes; empty: any part of a codec.
    """

    pattern: str
    dims: str
    projections: Projections
    form: str = ""
    suffix: str = ""
    parts: tuple[str, ...] = ()


class Family(NamedTuple):
    """One row per family of checkpoints; `model_types` as config.json (or its text_config) says.

    `dense`: one of these modules marks a layer without experts; empty: any layer may have none.
    `aliases`: (fact, config fields) where they are not those of CONFIG_ALIASES.
    `carried`: what lies under these modules of a layer is called experts and is none.
    `config_fields`: all of them in a config without model_type say that it is this family's.
    """

    name: str
    model_types: tuple[str, ...]
    rules: tuple[Rule, ...]
    example: str  # a public checkpoint, or the class that writes it
    projections: tuple[str, ...] = PLAIN  # what every expert has
    dense: tuple[str, ...] = ("mlp.down_proj",)
    aliases: tuple[tuple[str, tuple[str, ...]], ...] = ()
    carried: tuple[str, ...] = ()
    config_fields: tuple[str, ...] = ()


def per_expert(prefix: str, projections: Projections = GATE_UP_DOWN) -> tuple[Rule, ...]:
    """Return the rules of experts stored one by one, with or without a bias."""
    pattern = f"{prefix}.{{expert}}.{{proj}}"
    return (
        Rule(pattern, "R C", projections),
        Rule(pattern, "R", projections, suffix=".bias", parts=("bias",)),
    )


def packed(prefix: str, dims: str, projections: Projections = PACKED) -> tuple[Rule, ...]:
    """Return the rule of all experts of a layer in one tensor."""
    return (Rule(f"{prefix}.{{proj}}", dims, projections),)
