"""What a quantization config declares once it is read: rules in order, facts, skips."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from moeconv.codecs.base import QuantScheme
from moeconv.quantization_fields import Origin, Value, wrong
from moeconv.quantization_names import Names, names_of, skip_names

UNQUANTIZED = QuantScheme("", {})


class Rule(NamedTuple):
    """These modules are written in this scheme; of several rules the first counts."""

    names: Names
    scheme: QuantScheme


class Declared(NamedTuple):
    """What one config says: rules in order, facts to compare with another config, and skips.

    `complete`: False where the config only announces schemes that another file lists.
    """

    method: str
    origin: Origin
    rules: tuple[Rule, ...]
    facts: Mapping[str, Value]
    skipped: tuple[str, ...]
    complete: bool = True


def pattern_names(patterns: Sequence[str], origin: Origin) -> Names:
    """Return the modules that regular expressions match from the start of the name."""
    try:
        return names_of(patterns=patterns)
    except re.error as error:
        raise wrong(origin, error.pattern, f"a regular expression ({error})") from None


def read_skips(entries: Sequence[str], origin: Origin) -> Names:
    """Return the modules of a `modules_to_not_convert` list."""
    try:
        return skip_names(entries)
    except re.error as error:
        raise wrong(origin, error.pattern, f"a regular expression ({error})") from None
