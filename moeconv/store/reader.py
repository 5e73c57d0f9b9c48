"""Reading bytes at rest: ranges and regular runs of files, by many threads at once.

Large ranges that the page cache does not hold go past it: the source would fill it with what is
read once. What it holds, as after a download, is taken from it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from moeconv.errors import BadSource, IOFailed, MoeconvError
from moeconv.store import direct, system
from moeconv.store.buffers import BufferPool
from moeconv.store.strides import runs_per_read

Bytes = npt.NDArray[np.uint8] | memoryview | bytearray

DIRECT_MIN_NBYTES = 256 << 10  # below it the kernel's reading ahead joins small reads better
BOUNCE_NBYTES = 2 << 20  # about the second-level cache, between the read and the copy
NEAR_NBYTES = 64 << 10  # a gap that is read, too, rather than asking twice

_BOUNCES = BufferPool(max_bytes=8 * BOUNCE_NBYTES)

# O_NONBLOCK: opening a FIFO that has no writer returns instead of waiting for one.
_OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_OPEN_PROBLEMS: Mapping[int, tuple[str, str]] = {
    errno.ENOENT: (
        "the file is missing, or a symbolic link to nothing",
        "download it again: a link into a hub cache breaks when its blob is removed",
    ),
    errno.EACCES: ("the file may not be read", "give this user the right to read it"),
    errno.EPERM: ("the file may not be read", "give this user the right to read it"),
    errno.ELOOP: ("the file is a symbolic link that leads back to itself", "download it again"),
}


def open_regular(path: Path, name: str, error: type[MoeconvError] = BadSource) -> int:
    """Return a descriptor for reading the regular file `path`, or raise `error` about `name`.

    Anything but a regular file is refused before it is opened: a FIFO would wait for ever.
    """
    try:
        _require_regular(path.stat(), name, error)
        descriptor = os.open(path, _OPEN_FLAGS)
    except OSError as problem:
        unknown = (f"the file cannot be opened: {problem.strerror}", "")
        what, hint = _OPEN_PROBLEMS.get(problem.errno or 0, unknown)
        raise error(what, where=name, hint=hint) from problem
    try:
        _require_regular(os.fstat(descriptor), name, error)
    except MoeconvError:
        os.close(descriptor)
        raise
    return descriptor


def _require_regular(found: os.stat_result, name: str, error: type[MoeconvError]) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise error("a directory stands where a file should be", where=name)
    if not stat.S_ISREG(found.st_mode):
        raise error("not a regular file (a pipe, socket or device)", where=name)


def read_range(descriptor: int, name: str, offset: int, buffer: Bytes) -> int:
    """Fill `buffer` from `offset` on; return the bytes read, fewer only at the end of the file."""
    view = _flat(buffer)
    try:
        return read_views(descriptor, [view], offset, view.nbytes)
    except OSError as problem:
        raise _failed(problem, name, offset, offset + view.nbytes) from problem


def _failed(problem: OSError, name: str, start: int, stop: int) -> IOFailed:
    return IOFailed(
        f"reading failed: {problem.strerror}",
        where=f"{name}, bytes [{start}, {stop})",
        hint="check the disk or the network mount, then run the same command again",
    )


def read_views(
    descriptor: int, views: Sequence[memoryview], offset: int, wanted: int, done: int = 0
) -> int:
    """Fill the views with what follows `offset`; return the bytes read, OSError as it comes.

    Not all of them once `wanted` bytes are there, or the file has ended. The first `done` are
    there already.
    """
    while done < wanted:
        count = os.preadv(descriptor, list(_left(views, done)), offset + done)
        if count == 0:
            break
        done += count
    return done


def _read_pages(descriptor: int, ranges: direct.Ranges, bounces: BufferPool) -> int:
    """Fill ranges from whole pages; return the bytes from the first offset on that are there."""
    start, stop = direct.extent(ranges)
    runs = direct.pages_around(ranges)
    before = start - runs[0].start
    with bounces.take(direct.aside_nbytes(runs)) as aside:
        views = direct.views_of(runs, aside.array)
        done = read_views(descriptor, views, runs[0].start, before + stop - start)
        for given, taken in direct.copies_from(runs, aside.array, ranges):
            np.copyto(given, taken)
    return min(done - before, stop - start)


def _left(views: Sequence[memoryview], done: int) -> Iterator[memoryview]:
    """Yield the views without their first `done` bytes."""
    for view in views:
        if done < view.nbytes:
            yield view[done:]
        done = max(done - view.nbytes, 0)


def _flat(buffer: Bytes) -> memoryview:
    """Return the bytes of a contiguous buffer, in one dimension."""
    view = buffer.data if isinstance(buffer, np.ndarray) else memoryview(buffer)
    return view.cast("B") if view.nbytes else memoryview(b"")  # cast refuses an extent of zero


class _Opened:
    """The descriptors of a file; `past_cache`: -1 where there is none, None before it is needed."""

    __slots__ = ("cached", "past_cache", "path", "refused")

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.cached = open_regular(path, name)
        self.past_cache: int | None = None
        self.refused = False  # once it is, others may still read past the cache: it stays open
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.cached, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def close(self) -> None:
        """Close both."""
        for descriptor in (self.cached, self.past_cache):
            if descriptor is not None and descriptor >= 0:
                os.close(descriptor)

    def open_past_cache(self) -> int:
        """Return the second descriptor, opened if this is its first use; -1 where none serves."""
        if self.past_cache is None:
            self.past_cache = -1
            with contextlib.suppress(OSError):  # the first one serves
                descriptor = direct.open_direct(self.path, _OPEN_FLAGS)
                if descriptor >= 0 and not os.path.sameopenfile(descriptor, self.cached):
                    os.close(descriptor)
                    descriptor = -1
                self.past_cache = descriptor
        return -1 if self.refused else self.past_cache


class Reader:
    """Open files of one source, by name; any number of threads may read, one closes at the end.

    What is not read in place takes memory from `bounces`.
    """

    def __init__(self, files: Mapping[str, Path], bounces: BufferPool = _BOUNCES) -> None:
        self._files = dict(files)
        self._bounces = bounces
        self._opened: dict[str, _Opened] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._nbytes_read = 0

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def nbytes_read(self) -> int:
        """Bytes taken from the files so far, gaps between strided runs included."""
        return self._nbytes_read

    def close(self) -> None:
        """Close every file; no other thread may still be reading."""
        with self._lock:
            self._closed = True
            while self._opened:
                self._opened.popitem()[1].close()

    def read_into(self, file: str, offset: int, buffer: Bytes) -> None:
        """Fill the contiguous `buffer` with the bytes of `file` from `offset` on."""
        self.read_ranges(file, [(offset, buffer)])

    def read_ranges(self, file: str, ranges: Sequence[tuple[int, Bytes]]) -> None:
        """Fill each contiguous buffer from its offset on; what lies near in one request.

        Past the page cache a buffer whose address is congruent to its offset takes no copy.
        """
        views = [(offset, _flat(buffer)) for offset, buffer in ranges]
        arrays = [(at, np.frombuffer(view, np.uint8)) for at, view in views if view.nbytes]
        opened = self._open(file)
        for group in direct.near(sorted(arrays, key=lambda one: one[0]), NEAR_NBYTES):
            self._read_group(opened, file, group)

    def read_strided(
        self, file: str, offset: int, stride: int, run: int, count: int, buffer: Bytes
    ) -> None:
        """Fill `buffer` ([count * run] bytes) with `count` runs of `run` bytes, packed.

        Run i starts `stride` bytes after run i - 1. Short gaps are read and thrown away, in
        chunks of some MiB; long ones are jumped over (strides.py).
        """
        packed = np.frombuffer(_flat(buffer), dtype=np.uint8)
        if run < 0 or count < 0 or stride < run or packed.size != run * count:
            raise ValueError(f"{count} runs of {run} every {stride} into {packed.size} bytes")
        if packed.size == 0:
            return
        if stride == run:
            self.read_into(file, offset, packed)
            return
        per_read = runs_per_read(stride, run, count)
        matrix = packed.reshape(count, run)
        for first in range(0, count, per_read):
            self._read_runs(file, offset + first * stride, stride, matrix[first : first + per_read])

    def _read_group(self, opened: _Opened, file: str, group: direct.Ranges) -> None:
        """Fill neighbouring ranges, the gaps between them thrown away."""
        start, stop = direct.extent(group)
        try:
            there = self._read_past_cache(opened, group)
            if there is None:
                there = self._read_through_cache(opened, group)
        except OSError as problem:
            raise _failed(problem, file, start, stop) from problem
        with self._lock:
            self._nbytes_read += there
        for offset, view in group:
            if offset + view.size > start + there:
                raise BadSource(
                    f"the file changed while reading: it ends at byte {start + there}",
                    where=f"{file}, bytes [{offset}, {offset + view.size})",
                    hint="leave the source alone while converting; download the file again",
                )

    def _read_past_cache(self, opened: _Opened, group: direct.Ranges) -> int | None:
        """Return the bytes read from the first offset on; None where the page cache should serve.

        It should where the group is small or mostly in it, or where nothing tells.
        """
        start, stop = direct.extent(group)
        if stop - start < DIRECT_MIN_NBYTES:
            return None
        if direct.is_cached(opened.cached, start, stop - start) is not False:
            return None
        with self._lock:
            descriptor = opened.open_past_cache()
        if descriptor < 0:
            return self._read_and_drop(opened, group)
        there = 0
        try:
            for part in direct.bounced(group, BOUNCE_NBYTES):
                there = part[0][0] - start + _read_pages(descriptor, part, self._bounces)
                if there < direct.extent(part)[1] - start:
                    break
        except OSError as problem:
            if problem.errno not in system.UNSUPPORTED:
                raise
            opened.refused = True  # for good
            return self._read_and_drop(opened, group)
        return max(there, 0)

    def _read_and_drop(self, opened: _Opened, group: direct.Ranges) -> int:
        """Return the bytes read through the page cache, which then forgets them."""
        there = self._read_through_cache(opened, group)
        start, stop = direct.extent(group)
        with contextlib.suppress(OSError):  # advice only
            system.drop_pages(opened.cached, start, stop - start)
        return there

    def _read_through_cache(self, opened: _Opened, group: direct.Ranges) -> int:
        """Return the bytes read from the first offset on."""
        start, stop = direct.extent(group)
        stops = [start, *(offset + view.size for offset, view in group)]
        gaps = [offset - at for (offset, _), at in zip(group, stops, strict=False)]
        if not any(gaps):
            return read_views(opened.cached, [view.data for _, view in group], start, stop - start)
        with self._bounces.take(max(gaps)) as thrown_away:  # each over the one before
            views: list[memoryview] = []
            for gap, (_, view) in zip(gaps, group, strict=True):
                views += [thrown_away.array[:gap].data, view.data]
            return read_views(opened.cached, views, start, stop - start)

    def _read_runs(
        self, file: str, offset: int, stride: int, runs: np.ndarray[Any, np.dtype[np.uint8]]
    ) -> None:
        """Fill runs [n, run] with one read that spans them all."""
        count, run = runs.shape
        if count == 1:
            self.read_into(file, offset, runs[0])
            return
        with self._bounces.take((count - 1) * stride + run, offset) as span:
            self.read_into(file, offset, span.array)
            # The last row ends with the span, so no row reaches beyond it.
            runs[:] = np.lib.stride_tricks.as_strided(span.array, (count, run), (stride, 1))

    def _open(self, file: str) -> _Opened:
        found = self._opened.get(file)
        if found is not None:
            return found
        with self._lock:
            if self._closed:
                raise ValueError("the reader is closed")
            if file not in self._opened:
                self._opened[file] = _Opened(self._files[file], file)
            return self._opened[file]
