"""Reading bytes at rest: ranges and regular runs of files, by many threads at once."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from moeconv.errors import BadSource, IOFailed, MoeconvError

Bytes = npt.NDArray[np.uint8] | memoryview | bytearray

CHUNK_NBYTES = 4 << 20
SMALL_SPAN_NBYTES = 1 << 20
MAX_WASTE = 4  # read the gaps too while they are at most this many times what is wanted

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
    done = 0
    while done < len(view):
        try:
            count = os.preadv(descriptor, [view[done:]], offset + done)
        except OSError as problem:
            raise IOFailed(
                f"reading failed: {problem.strerror}",
                where=f"{name}, bytes [{offset + done}, {offset + len(view)})",
                hint="check the disk or the network mount, then run the same command again",
            ) from problem
        if count == 0:
            break
        done += count
    return done


def _flat(buffer: Bytes) -> memoryview:
    """Return the bytes of a contiguous buffer, in one dimension."""
    view = buffer.data if isinstance(buffer, np.ndarray) else memoryview(buffer)
    return view.cast("B") if view.nbytes else memoryview(b"")  # cast refuses an extent of zero


class Reader:
    """Open files of one source, by name; any number of threads may read, one closes at the end."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = dict(files)
        self._descriptors: dict[str, int] = {}
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
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def read_into(self, file: str, offset: int, buffer: Bytes) -> None:
        """Fill the contiguous `buffer` with the bytes of `file` from `offset` on."""
        count = read_range(self._descriptor(file), file, offset, buffer)
        with self._lock:
            self._nbytes_read += count
        wanted = _flat(buffer).nbytes
        if count != wanted:
            raise BadSource(
                f"the file changed while reading: it ends at byte {offset + count}",
                where=f"{file}, bytes [{offset}, {offset + wanted})",
                hint="leave the source alone while converting; download the file again",
            )

    def read_strided(
        self, file: str, offset: int, stride: int, run: int, count: int, buffer: Bytes
    ) -> None:
        """Fill `buffer` ([count * run] bytes) with `count` runs of `run` bytes, packed.

        Run i starts `stride` bytes after run i - 1. Short gaps are read and thrown away, in
        chunks of at most CHUNK_NBYTES; long ones are jumped over.
        """
        packed = np.frombuffer(_flat(buffer), dtype=np.uint8)
        if run < 0 or count < 0 or stride < run or packed.size != run * count:
            raise ValueError(f"{count} runs of {run} every {stride} into {packed.size} bytes")
        if packed.size == 0:
            return
        if stride == run:
            self.read_into(file, offset, packed)
            return
        per_read = 1
        if stride <= MAX_WASTE * run or stride * count <= SMALL_SPAN_NBYTES:
            per_read = max(1, CHUNK_NBYTES // stride)
        matrix = packed.reshape(count, run)
        for first in range(0, count, per_read):
            self._read_runs(file, offset + first * stride, stride, matrix[first : first + per_read])

    def drop(self, file: str, offset: int, nbytes: int) -> None:
        """Let the page cache forget a range that will not be read again."""
        if nbytes > 0 and hasattr(os, "posix_fadvise"):  # a length of 0 means: to the end
            os.posix_fadvise(self._descriptor(file), offset, nbytes, os.POSIX_FADV_DONTNEED)

    def _read_runs(
        self, file: str, offset: int, stride: int, runs: np.ndarray[Any, np.dtype[np.uint8]]
    ) -> None:
        """Fill runs [n, run] with one read that spans them all."""
        count, run = runs.shape
        if count == 1:
            self.read_into(file, offset, runs[0])
            return
        span = np.empty((count - 1) * stride + run, dtype=np.uint8)
        self.read_into(file, offset, span)
        # The last row ends with the span, so no row reaches beyond it.
        runs[:] = np.lib.stride_tricks.as_strided(span, (count, run), (stride, 1))

    def _descriptor(self, file: str) -> int:
        found = self._descriptors.get(file)
        if found is not None:
            return found
        with self._lock:
            if self._closed:
                raise ValueError("the reader is closed")
            if file not in self._descriptors:
                descriptor = open_regular(self._files[file], file)
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
                self._descriptors[file] = descriptor
            return self._descriptors[file]
