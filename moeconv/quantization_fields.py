"""Typed fields of a quantization config: read, checked, and named in the error when wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from moeconv.errors import BadSource
from moeconv.types import Json

Value = int | str | bool | float
# Words of older exports for the same thing (compressed_tensors ActivationOrdering aliases).
ORDER_ALIASES: Mapping[str, str] = {"dynamic": "group", "static": "weight"}


class Origin(NamedTuple):
    """Where a JSON object lies: a file, and the dotted path in it ("" for the whole file)."""

    file: str
    path: str = ""

    def below(self, name: str) -> Origin:
        """Return the place of a field of this object."""
        return Origin(self.file, f"{self.path}.{name}" if self.path else name)

    def __str__(self) -> str:
        return f"{self.file}: {self.path}" if self.path else self.file


class Field(NamedTuple):
    """One field: the name of its value, other names it goes by, and what it may hold.

    `kind` is a row of KINDS. `choices` empty: any value of the kind.
    """

    name: str
    kind: str
    aliases: tuple[str, ...] = ()
    choices: tuple[Value, ...] = ()
    required: bool = False


def wrong(origin: Origin, value: Json, expected: str) -> BadSource:
    """Return the error for a field whose value is not what the format says."""
    name = origin.path.rpartition(".")[2] or origin.file
    return BadSource(
        f"{name} is {value!r}; expected {expected}",
        where=str(origin),
        hint="correct the file, or take it again from where the checkpoint came from",
    )


def contradiction(
    name: str, first: tuple[Origin, Value], second: tuple[Origin, Value]
) -> BadSource:
    """Return the error for two places that say different things of the same field."""
    return BadSource(
        f"contradictory config: {name} is {first[1]!r} in one place, {second[1]!r} in another",
        where=f"{first[0]} and {second[0]}",
        hint="find out which one describes the tensors, and remove the other",
    )


def _is_int(value: Json) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _count(value: Json) -> Value | None:
    return int(value) if _is_int(value) and value > 0 else None


def _group(value: Json) -> Value | None:
    return int(value) if _is_int(value) and (value > 0 or value == -1) else None


def _flag(value: Json) -> Value | None:
    return value if isinstance(value, bool) else None


def _word(value: Json) -> Value | None:
    return value.lower() if isinstance(value, str) and value else None


def _name(value: Json) -> Value | None:
    return value.upper() if isinstance(value, str) and value else None


def _order(value: Json) -> Value | None:
    if isinstance(value, bool):
        return "group" if value else "none"
    return ORDER_ALIASES.get(value.lower(), value.lower()) if isinstance(value, str) else None


KINDS: Mapping[str, tuple[Callable[[Json], Value | None], str]] = {
    "count": (_count, "a positive whole number"),
    "group": (_group, "a positive whole number of columns, or -1 for whole rows"),
    "flag": (_flag, "true or false"),
    "word": (_word, "a word"),
    "name": (_name, "a name"),
    "order": (_order, "a word, true or false"),
}


def read_fields(
    fields: Sequence[Field], raw: Mapping[str, Json], origin: Origin, *, partial: bool = False
) -> dict[str, Value]:
    """Return the values of the fields that are there; null is absent, unknown fields are left.

    `partial`: an override, where nothing is required.
    """
    values: dict[str, Value] = {}
    for field in fields:
        seen: tuple[Origin, Value] | None = None
        for name in (field.name, *field.aliases):
            if raw.get(name) is None:
                continue
            place = origin.below(name)
            value = _checked(field, raw[name], place)
            if seen is not None and seen[1] != value:
                raise contradiction(field.name, seen, (place, value))
            seen = seen or (place, value)
        if seen is not None:
            values[field.name] = seen[1]
        elif field.required and not partial:
            raise wrong(origin.below(field.name), None, KINDS[field.kind][1])
    return values


def _checked(field: Field, raw: Json, place: Origin) -> Value:
    check, expected = KINDS[field.kind]
    value = check(raw)
    if value is None:
        raise wrong(place, raw, expected)
    if field.choices and value not in field.choices:
        raise wrong(place, raw, "one of " + ", ".join(str(choice) for choice in field.choices))
    return value


def read_block(raw: Mapping[str, Json], name: str, origin: Origin) -> dict[str, Value]:
    """Return block_rows and block_cols of a [rows, cols] field ("128x128" too); {} without it."""
    value = raw.get(name)
    if value is None:
        return {}
    parts = value.split("x") if isinstance(value, str) else value
    extents = [_extent(part) for part in parts] if isinstance(parts, list | tuple) else []
    if len(extents) != 2 or None in extents:
        raise wrong(origin.below(name), value, "two positive whole numbers [rows, cols]")
    return {"block_rows": extents[0] or 0, "block_cols": extents[1] or 0}


def _extent(part: Json) -> Value | None:
    return _count(int(part) if isinstance(part, str) and part.isdecimal() else part)


def read_names(raw: Mapping[str, Json], name: str, origin: Origin) -> tuple[str, ...]:
    """Return a list of names; () where the field is absent or null."""
    value = raw.get(name)
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(one, str) for one in value):
        raise wrong(origin.below(name), value, "a list of names")
    return tuple(value)


def read_object(raw: Mapping[str, Json], name: str, origin: Origin) -> Mapping[str, Json]:
    """Return an object; {} where the field is absent or null."""
    value = raw.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise wrong(origin.below(name), value, "an object")
    return value
