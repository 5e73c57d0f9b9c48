"""Name patterns: one text that both recognises a tensor name and writes it.

`{layer}` and `{expert}` are numbers without leading zeros; any other field is one of the words
given for it, or a run of characters without a dot.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache

_FIELD = re.compile(r"\{(\w+)\}")
_NUMBERS = frozenset({"layer", "expert", "rank"})
_NUMBER = r"(0|[1-9][0-9]{0,5})"


def compile_pattern(
    pattern: str, words: Mapping[str, Iterable[str]] | None = None
) -> re.Pattern[str]:
    """Return the regular expression (named groups, whole name) for a pattern."""
    pieces: list[str] = []
    end = 0
    for field in _FIELD.finditer(pattern):
        pieces.append(re.escape(pattern[end : field.start()]))
        pieces.append(_field_expression(field[1], words or {}))
        end = field.end()
    pieces.append(re.escape(pattern[end:]))
    return re.compile("".join(pieces))


def _field_expression(name: str, words: Mapping[str, Iterable[str]]) -> str:
    if name in words:
        options = "|".join(re.escape(word) for word in sorted(words[name], key=len, reverse=True))
        return f"(?P<{name}>{options})"
    if name in _NUMBERS:
        return f"(?P<{name}>{_NUMBER[1:-1]})"
    return rf"(?P<{name}>[^.]+)"


@cache
def fields(pattern: str) -> tuple[str, ...]:
    """Return the field names of a pattern, in order."""
    return tuple(_FIELD.findall(pattern))


def format_name(pattern: str, **values: object) -> str:
    """Write a name from a pattern; a KeyError names a field without a value."""
    return pattern.format_map(values)
