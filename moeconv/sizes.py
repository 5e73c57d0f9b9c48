"""The sizes of a model as its config declares them, whatever its fields are called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from moeconv.errors import BadSource
from moeconv.families.base import Family
from moeconv.families.config_fields import CONFIG_ALIASES, CONFIG_SECTIONS, CONTRADICTORY
from moeconv.types import Json


class Sizes(NamedTuple):
    """Declared sizes; None where the config does not say.

    `experts`: every count that a layer may have, `intermediate`: every size of an expert (models
    with experts of several kinds declare several).
    """

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
    untied: bool = False  # said so: not being said is neither
    latent: tuple[int, ...] = ()  # the experts' own hidden size, where it is not the model's


def read_sizes(config: Mapping[str, Json], family: Family) -> Sizes:
    """Return the sizes of a config; BadSource where one is no positive number, or two disagree."""
    reader = _Reader(config, family)
    heads = reader.number("heads")
    hidden = reader.number("hidden")
    head_dim = reader.number("head_dim")
    if head_dim is None and heads and hidden and hidden % heads == 0:
        head_dim = hidden // heads
    experts = reader.numbers("experts")
    return Sizes(
        layers=reader.number("layers"),
        hidden=hidden,
        # [text, vision]: one numbered list holds both
        experts=tuple(dict.fromkeys((*experts, sum(experts)) if len(experts) > 1 else experts)),
        intermediate=tuple(dict.fromkeys(reader.numbers("intermediate"))),
        heads=heads,
        kv_heads=reader.number("kv_heads") or heads,
        head_dim=head_dim,
        vocab=reader.number("vocab"),
        mtp_layers=reader.number("mtp_layers", least=0) or 0,
        tied=bool(reader.tied()),
        untied=reader.tied() is False,
        latent=reader.numbers("latent"),
    )


def model_types(config: Mapping[str, Json]) -> tuple[str, ...]:
    """Return what the config and then its sections call the model, each once."""
    sections = ("", *(name for name in CONFIG_SECTIONS if name))
    found = (fields.get("model_type") for _, fields in _sections(config, sections))
    return tuple(dict.fromkeys(one for one in found if isinstance(one, str) and one))


def _sections(
    config: Mapping[str, Json], names: tuple[str, ...] = CONFIG_SECTIONS
) -> Iterator[tuple[str, Mapping[str, Json]]]:
    """Yield (name, fields) of the config and its sections that are there."""
    for name in names:
        fields = config.get(name) if name else config
        if isinstance(fields, Mapping):
            yield name, fields


class _Reader:
    """A config's facts by the names that a family gives them."""

    def __init__(self, config: Mapping[str, Json], family: Family) -> None:
        self.config = config
        self.aliases = {**CONFIG_ALIASES, **dict(family.aliases)}

    def number(self, fact: str, least: int = 1) -> int | None:
        """Return a size, None where the config does not say."""
        field, value = self._find(fact)
        if fact == "layers" and isinstance(value, list):  # one entry per layer
            value = len(value)
        return None if value is None else _checked(value, field, least)

    def numbers(self, fact: str) -> tuple[int, ...]:
        """Return a size that may be a list, as it is; () where the config does not say."""
        field, value = self._find(fact)
        if value is None:
            return ()
        values = value if isinstance(value, list) else [value]
        return tuple(_checked(one, field, 1) for one in values)

    def tied(self) -> bool | None:
        """Return whether lm_head is the embedding, None if nothing says; sections come last."""
        values = [
            fields["tie_word_embeddings"]
            for _, fields in _sections(self.config, ("", "text_config", "llm_config"))
            if fields.get("tie_word_embeddings") is not None
        ]
        return bool(values[0]) if values else None

    def _find(self, fact: str) -> tuple[str, Json]:
        """Return (field, value) of the first field that is set; BadSource where two disagree."""
        for section, fields in _sections(self.config):
            found = {
                f"{section}.{name}" if section else name: fields[name]
                for name in self.aliases[fact]
                if fields.get(name) is not None
            }
            if not found:
                continue
            field, value = next(iter(found.items()))
            for other, its_value in found.items():
                if fact in CONTRADICTORY and its_value != value:
                    raise BadSource(
                        f"config.json contradicts itself: {field} is {value!r}, "
                        f"{other} is {its_value!r}",
                        where="config.json",
                        hint="correct config.json, or give another one with --config",
                    )
            return field, value
        return fact, None


def _checked(value: Json, field: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise BadSource(
            f"{field} is {value!r}, which is not a number of at least {least}",
            where="config.json",
            hint="correct config.json, or give another one with --config",
        )
    return value
