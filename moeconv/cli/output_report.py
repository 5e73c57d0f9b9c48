"""An output directory -> what `inspect DST` says of it, as JSON values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from moeconv.cli.output_map import output_map
from moeconv.destination import Found
from moeconv.errors import BadSource, MoeconvError
from moeconv.finished import Finished
from moeconv.journal import JOURNAL_NAME, read_journal
from moeconv.store.lock import STATE_DIRECTORY
from moeconv.store.writer import partial_path
from moeconv.types import Json


def describe_output(dst: Path, found: Found, finished: Finished | None) -> dict[str, Json]:
    """Return everything that `inspect DST` knows of a finished or unfinished output.

    `map`: what lies where in a finished output; None where a file's header cannot be read.
    """
    facts = found.facts
    options = facts.get("options")
    files = facts.get("files")
    if not isinstance(options, dict) or not isinstance(files, list):
        raise BadSource("the manifest is not one that moeconv writes", where=str(dst))
    layout_facts = facts.get("layout_facts")
    report: dict[str, Json] = {
        "kind": "output",
        "path": str(dst),
        "state": found.state,
        "layout": options.get("layout"),
        "family": facts.get("family"),
        "partial": facts.get("partial"),
        "ranks": _count(options, "tp") * _count(options, "dp"),
        "options": options,
        "rank_experts": layout_facts.get("experts") if isinstance(layout_facts, dict) else None,
        "made_by": facts.get("moeconv"),
        "format": facts.get("format"),
        "source": facts.get("source"),
        "plan": facts.get("plan"),
        "files": _files(dst, files, _journalled(dst, found)),
        "experts": facts.get("experts"),
        "accounting": facts.get("accounting"),
        "auxiliary": facts.get("auxiliary"),
        "layout_facts": layout_facts,
        "notes": list(facts.get("notes") or []),
    }
    report["map"], problem = _map(finished, report["files"])
    report["notes"] += problem
    report["nbytes"] = sum(file["nbytes"] or 0 for file in report["files"])
    return report


def _map(finished: Finished | None, files: list[Json]) -> tuple[Json, list[str]]:
    """Return the map of the complete files, and why there is none."""
    if finished is None:
        return None, []
    complete = [file["name"] for file in files if file["state"] == "complete"]
    try:
        return output_map(finished, complete), []
    except MoeconvError as error:
        return None, [f"what lies where is not shown: {error.what}"]


def _count(options: Mapping[str, Json], name: str) -> int:
    value = options.get(name)
    return value if isinstance(value, int) else 1


def _journalled(dst: Path, found: Found) -> Mapping[int, int]:
    """Return the bytes that are done by file index, of an unfinished output."""
    if found.state != "unfinished":
        return {}
    journal = read_journal(dst / STATE_DIRECTORY / JOURNAL_NAME)
    done: dict[int, int] = {}
    seen: set[tuple[int, int, int]] = set()
    for entry in journal[1] if journal else ():
        for segment in entry.segments:
            place = (segment.file, segment.offset, segment.nbytes)
            if place not in seen:
                seen.add(place)
                done[segment.file] = done.get(segment.file, 0) + segment.nbytes
    return done


def _files(dst: Path, files: list[Json], done: Mapping[int, int]) -> list[Json]:
    """Return name, rank, bytes as planned and the state of each file."""
    rows = []
    for index, file in enumerate(files):
        row = file if isinstance(file, dict) else {"name": file}
        name = str(row.get("name"))
        there, partial = _nbytes(dst / name), _nbytes(partial_path(dst / name))
        planned = row.get("nbytes", there if partial is None else partial)
        rows.append(
            {
                "name": name,
                "rank": row.get("rank"),
                "tensors": row.get("tensors"),
                "nbytes": planned,
                "done_nbytes": there if there is not None else done.get(index, 0),
                "state": _state(there, partial, planned),
            }
        )
    return rows


def _state(there: int | None, partial: int | None, planned: Json) -> str:
    if there is not None:
        return "complete" if there == planned else "wrong size"
    return "missing" if partial is None else "unfinished"


def _nbytes(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
