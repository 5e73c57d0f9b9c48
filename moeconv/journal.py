"""What is done: an append-only file of JSON lines, each proven by a checksum over all before it.

A crash may tear the last line, a disk may garble any: what comes after the first line that does
not prove itself counts as not done, and is cut off. So reading never fails and never believes a
line that was not written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import xxhash

from moeconv import errors
from moeconv.store import system
from moeconv.store.writer import write_small_file
from moeconv.types import Json

JOURNAL_NAME = "journal"
FORMAT = 1
_CHECK_DIGITS = 16


class Header(NamedTuple):
    """Which conversion a journal belongs to: the digests of its plan and source, and the tool."""

    plan: str
    source: str
    tool: str


class Segment(NamedTuple):
    """Written bytes: `nbytes` at `offset` of the output file with this index; xxh3-128 in hex."""

    file: int
    offset: int
    nbytes: int
    digest: str


class Entry(NamedTuple):
    """One finished task: the files it touched (None: not told), its segments and its counts."""

    task: int
    files: tuple[int, ...] | None
    segments: tuple[Segment, ...]
    counts: Mapping[str, int]


class Journal:
    """A journal open for appending; made by `create` or `open`."""

    def __init__(self, path: Path, end: int, check: int) -> None:
        self._path = path
        self._end = end
        self._check = check
        self._fd = system.open_file(path, os.O_WRONLY)

    @classmethod
    def create(cls, path: Path, header: Header) -> Journal:
        """Return a new journal with no entries, in place of whatever was at `path`."""
        payload = _dump({"format": FORMAT, **header._asdict()})
        line, check = _line(payload, 0)
        write_small_file(path, line)
        return cls._for_append(path, len(line), check)

    @classmethod
    def open(cls, path: Path) -> tuple[Journal, Header, list[Entry]] | None:
        """Return the journal, its header and entries; None if no journal can be read at `path`.

        Lines that do not prove themselves are cut off the file.
        """
        found = _read(path)
        if found is None:
            return None
        header, entries, end, check = found
        journal = cls._for_append(path, end, check)
        try:
            system.truncate(journal._fd, end)
        except OSError as error:
            journal.close()
            raise system.failed("cut the end off", error, str(path)) from error
        return journal, header, entries

    def append(self, entries: Sequence[Entry]) -> None:
        """Add finished tasks, durable on return. What they wrote must be durable before."""
        if not entries:
            return
        lines, check = [], self._check
        for entry in entries:
            line, check = _line(_dump(entry._asdict()), check)
            lines.append(line)
        data = b"".join(lines)
        try:
            self._write(data)
            system.sync_data(self._fd)
        except OSError as error:
            # Nothing is believed of it: the next append writes over it from the same place.
            where = f"{self._path}, bytes {self._end}..{self._end + len(data)}"
            raise system.failed("append to the journal", error, where) from error
        self._end += len(data)
        self._check = check

    def close(self) -> None:
        """Close the file; appended entries are durable already."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @classmethod
    def _for_append(cls, path: Path, end: int, check: int) -> Journal:
        try:
            return cls(path, end, check)
        except OSError as error:
            raise system.failed("open the journal", error, str(path)) from error

    def _write(self, data: bytes) -> None:
        system.write_all(self._fd, memoryview(data), self._end)


def read_journal(path: Path) -> tuple[Header, list[Entry]] | None:
    """Return the header and the proven entries, changing nothing; None if there is no journal."""
    found = _read(path)
    return None if found is None else (found[0], found[1])


def _read(path: Path) -> tuple[Header, list[Entry], int, int] | None:
    """Return header, entries, the bytes that they take and the last line's checksum."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise system.failed("read the journal", error, str(path)) from error
    payloads, end, check = _proven(data)
    if not payloads:
        return None
    header = _header(json.loads(payloads[0]), path)
    return header, [_entry(json.loads(payload)) for payload in payloads[1:]], end, check


def _proven(data: bytes) -> tuple[list[bytes], int, int]:
    """Return the payloads before the first bad line, the bytes they take, the last checksum."""
    payloads, end, check = [], 0, 0
    for line in data.split(b"\n")[:-1]:
        payload = line[_CHECK_DIGITS + 1 :]
        expected, next_check = _line(payload, check)
        if expected[:-1] != line:
            break
        payloads.append(payload)
        end, check = end + len(expected), next_check
    return payloads, end, check


def _line(payload: bytes, previous: int) -> tuple[bytes, int]:
    """Return the line of a payload and its checksum, seeded with that of the line before."""
    check = xxhash.xxh3_64_intdigest(payload, seed=previous)
    return b"%016x %b\n" % (check, payload), check


def _dump(value: Json) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode("ascii")


def _header(value: Json, path: Path) -> Header:
    if value["format"] != FORMAT:
        raise errors.Refused(
            f"the journal has format {value['format']}, this version reads format {FORMAT}",
            where=str(path),
            hint="continue with the version that began, or start anew with --overwrite",
        )
    return Header(value["plan"], value["source"], value["tool"])


def _entry(value: Json) -> Entry:
    files = value["files"]
    return Entry(
        task=value["task"],
        files=None if files is None else tuple(files),
        segments=tuple(Segment(*segment) for segment in value["segments"]),
        counts=value["counts"],
    )
