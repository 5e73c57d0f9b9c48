"""Output files: laid out first, written at offsets by many threads, renamed when complete.

Whole pages go past the page cache (O_DIRECT), the partial pages at the ends of a range through
it. Two tasks that share a page therefore both write their part of it through the cache, where
the kernel keeps the other's bytes, and no page is ever written both ways by different tasks.
"""

from __future__ import annotations

import contextlib
import errno
import os
from io import RawIOBase
from pathlib import Path
from types import TracebackType

import numpy as np

from moeconv import errors
from moeconv.store import system
from moeconv.store.buffers import PAGE_NBYTES, BufferPool, Bytes, address
from moeconv.store.cached import CachedWriter
from moeconv.store.direct import open_direct

PARTIAL_SUFFIX = ".partial"
DIRECT_MIN_NBYTES = 64 << 10  # below it the cache merges small writes better than the disk
BOUNCE_NBYTES = 2 << 20  # about the second-level cache, between the copy and the write
COPY_NBYTES = 4 << 20

_BOUNCES = BufferPool(max_bytes=8 * BOUNCE_NBYTES)
_PIECES = BufferPool(max_bytes=2 * COPY_NBYTES)


def partial_path(final: Path) -> Path:
    """Return the name that an output file has until it is complete."""
    return final.with_name(final.name + PARTIAL_SUFFIX)


