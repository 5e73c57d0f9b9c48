"""Data files read again, past the page cache, and the digest of every segment compared."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from moeconv.finished import RecordedFile, Segment
from moeconv.store import system
from moeconv.store.buffers import aligned
from moeconv.store.direct import open_direct
from moeconv.store.reader import open_regular, read_range
from moeconv.types import TensorRef

UNIT_NBYTES = 64 << 20  # neighbouring segments that one thread reads in one go
CHUNK_NBYTES = 8 << 20
PAGE_NBYTES = 4096


class Unit(NamedTuple):
    """Neighbouring segments of a file, read by one thread."""

    file: RecordedFile
    segments: tuple[Segment, ...]

    @property
    def nbytes(self) -> int:
        return sum(segment.nbytes for segment in self.segments)


def units_of(file: RecordedFile, actual_nbytes: int) -> Iterator[Unit]:
    """Yield the segments that lie within the bytes that are there, some at a time."""
    group: list[Segment] = []
    nbytes = 0
    for segment in file.segments:
        if segment.offset + segment.nbytes > actual_nbytes:
            break
        if not segment.nbytes:
            continue
        if group and nbytes + segment.nbytes > UNIT_NBYTES:
            yield Unit(file, tuple(group))
            group, nbytes = [], 0
        group.append(segment)
        nbytes += segment.nbytes
    if group:
        yield Unit(file, tuple(group))


def damaged_segments(root: Path, unit: Unit) -> tuple[Segment, ...]:
    """Return the segments whose bytes are not those that were written; raises IOFailed."""
    damaged = []
    first, last = unit.segments[0], unit.segments[-1]
    pending = list(reversed(unit.segments))
    digest = xxhash.xxh3_128()
    with _File(root / unit.file.name, unit.file.name) as file:
        for at, data in file.chunks(first.offset, last.offset + last.nbytes):
            while pending:
                segment = pending[-1]
                end = segment.offset + segment.nbytes
                digest.update(data[max(segment.offset - at, 0) : end - at].data)
                if end > at + data.size:
                    break
                if digest.hexdigest() != segment.digest:
                    damaged.append(segment)
                digest = xxhash.xxh3_128()
                pending.pop()
    return tuple(damaged + pending)  # pending: the file became shorter


def tensors_within(tensors: Sequence[TensorRef], begin: int, end: int) -> list[str]:
    """Return the names of the tensors that have bytes in [begin, end); `tensors` by offset."""
    index = max(bisect_right(tensors, begin, key=lambda ref: ref.offset) - 1, 0)
    found = []
    while index < len(tensors) and tensors[index].offset < end:
        ref = tensors[index]
        if ref.offset + ref.nbytes > begin:
            found.append(ref.name)
        index += 1
    return found


class _File:
    """A file read in large pieces, past the page cache where the file system allows it.

    What is proven is then what lies on the disk, and the cache stays with whoever uses it.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._name = name
        self._plain = open_regular(path, name)
        try:
            self._direct = open_direct(path, os.O_RDONLY)
        except OSError as error:
            os.close(self._plain)
            raise system.failed("read", error, str(path)) from error

    def __enter__(self) -> _File:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for descriptor in (self._plain, self._direct):
            if descriptor >= 0:
                os.close(descriptor)

    def chunks(self, begin: int, end: int) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """Yield (offset, bytes) from the page of `begin` to `end`; each replaces the one before."""
        start = begin // PAGE_NBYTES * PAGE_NBYTES
        memory = aligned(min(CHUNK_NBYTES, -(-(end - start) // PAGE_NBYTES) * PAGE_NBYTES))
        for at in range(start, end, CHUNK_NBYTES):
            wanted = min(CHUNK_NBYTES, end - at)
            got = self._read(at, memory[: -(-wanted // PAGE_NBYTES) * PAGE_NBYTES])
            yield at, memory[: min(got, wanted)]
            if got < wanted:
                return

    def _read(self, at: int, memory: npt.NDArray[np.uint8]) -> int:
        """Return how many bytes from `at` on were read, fewer only at the end of the file."""
        got = 0
        if self._direct >= 0:
            try:
                got = os.preadv(self._direct, [memory.data], at)
            except OSError as error:
                if error.errno not in system.UNSUPPORTED:
                    raise system.failed("read", error, f"{self._name}, byte {at}") from error
        if got < memory.size:  # the end of the file, or no direct reads here
            got += read_range(self._plain, self._name, at + got, memory[got:])
        return got
