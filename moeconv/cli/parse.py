"""Texts of the command line -> values: sizes, lists of numbers, expert maps."""

from __future__ import annotations

import json
import re
from pathlib import Path

from typer import BadParameter

UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)")
_SHARE = re.compile(r"[0-9]+(?:\.[0-9]+)?")
_RANGE = re.compile(r"([0-9]+)(?:-([0-9]+))?")
_MOST_NUMBERS = 1_000_000  # a longer range is a slip of the finger


def parse_size(text: str) -> int:
    """Return the bytes that a size such as 5GB, 1.5GiB or 4096 means; BadParameter if none."""
    found = _SIZE.fullmatch(text.strip())
    unit = UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None:
        raise BadParameter(f"{text!r} is not a size; write 5GB, 512MiB or a number of bytes")
    whole, _, fraction = found[1].partition(".")
    nbytes = int(whole + fraction) * unit // int(10 ** len(fraction))
    if not 0 < nbytes < 2**63:
        raise BadParameter(f"{text!r} is not a size between 1 byte and 2^63")
    return nbytes


def parse_share(text: str) -> float:
    """Return the share that 5% or 0.05 means, above 0 and at most 1; BadParameter if none."""
    body = text.strip().removesuffix("%")
    if _SHARE.fullmatch(body):
        share = float(body) / (100 if "%" in text else 1)
        if 0 < share <= 1:
            return share
    raise BadParameter(f"{text!r} is not a share above 0 and at most 1; write 5% or 0.05")


def parse_numbers(text: str) -> tuple[int, ...]:
    """Return the numbers of a list such as 0,3-5 in rising order; BadParameter if it is none."""
    numbers: set[int] = set()
    for part in text.split(","):
        found = _RANGE.fullmatch(part.strip())
        if found is None:
            raise BadParameter(f"{text!r} is not a list of numbers; write 0,3-5")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first or last - first >= _MOST_NUMBERS:
            raise BadParameter(f"{part.strip()!r} is not a range from a number to a larger")
        numbers.update(range(first, last + 1))
    return tuple(sorted(numbers))


def show_numbers(numbers: tuple[int, ...] | list[int]) -> str:
    """Return numbers as a list that parse_numbers reads: 0,3-5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def read_expert_map(text: str) -> tuple[tuple[int, ...], ...]:
    """Return the experts of each rank from a JSON file: [[0, 1], [2, 3]] or {"0": [0, 1], ...}."""
    form = 'it must be [[0, 1], [2, 3]] or {"0": [0, 1], "1": [2, 3]}: the experts of each rank'
    try:
        found = json.loads(Path(text).read_bytes())
    except OSError as error:
        raise BadParameter(f"cannot read {text!r}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise BadParameter(f"{text!r} is not JSON; {form}") from None
    if isinstance(found, dict):
        if set(found) != {str(rank) for rank in range(len(found))}:
            raise BadParameter(f"{text!r} does not have the ranks 0, 1, ... as keys; {form}")
        found = [found[str(rank)] for rank in range(len(found))]
    if not isinstance(found, list) or not all(_is_experts(row) for row in found):
        raise BadParameter(f"{text!r} is not a map of experts; {form}")
    return tuple(tuple(row) for row in found)


def _is_experts(row: object) -> bool:
    return isinstance(row, list) and all(type(one) is int and one >= 0 for one in row)
