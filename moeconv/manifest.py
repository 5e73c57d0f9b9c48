"""The manifest: what an output is, byte by byte, and how it came to be. No times, no paths."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import xxhash

from moeconv import __version__
from moeconv.accounting import Accounting
from moeconv.destination import facts_of
from moeconv.journal import Entry
from moeconv.plan import Plan
from moeconv.types import Json

COUNTED = ("nan", "inf", "overflow")
_NESTED = (Mapping, list, tuple)


class Outcome(NamedTuple):
    """What the tasks of a finished output did: digest by (file, offset, bytes); counts.

    `nan`, `inf`: of the source's experts; `overflow`: finite values that became Inf.
    """

    segments: Mapping[int, Mapping[tuple[int, int], str]]
    nan: int
    inf: int
    overflow: int


def outcome_of(entries: Sequence[Entry]) -> Outcome:
    """Return what journal entries add up to."""
    segments: dict[int, dict[tuple[int, int], str]] = {}
    counts: dict[int, Mapping[str, int]] = {}
    for entry in entries:
        counts[entry.task] = entry.counts
        for segment in entry.segments:
            of_file = segments.setdefault(segment.file, {})
            of_file[segment.offset, segment.nbytes] = segment.digest
    totals = [sum(one.get(name, 0) for one in counts.values()) for name in COUNTED]
    return Outcome(segments, *totals)


def build_manifest(plan: Plan, outcome: Outcome) -> dict[str, Json]:
    """Return the manifest; an AssertionError if the segments do not cover every byte once."""
    facts = facts_of(plan)
    manifest: dict[str, Json] = {
        "moeconv": __version__,
        **facts,
        "layout": plan.options.layout,
        "family": plan.model.family.name,
        "partial": plan.options.partial,
        "files": [
            {
                "name": file.name,
                "rank": file.rank,
                "nbytes": file.nbytes,
                "tensors": len(file.tensors),
                "segments": _segments(file.name, file.header, file.nbytes, outcome.segments[index]),
            }
            for index, file in enumerate(plan.files)
        ],
        "accounting": accounting_facts(plan.accounting),
        "experts": {"nan": outcome.nan, "inf": outcome.inf},
        "overflow": outcome.overflow,
        "layout_facts": dict(plan.facts),
        "notes": list(plan.notes),
    }
    return manifest


def _segments(
    name: str, header: bytes, nbytes: int, found: Mapping[tuple[int, int], str]
) -> list[Json]:
    """Return [offset, bytes, xxh3-128] of the whole file in order."""
    segments: list[Json] = [[0, len(header), xxhash.xxh3_128_hexdigest(header)]]
    at = len(header)
    for (offset, length), digest in sorted(found.items()):
        if offset != at:
            raise AssertionError(f"{name}: bytes {at}..{offset} were written twice or never")
        segments.append([offset, length, digest])
        at += length
    if at != nbytes:
        raise AssertionError(f"{name}: bytes {at}..{nbytes} were never written")
    return segments


def accounting_facts(accounting: Accounting) -> dict[str, Json]:
    """Return tensors and bytes per state, and the names of what was dropped, by rule."""
    dropped: dict[str, list[str]] = {}
    for state in accounting.states:
        if state.state == "dropped":
            dropped.setdefault(state.rule, []).append(state.ref.name)
    return {
        "source": {
            name: {"tensors": tensors, "nbytes": nbytes}
            for name, (tensors, nbytes) in accounting.totals().items()
        },
        "dropped": {rule: sorted(names) for rule, names in sorted(dropped.items())},
        "output_tensors": accounting.output_tensors,
    }


def dump_json(value: Json) -> bytes:
    """Return a JSON file's bytes: the same for the same value, lists of plain values on a line."""
    return "".join(_written(value, "\n")).encode() + b"\n"


def _written(value: Json, line: str) -> Iterator[str]:
    """Yield the text of a value; `line` is a line break and the indentation after it."""
    inner = f"{line} "
    if isinstance(value, Mapping) and value:
        opening = "{"
        for key, one in value.items():
            yield f"{opening}{inner}{json.dumps(key, ensure_ascii=False)}: "
            yield from _written(one, inner)
            opening = ","
        yield f"{line}}}"
    elif isinstance(value, list | tuple) and any(isinstance(one, _NESTED) for one in value):
        opening = "["
        for one in value:
            yield f"{opening}{inner}"
            yield from _written(one, inner)
            opening = ","
        yield f"{line}]"
    else:
        yield json.dumps(value, ensure_ascii=False)
