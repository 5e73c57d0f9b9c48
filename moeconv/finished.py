"""A finished output as its manifest tells it: parsed strictly, nothing in it believed unchecked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from moeconv.destination import MANIFEST, STARTED
from moeconv.digest import json_digest
from moeconv.errors import IOFailed, UsageError, VerifyFailed
from moeconv.manifest import dump_json
from moeconv.ownership import is_plain_name, is_started, read_object
from moeconv.plan import FORMAT_VERSION
from moeconv.store.lock import STATE_DIRECTORY
from moeconv.store.strictjson import JsonProblem, parse_object
from moeconv.types import Json

# Not --overwrite: nothing is removed by a list of names that cannot be believed.
_DAMAGED_HINT = "restore it from a copy; or remove the directory and convert anew"
_DIGEST = re.compile("[0-9a-f]{32}")
_FIELDS: Mapping[str, type] = {
    "moeconv": str,
    "format": int,
    "plan": str,
    "source": str,
    "options": dict,
    "files": list,
    "auxiliary": list,
    "layout": str,
    "family": str,
    "partial": bool,
    "accounting": dict,
    "experts": dict,
    "layout_facts": dict,
    "notes": list,
    "configs": list,
    "beside": dict,
    "digest": str,
}
_FILE_FIELDS: Mapping[str, type] = {
    "name": str,
    "rank": int,
    "nbytes": int,
    "tensors": int,
    "segments": list,
}


class Segment(NamedTuple):
    """Bytes [offset, offset + nbytes) of a file and their xxh3-128."""

    offset: int
    nbytes: int
    digest: str


class RecordedFile(NamedTuple):
    """A data file as the manifest tells it; `numa` is None where files are not split over nodes.

    The segments follow one another from byte 0 to `nbytes`.
    """

    name: str
    rank: int
    numa: int | None
    nbytes: int
    tensors: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished output directory; `facts` is its whole manifest, `beside`: file name -> digest."""

    root: Path
    facts: Mapping[str, Json]
    files: tuple[RecordedFile, ...]
    beside: Mapping[str, str]

    @property
    def layout(self) -> str:
        return str(self.facts["layout"])


def read_finished(dst: Path) -> Finished:
    """Return what the manifest of a finished output says.

    UsageError where there is no directory; VerifyFailed where it holds no finished output, or one
    whose manifest is damaged or of another format version.
    """
    if not dst.is_dir():
        raise UsageError(f"there is no directory {str(dst)!r}", hint="check the path of DST")
    started = dst / STATE_DIRECTORY / STARTED
    if started.exists():
        facts = read_object(started)
        if facts is None or not is_started(facts):
            raise VerifyFailed(
                "the output is unfinished, and its record is damaged",
                where=str(started),
                hint="remove the directory and convert anew",
            )
        raise VerifyFailed(
            "the output is unfinished",
            where=str(dst),
            hint="the moeconv convert command that began it continues it",
        )
    path = dst / MANIFEST
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise VerifyFailed(
            f"DST holds no output of moeconv: there is no {MANIFEST}",
            where=str(dst),
            hint="give the directory that moeconv convert wrote",
        ) from None
    except OSError as error:
        raise IOFailed(
            f"{MANIFEST} cannot be read: {error.strerror}",
            where=str(path),
            hint="check its permissions and the disk",
        ) from error
    try:
        return _parse(dst, data)
    except JsonProblem as problem:
        raise VerifyFailed(f"the manifest {problem}", where=str(path), hint=_DAMAGED_HINT) from None


def _parse(root: Path, data: bytes) -> Finished:
    """Return the manifest that `data` is; a JsonProblem says what is wrong with it."""
    facts = parse_object(data)
    if facts.get("format") != FORMAT_VERSION and type(facts.get("format")) is int:
        raise VerifyFailed(
            f"the manifest has format version {facts['format']}; this moeconv reads "
            f"{FORMAT_VERSION}",
            where=MANIFEST,
            hint=f"verify with moeconv {facts.get('moeconv')}, which made it",
        )
    _check_types(facts, _FIELDS, "the manifest")
    rest = {name: value for name, value in facts.items() if name != "digest"}
    if json_digest(rest) != facts["digest"] or dump_json(facts) != data:
        raise JsonProblem("is damaged: it is not the text that its own digest names")
    files = tuple(_file(entry) for entry in facts["files"])
    names = [file.name for file in files]
    if len(set(names)) != len(names) or not names:
        raise JsonProblem("names no file, or one twice")
    for name, digest in facts["beside"].items():
        _check_name(name)
        _check_digest(digest)
    return Finished(root, facts, files, facts["beside"])


def _check_types(found: Json, fields: Mapping[str, type], what: str) -> None:
    if type(found) is not dict:
        raise JsonProblem(f"has {what} that is no object")
    for name, kind in fields.items():
        if type(found.get(name)) is not kind:
            raise JsonProblem(f"has no {kind.__name__} '{name}' in {what}")


def _file(entry: Json) -> RecordedFile:
    _check_types(entry, _FILE_FIELDS, "a file")
    _check_name(entry["name"])
    if entry.get("numa") is not None and type(entry["numa"]) is not int:
        raise JsonProblem("has a file whose 'numa' is no number")
    segments = tuple(_segments(entry))
    return RecordedFile(
        entry["name"],
        entry["rank"],
        entry.get("numa"),
        entry["nbytes"],
        entry["tensors"],
        segments,
    )


def _segments(entry: Json) -> Iterator[Segment]:
    """Yield a file's segments, which must cover it from 0 to its end."""
    at = 0
    for found in entry["segments"]:
        if type(found) is not list or [type(one) for one in found] != [int, int, str]:
            raise JsonProblem("has a segment that is not [offset, bytes, digest]")
        segment = Segment(*found)
        _check_digest(segment.digest)
        if segment.offset != at or segment.nbytes < 0:
            raise JsonProblem(f"has segments of {entry['name']} with a hole or overlap at {at}")
        at += segment.nbytes
        yield segment
    if at != entry["nbytes"]:
        raise JsonProblem(f"has segments of {entry['name']} that end at {at}")


def _check_name(name: str) -> None:
    if not is_plain_name(name):
        raise JsonProblem(f"names the file {name!r:.200}, which is not in the directory itself")


def _check_digest(digest: Json) -> None:
    if type(digest) is not str or not _DIGEST.fullmatch(digest):
        raise JsonProblem(f"has the digest {digest!r:.80}, which is no xxh3-128")
