"""JSON from strangers: what a header or a config says, or a JsonProblem, never anything else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import NoReturn

from moeconv.types import Json

MAX_CONFIG_DEPTH = 64
# Control characters, and halves of surrogate pairs, which UTF-8 cannot hold.
HALF_PAIR = re.compile("[\ud800-\udfff]")
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")

_Pairs = list[tuple[str, Json]]


class JsonProblem(ValueError):
    """What is wrong with a JSON text, as the end of a sentence about it."""


def parse_object(data: bytes) -> dict[str, Json]:
    """Return the object that `data` is; every key once, no NaN or Infinity."""
    return _load(data, _each_key_once, _refuse_constant)


def parse_config(data: bytes) -> dict[str, Json]:
    """Return the object that a model's config is.

    More lenient than `parse_object` where real configs are: Infinity is a value
    (`time_step_limit` of state-space models), a repeated key may repeat its value.
    """
    found = _load(data, _keys_agree, float)
    _check_depth(found)
    return found


def _load(
    data: bytes, hook: Callable[[_Pairs], Json], constant: Callable[[str], Json]
) -> dict[str, Json]:
    try:
        text = data.decode("utf-8")
        found = json.loads(text, object_pairs_hook=hook, parse_constant=constant)
    except UnicodeDecodeError as problem:
        raise JsonProblem(f"is not UTF-8 (byte {problem.start})") from None
    except RecursionError:
        raise JsonProblem("is nested too deeply") from None
    except JsonProblem:
        raise
    except ValueError as problem:  # JSONDecodeError, or an integer of more digits than int() takes
        raise JsonProblem(f"is not valid JSON ({problem})") from None
    if type(found) is not dict:
        raise JsonProblem(f"is a JSON {type(found).__name__}, not an object")
    return found


def _each_key_once(pairs: _Pairs) -> dict[str, Json]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise JsonProblem(f"has the key {_repeated(pairs)!r:.200} twice")
    return found


def _keys_agree(pairs: _Pairs) -> dict[str, Json]:
    found = dict(pairs)
    if len(found) != len(pairs) and any(found[key] != value for key, value in pairs):
        raise JsonProblem(f"has the key {_repeated(pairs)!r:.200} twice, with different values")
    return found


def _repeated(pairs: _Pairs) -> str:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            return key
        seen.add(key)
    return ""


def _refuse_constant(text: str) -> NoReturn:
    raise JsonProblem(f"has the value {text}, which JSON does not have")


def _check_depth(value: Json) -> None:
    level = [value]
    for _ in range(MAX_CONFIG_DEPTH):
        inner: list[Json] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
        if not inner:
            return
        level = inner
    raise JsonProblem(f"is nested more than {MAX_CONFIG_DEPTH} levels deep")
