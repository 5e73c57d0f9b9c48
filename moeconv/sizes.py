"""The sizes of a model as its config declares them, whatever its fields are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from moeconv.errors import BadSource
from moeconv.families.base import Family
from moeconv.families.tables import CONFIG_ALIASES, CONFIG_SECTIONS
from moeconv.types import Json


class Sizes(NamedTuple):
    """Declared sizes; None where the config does not say. `experts`, `intermediate`: all allowed."""

    layers: int | None
    hidden: int | None
    experts: tuple[int, ...]
    intermediate: tuple[int, ...]
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    vocab: int | None
    mtp_layers: int
    tied: bool
    latent: tuple[int, ...] = ()  # the experts' own hidden size, where it is not the model's


def config_value(config: Mapping[str, Json], names: tuple[str, ...]) -> Json:
    """Return the first value of these fields in the config or its sections; None if none is set."""
    for section in CONFIG_SECTIONS:
        fields = config if not section else config.get(section)
        if not isinstance(fields, Mapping):
            continue
        for name in names:
            if fields.get(name) is not None:
                return fields[name]
    return None


def read_sizes(config: Mapping[str, Json], family: Family) -> Sizes:
    """Return the sizes of a config; BadSource where a size is not a positive number."""
    heads = _number(config, "heads")
    hidden = _number(config, "hidden")
    head_dim = _number(config, "head_dim")
    if head_dim is None and heads and hidden and hidden % heads == 0:
        head_dim = hidden // heads
    return Sizes(
        layers=_number(config, "layers"),
        hidden=hidden,
        experts=_numbers(config, CONFIG_ALIASES["experts"]),
        intermediate=_numbers(config, family.intermediate),
        heads=heads,
        kv_heads=_number(config, "kv_heads") or heads,
        head_dim=head_dim,
        vocab=_number(config, "vocab"),
        mtp_layers=_number(config, "mtp_layers", least=0) or 0,
        tied=bool(config_value(config, ("tie_word_embeddings",))),
        latent=_numbers(config, ("moe_latent_size",)),
    )


def _number(config: Mapping[str, Json], fact: str, least: int = 1) -> int | None:
    value = config_value(config, CONFIG_ALIASES[fact])
    if value is None:
        return None
    return _checked(value, CONFIG_ALIASES[fact], least)


def _numbers(config: Mapping[str, Json], names: tuple[str, ...]) -> tuple[int, ...]:
    value = config_value(config, names)
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(_checked(one, names, 1) for one in values))


def _checked(value: Json, names: tuple[str, ...], least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise BadSource(
            f"{' / '.join(names)} is {value!r}, which is not a number of at least {least}",
            where="config.json",
            hint="correct config.json, or give another one with --config",
        )
    return value
