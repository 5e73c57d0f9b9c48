"""How compressed-tensors declares its formats: groups with targets, and an ignore list."""

from __future__ import annotations

from collections.abc import Mapping

from moeconv.codecs.base import QuantScheme
from moeconv.quantization_fields import (
    Field,
    Origin,
    Value,
    read_block,
    read_fields,
    read_names,
    read_object,
)
from moeconv.quantization_names import Names, class_kind, is_class, names_of
from moeconv.quantization_rules import UNQUANTIZED, Declared, Rule, pattern_names
from moeconv.types import Json

CT_FIELDS = (
    Field("num_bits", "count", (), tuple(range(1, 9))),
    Field("type", "word", (), ("int", "float")),
    Field("strategy", "word", (), ("tensor", "channel", "group", "block", "token", "tensor_group")),
    Field("group_size", "group"),
    Field("symmetric", "flag"),
    Field("actorder", "order", (), ("group", "weight", "none")),
)
# What compressed_tensors 0.20 `QuantizationArgs` takes for a field that a group leaves out.
CT_DEFAULTS: Mapping[str, Value] = {"num_bits": 8, "type": "int", "symmetric": True}
# and the strategy that it infers from group_size.
STRATEGY_OF_GROUP: Mapping[Value | None, str] = {None: "tensor", -1: "channel"}
CT_FORMATS = (
    "dense",
    "fakequant",
    "float-quantized",
    "int-quantized",
    "marlin-24",
    "mixed-precision",
    "mxfp4-pack-quantized",
    "mxfp6-pack-quantized",
    "mxfp8-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "pack-quantized",
    "sparse-24-bitmask",
    "sparse-bitmask",
)
CT_FORMAT = (Field("format", "word", (), CT_FORMATS),)
IGNORABLE_CLASSES = frozenset({"Linear", "LinearBase", "Embedding"})


def read_compressed(raw: Mapping[str, Json], origin: Origin) -> Declared:
    """Return what a compressed-tensors config declares."""
    top = read_fields(CT_FORMAT, raw, origin)
    schemes: dict[str, QuantScheme] = {}
    place = origin.below("config_groups")
    groups = read_object(raw, "config_groups", origin)
    for name in groups:
        group = read_object(groups, name, place)
        scheme = _group_scheme(group, top, place.below(name))
        schemes |= dict.fromkeys(read_names(group, "targets", place.below(name)), scheme)
    ignored = read_names(raw, "ignore", origin)
    rules = [*_ignore_rules(ignored, origin.below("ignore")), *_target_rules(schemes, place)]
    facts: dict[str, Value] = {}
    for target, scheme in schemes.items():
        facts |= {f"{target}.{name}": value for name, value in scheme.values.items()}
    return Declared("compressed-tensors", origin, tuple(rules), facts, ignored)


def _group_scheme(
    group: Mapping[str, Json], top: Mapping[str, Value], origin: Origin
) -> QuantScheme:
    weights = read_object(group, "weights", origin)
    if not weights:
        return UNQUANTIZED  # only activations
    place = origin.below("weights")
    values = {**CT_DEFAULTS, **read_fields(CT_FIELDS, weights, place)}
    values |= read_block(weights, "block_structure", place)
    if values.get("actorder") == "none":
        del values["actorder"]
    values.setdefault("strategy", STRATEGY_OF_GROUP.get(values.get("group_size"), "group"))
    layout = {**top, **read_fields(CT_FORMAT, group, origin)}
    if layout.get("format") != "mixed-precision":  # says only that the groups differ
        values |= layout
    return QuantScheme("compressed-tensors", values)


def _ignore_rules(ignored: tuple[str, ...], origin: Origin) -> list[Rule]:
    patterns = [entry.removeprefix("re:") for entry in ignored if entry.startswith("re:")]
    names = names_of(exact=(entry for entry in ignored if not entry.startswith("re:")))
    rules = [Rule(names, UNQUANTIZED), Rule(pattern_names(patterns, origin), UNQUANTIZED)]
    classes = [entry for entry in ignored if entry in IGNORABLE_CLASSES]
    return rules + [Rule(Names(kind=class_kind(entry)), UNQUANTIZED) for entry in classes]


def _target_rules(schemes: Mapping[str, QuantScheme], origin: Origin) -> list[Rule]:
    """Return the rules in the order of compressed_tensors `match_targets`: names, regexes, classes.

    Classes come last; "Linear" first among them, for a checkpoint does not say which class a
    module had.
    """
    ordered = sorted(schemes, key=lambda target: ("re:" in target, target))
    regexes = [target for target in ordered if target.startswith("re:")]
    exact = [target for target in ordered if not target.startswith("re:")]
    classes = sorted(filter(is_class, exact), key=lambda target: (target != "Linear", target))
    by_scheme: list[tuple[QuantScheme, list[str]]] = []
    for target in exact:
        known = next((names for scheme, names in by_scheme if scheme == schemes[target]), None)
        if known is None:
            by_scheme.append((schemes[target], known := []))
        known.append(target)
    return [
        *(Rule(names_of(exact=names), scheme) for scheme, names in by_scheme),
        *(Rule(pattern_names((one.removeprefix("re:"),), origin), schemes[one]) for one in regexes),
        *(Rule(Names(kind=class_kind(one)), schemes[one]) for one in classes),
    ]
