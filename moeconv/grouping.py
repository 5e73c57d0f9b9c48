"""Tensor names -> groups: the parts of one weight found together, and what its name says it is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from moeconv.errors import IncompleteModel, UnrecognizedTensor
from moeconv.families.base import Family, Rule
from moeconv.families.parts import (
    ACTIVATION_PARTS,
    AMBIGUOUS,
    CARRIERS,
    split_packed_part,
    split_part,
)
from moeconv.naming import compile_pattern, format_name
from moeconv.types import TensorRef

# The first run of layers in a name: a dotted prefix that ends in one of these words, a number.
_LAYER = re.compile(
    r"(?P<stack>(?:\w+\.)*?(?:layers|blocks|block|blk|h|mtp\w*))"
    r"\.(?P<layer>0|[1-9][0-9]{0,5})\.(?P<rest>.+)"
)
_EXPERT_WORD = re.compile(r"(^|\.)experts(\.|$)")


class LayerName(NamedTuple):
    """What a name says: the run of layers, the layer, and what follows."""

    stack: str
    layer: int | None
    rest: str


class Match(NamedTuple):
    """A name that a family's rules explain: all rules that fit it, and their fields."""

    rules: tuple[Rule, ...]
    base: str
    part: str
    expert: int | None
    projection: str


@dataclass(slots=True)
class Group:
    """The parts of one weight, being collected; `name` is the base with its prefix."""

    name: str
    place: LayerName
    match: Match | None
    parts: dict[str, TensorRef] = field(default_factory=dict)
    activations: list[TensorRef] = field(default_factory=list)


def split_layer(name: str) -> LayerName:
    """Return the place that a tensor name gives; stack "" and layer None outside of any layer."""
    found = _LAYER.fullmatch(name)
    if found is None:
        return LayerName("", None, name)
    return LayerName(found["stack"], int(found["layer"]), found["rest"])


class Matcher:
    """A family's rules compiled once: rest of a name -> Match."""

    def __init__(self, family: Family) -> None:
        self._rows = [
            (compile_pattern(rule.pattern, {"proj": rule.projections}), rule)
            for rule in family.rules
        ]
        self._carried = family.carried
        self._stacked = tuple(
            format_name(rule.pattern, proj=word)
            for rule in family.rules
            if "{expert}" not in rule.pattern
            for word in rule.projections
        )

    def claims(self, rest: str) -> bool:
        """Return whether a name is that of an expert, so that some rule has to explain it."""
        if any(rest == module or rest.startswith(f"{module}.") for module in self._carried):
            return False
        return rest.startswith(self._stacked) or _EXPERT_WORD.search(rest) is not None

    def match(self, rest: str) -> Match | None:
        """Return the match of a name below its layer, None where no rule fits."""
        for base, part in _readings(rest):
            fits = [
                (found, rule)
                for pattern, rule in self._rows
                if _takes(rule, part) and (found := pattern.fullmatch(base))
            ]
            if fits:
                found = fits[0][0]
                fields = found.groupdict()
                expert = int(fields["expert"]) if fields.get("expert") is not None else None
                rules = tuple(rule for _, rule in fits)
                return Match(rules, base, part, expert, fields["proj"])
        return None


def _takes(rule: Rule, part: str) -> bool:
    if rule.parts:
        return part in rule.parts
    return part != "bias"


def _readings(rest: str) -> Iterable[tuple[str, str]]:
    """Yield the (base, part) readings of a name: a linear's, then a packed tensor's."""
    base, part = split_part(rest)
    if part:
        yield base, part
    if rest.endswith(".bias"):
        yield rest[: -len(".bias")], "bias"
    yield split_packed_part(rest)


def group_tensors(
    tensors: Mapping[str, TensorRef], family: Family, *, quantized: bool
) -> tuple[list[Group], list[Group]]:
    """Return (expert groups, other groups); every tensor is in exactly one of them.

    Raises UnrecognizedTensor for a name under `experts` that no rule explains, IncompleteModel for
    scales whose weight is missing.
    """
    matcher = Matcher(family)
    experts: dict[tuple[str, str], Group] = {}
    others: dict[str, Group] = {}
    for name, ref in tensors.items():
        place = split_layer(name)
        match = matcher.match(place.rest) if place.layer is not None else None
        if match is not None:
            prefix = name[: len(name) - len(place.rest)]
            kind = "bias" if match.part == "bias" else ""
            group = experts.get((prefix + match.base, kind))
            if group is None:
                group = Group(prefix + match.base, place, match)
                experts[(prefix + match.base, kind)] = group
            _add(group, "weight" if kind else match.part, ref)
            continue
        if matcher.claims(place.rest):
            raise _unrecognized(name, ref, family)
        _add_other(others, name, place, ref)
    _check_orphans(experts.values())
    return list(experts.values()), _settle_others(others, quantized=quantized)


def _add(group: Group, part: str, ref: TensorRef) -> None:
    if part in ACTIVATION_PARTS:
        group.activations.append(ref)
    elif part in group.parts:
        raise UnrecognizedTensor(
            f"'{ref.name}' and '{group.parts[part].name}' are the same part '{part}' of one weight",
            where=f"{ref.file}, {group.parts[part].file}",
            hint="keep one of them",
        )
    else:
        group.parts[part] = ref


def _add_other(others: dict[str, Group], name: str, place: LayerName, ref: TensorRef) -> None:
    base, part = split_part(name)
    if not part:
        base, part = name, "weight"
        others[base + "\0"] = Group(name, place, None, {"weight": ref})
        return
    rest = place.rest[: len(place.rest) - len(part) - 1]
    group = others.get(base)
    if group is None:
        group = others[base] = Group(base, LayerName(place.stack, place.layer, rest), None)
    _add(group, part, ref)


def _settle_others(others: Mapping[str, Group], *, quantized: bool) -> list[Group]:
    """Return the groups, parameters that are only called like a part standing alone."""
    settled: list[Group] = []
    for key, group in others.items():
        if key.endswith("\0"):
            settled.append(group)
            continue
        activations = group.activations if quantized else []
        loose = [] if quantized else group.activations
        if any(part in CARRIERS for part in group.parts):
            settled.append(Group(group.name, group.place, None, group.parts, activations))
        else:
            lone = [part for part in group.parts if part not in AMBIGUOUS]
            if lone:
                raise _orphan(group, lone)
            loose = loose + list(group.parts.values())
            if activations:
                settled.append(Group(group.name, group.place, None, {}, activations))
        settled += [Group(ref.name, split_layer(ref.name), None, {"weight": ref}) for ref in loose]
    return settled


def _check_orphans(groups: Iterable[Group]) -> None:
    for group in groups:
        if group.parts and not any(part in CARRIERS for part in group.parts):
            raise _orphan(group, list(group.parts))


def _orphan(group: Group, parts: Sequence[str]) -> IncompleteModel:
    first = group.parts[parts[0]]
    return IncompleteModel(
        f"'{first.name}' has no weight: none of {', '.join(CARRIERS)} of '{group.name}' is there",
        where=first.file,
        hint="a file of the checkpoint is missing or damaged; download it again",
    )


def _unrecognized(name: str, ref: TensorRef, family: Family) -> UnrecognizedTensor:
    patterns = ", ".join(sorted({rule.pattern for rule in family.rules}))
    return UnrecognizedTensor(
        f"'{name}' matches no rule of family '{family.name}'; its expert tensors are: {patterns}",
        where=ref.file,
        hint="this release of moeconv does not know the layout; look for a newer one",
    )
