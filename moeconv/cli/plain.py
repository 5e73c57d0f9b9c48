"""A line of words read as typer reads it, where nothing in it has to be explained.

typer takes longer to import and to set up than a small conversion. It has the last word: for help,
completion and whatever is not plainly right.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from moeconv.cli.commands import COMMANDS
from moeconv.cli.options import PARSERS, Row, flags_of
from moeconv.cli.parse import NotParsed

_COMPLETE = "_MOECONV_COMPLETE"  # set by the shell that asks typer to complete a line
_NUMBER = re.compile("[0-9]{1,9}")


class Plain(NamedTuple):
    """A command and the values that it is called with."""

    function: Callable[[Mapping[str, Any]], int]
    values: dict[str, Any]


def read_plain(words: Sequence[str]) -> Plain | None:
    """Return what a command line asks for; None where typer has to look at it."""
    entry = next((one for one in COMMANDS if list(words[:1]) == [one.name]), None)
    if entry is None or _COMPLETE in os.environ:
        return None
    flags = {flag: row for row in entry.rows if not row.argument for flag in flags_of(row)}
    places = [row for row in entry.rows if row.argument]
    values: dict[str, Any] = {}
    rest = list(words[:0:-1])  # the next word last
    try:
        while rest:
            flag, equals, text = rest.pop().partition("=")
            if flag[:1] != "-":
                values[places.pop(0).name] = flag + equals + text
                continue
            row = flags[flag]
            if row.kind == "flag":
                value = _switched(row, equals)
            else:
                value = _read(row, text if equals else rest.pop())
            values[row.name] = [*values.get(row.name, ()), value] if row.kind == "texts" else value
    except (LookupError, NotParsed):
        return None
    return None if any(not row.optional for row in places) else Plain(entry.function, values)


def _switched(row: Row, equals: str) -> bool:
    """Return what a flag means, which takes no value."""
    if equals:
        raise NotParsed(row.name)
    return True


def _read(row: Row, text: str) -> Any:
    """Return the value that a text means for an option."""
    if row.kind in PARSERS:
        return PARSERS[row.kind](text)
    if row.kind == "number" and (not _NUMBER.fullmatch(text) or int(text) < row.least):
        raise NotParsed(text)
    if row.kind == "choice" and text not in row.choices:
        raise NotParsed(text)
    return int(text) if row.kind == "number" else text
