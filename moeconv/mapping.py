"""A data file in memory: mapped as it lies there, or tensors of it copied to a NUMA node."""

from __future__ import annotations

import mmap
import os
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from moeconv.errors import Refused, VerifyFailed
from moeconv.finished import RecordedFile
from moeconv.numa import bound_memory
from moeconv.parallel import in_threads
from moeconv.store.reader import open_regular, read_range
from moeconv.types import TensorRef

PAGE_NBYTES = mmap.PAGESIZE
COPY_NBYTES = 64 << 20
COPY_THREADS = 4
# Python names it from 3.11 on, and only where its own headers do.
MAP_NORESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000)


class Stored(NamedTuple):
    """A tensor and the memory that holds it, at the offset that `ref` tells."""

    ref: TensorRef
    memory: mmap.mmap


def mapped(path: Path, file: RecordedFile) -> mmap.mmap:
    """Return a private mapping of a whole file, writable without changing the file."""
    descriptor = open_regular(path, file.name)
    try:
        # No reservation: pages that nobody writes take no memory, and a file may be larger than it.
        flags = mmap.MAP_PRIVATE | MAP_NORESERVE
        return mmap.mmap(descriptor, 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except (OSError, ValueError) as error:
        raise Refused(f"the file cannot be mapped: {error}", where=str(path)) from error
    finally:
        os.close(descriptor)


class _Run(NamedTuple):
    """Neighbouring tensors of a file, and where their bytes go in memory."""

    offset: int
    nbytes: int
    at: int


def _runs(refs: Sequence[TensorRef]) -> list[_Run]:
    """Return the tensors' bytes in runs without gaps, each at its offset modulo a page."""
    runs: list[_Run] = []
    for ref in refs:
        last = runs[-1] if runs else _Run(0, 0, 0)
        if runs and last.offset + last.nbytes == ref.offset:
            runs[-1] = last._replace(nbytes=last.nbytes + ref.nbytes)
        else:
            page = -(-(last.at + last.nbytes) // PAGE_NBYTES) * PAGE_NBYTES
            runs.append(_Run(ref.offset, ref.nbytes, page + ref.offset % PAGE_NBYTES))
    return runs


def copied(
    path: Path, file: RecordedFile, refs: Sequence[TensorRef], node: int
) -> dict[str, Stored]:
    """Return the tensors by name, copied into memory of a NUMA node."""
    runs = _runs(refs)
    memory = bound_memory(runs[-1].at + runs[-1].nbytes if runs else 0, node).memory
    pieces = [
        _Run(run.offset + done, min(COPY_NBYTES, run.nbytes - done), run.at + done)
        for run in runs
        for done in range(0, run.nbytes, COPY_NBYTES)
    ]
    view = memoryview(memory)
    descriptor = open_regular(path, file.name)

    def copy(piece: _Run) -> int:
        into = view[piece.at : piece.at + piece.nbytes]
        return read_range(descriptor, file.name, piece.offset, into)

    try:
        copied = sum(count for _, count in in_threads(copy, pieces, COPY_THREADS))
    finally:
        os.close(descriptor)
        view.release()
    if copied != sum(run.nbytes for run in runs):
        raise VerifyFailed("the file became shorter while it was read", where=str(path))
    stored = {}
    for ref in refs:
        run = runs[bisect_right(runs, ref.offset, key=lambda one: one.offset) - 1]
        moved = ref._replace(offset=run.at + ref.offset - run.offset)
        stored[ref.name] = Stored(moved, memory)
    return stored