class OutputFile:
    """`NAME.partial` of exactly `nbytes`, its space reserved; `commit` makes it NAME.

    With `resume` the bytes that an earlier run wrote stay, and `resumed` tells whether there are
    any; else the file starts anew, as zeros. Not for a file that is complete already: see whether
    `final` exists first.
    `write` is for any number of threads, provided that no byte belongs to two of them; it takes
    from `bounces` what memory it needs.
    """

    def __init__(
        self,
        final: Path,
        nbytes: int,
        *,
        direct: bool = True,
        resume: bool = False,
        bounces: BufferPool = _BOUNCES,
    ) -> None:
        self._bounces = bounces
        self.final = final
        self.partial = partial_path(final)
        self.nbytes = nbytes
        self.resumed = False  # whether the bytes of an earlier run are here
        self._cached_fd = -1
        self._direct_fd = -1
        try:
            self._open(resume)
            self._reserve()
            system.sync_directory(self.partial.parent)
            if direct and nbytes >= DIRECT_MIN_NBYTES:
                self._direct_fd = open_direct(self.partial, os.O_WRONLY)
        except OSError as error:
            wrapped = self._failed("lay out the file", error, 0, nbytes)
            self.close()
            raise wrapped from error
        self._direct = self._direct_fd >= 0
        self._cached = CachedWriter(self._cached_fd)

    @property
    def direct(self) -> bool:
        """Return whether whole pages still go past the page cache."""
        return self._direct

    def write(self, offset: int, data: Bytes | memoryview) -> None:
        """Write contiguous bytes at `offset`; any address, any offset, fastest when congruent."""
        view = _flat(data)
        end = offset + view.size
        if offset < 0 or end > self.nbytes:
            raise ValueError(f"bytes {offset}..{end} are outside {self.final} ({self.nbytes})")
        first = -(-offset // PAGE_NBYTES) * PAGE_NBYTES
        last = end // PAGE_NBYTES * PAGE_NBYTES
        try:
            if not self._direct or last - first < DIRECT_MIN_NBYTES:
                self._cached.write(offset, view)
                return
            self._cached.write(offset, view[: first - offset])
            self._write_pages(first, view[first - offset : last - offset])
            self._cached.write(last, view[last - offset :])
        except OSError as error:
            raise self._failed("write", error, offset, view.size) from error

    def sync(self) -> None:
        """Make everything written so far durable, and let the page cache forget it."""
        try:
            for fd in self._fds():  # both: some network file systems keep state per descriptor
                system.sync_data(fd)
        except OSError as error:
            raise self._failed("make durable", error, 0, self.nbytes) from error
        with contextlib.suppress(OSError):  # advice only
            system.drop_pages(self._cached_fd, 0, 0)

    def commit(self, final: Path | None = None) -> None:
        """Make the file durable, close it and give it its final name."""
        target = self.final if final is None else final
        try:
            if os.fstat(self._cached_fd).st_size != self.nbytes:
                raise OSError(errno.EIO, "its length changed while it was written")
            for fd in self._fds():
                system.sync_file(fd)
            self.close()
            system.rename(self.partial, target)
            for directory in {target.parent, self.partial.parent}:
                system.sync_directory(directory)
        except OSError as error:
            raise self._failed("complete", error, 0, self.nbytes) from error

    def close(self) -> None:
        """Close without completing; what was written stays in the partial file."""
        fds = self._fds()
        self._cached_fd = self._direct_fd = -1
        for fd in fds:
            os.close(fd)

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _fds(self) -> list[int]:
        return [fd for fd in (self._cached_fd, self._direct_fd) if fd >= 0]

    def _open(self, resume: bool) -> None:
        system.make_directories(self.partial.parent)
        with contextlib.suppress(FileNotFoundError):
            self.resumed = resume and self.partial.stat().st_size == self.nbytes
        flags = os.O_RDWR | os.O_CREAT | (0 if resume else os.O_TRUNC)
        self._cached_fd = system.open_file(self.partial, flags, 0o666)  # less the umask

    def _reserve(self) -> None:
        if self.nbytes:
            try:
                system.fallocate(self._cached_fd, self.nbytes)
            except OSError as error:
                if error.errno not in system.UNSUPPORTED:
                    raise
        if os.fstat(self._cached_fd).st_size != self.nbytes:
            system.truncate(self._cached_fd, self.nbytes)

    def _write_pages(self, offset: int, view: Bytes) -> None:
        """Write whole pages past the cache, through a bounce buffer where addresses disagree."""
        if address(view) % PAGE_NBYTES == 0:
            self._write_direct(offset, view)
            return
        with self._bounces.take(min(BOUNCE_NBYTES, view.size)) as bounce:
            for start in range(0, view.size, BOUNCE_NBYTES):
                piece = view[start : start + BOUNCE_NBYTES]
                np.copyto(bounce.array[: piece.size], piece)
                self._write_direct(offset + start, bounce.array[: piece.size])

    def _write_direct(self, offset: int, view: Bytes) -> None:
        done = 0
        while self._direct and done < view.size:
            try:
                written = system.pwrite(self._direct_fd, view[done:].data, offset + done)
            except InterruptedError:
                continue
            except OSError as error:
                if error.errno not in system.UNSUPPORTED:
                    raise
                self._direct = False  # for good: the file system or device wants something else
                break
            whole = written // PAGE_NBYTES * PAGE_NBYTES
            if whole == 0:
                break  # less than a page: the cache takes the rest, or says why not
            done += whole
        self._cached.write(offset + done, view[done:])

    def _failed(self, action: str, error: OSError, offset: int, nbytes: int) -> errors.IOFailed:
        where = f"{self.partial}, bytes {offset}..{offset + nbytes}"
        hint = ""
        if error.errno in system.FULL:
            missing = self._missing_nbytes(nbytes)
            hint = f"free at least {missing:,} bytes; {system.CONTINUES}"
        return system.failed(action, error, where, hint)

    def _missing_nbytes(self, nbytes: int) -> int:
        """Return how many bytes the disk lacks for what is left of this file.

        `nbytes` where that cannot be known, as under a quota.
        """
        try:
            stat = os.fstat(self._cached_fd)
            disk = os.fstatvfs(self._cached_fd)
        except OSError:
            return nbytes
        unreserved = max(self.nbytes - stat.st_blocks * 512, 0)
        missing = unreserved - disk.f_bavail * disk.f_frsize
        return missing if missing > 0 else nbytes


def _flat(data: Bytes | memoryview) -> Bytes:
    if isinstance(data, np.ndarray):
        return np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    return np.frombuffer(data, np.uint8) if data.nbytes else np.empty(0, np.uint8)


def write_small_file(path: Path, data: bytes) -> None:
    """Write a whole file durably; `path` is its old self or its new one, never a part."""
    with OutputFile(path, len(data), direct=False) as output:
        output.write(0, memoryview(data))
        output.commit()


def copy_file(src: Path, dst: Path) -> None:
    """Copy the bytes of a file durably in bounded memory; `dst` is complete or absent."""
    try:
        source = src.open("rb", buffering=0)
    except OSError as error:
        raise system.failed("read", error, str(src)) from error
    with source, _PIECES.take(COPY_NBYTES) as piece:
        nbytes = os.fstat(source.fileno()).st_size
        with OutputFile(dst, nbytes) as output:
            done = 0
            while done < nbytes:
                got = _read(source, piece.array[: nbytes - done], f"{src}, byte {done}")
                output.write(done, got)
                done += got.size
            output.commit()


def _read(source: RawIOBase, into: Bytes, where: str) -> Bytes:
    """Fill `into` as far as one piece goes and return what was read, a whole number of pages."""
    filled = 0
    while filled < into.size:
        try:
            got = source.readinto(into[filled:].data)
        except OSError as error:
            raise system.failed("read", error, where) from error
        if not got:
            raise errors.IOFailed("the file became shorter while it was read", where=where)
        filled += got
    return into
