"""How fast a disk writes and reads: as the converter does, past the page cache where it can."""

from __future__ import annotations

import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count, cycle, islice
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from moeconv.errors import IOFailed, Refused
from moeconv.measure.figures import Rates
from moeconv.store import system
from moeconv.store.buffers import PAGE_NBYTES, Bytes, aligned
from moeconv.store.reader import open_regular
from moeconv.store.space import check_space
from moeconv.store.writer import OutputFile

BLOCK_NBYTES = 8 << 20
BESIDE_NBYTES = 64 << 20  # what else a measurement keeps on the disk
PREFIX = ".moeconv-bench-"


class Effort(NamedTuple):
    """What one run moves at most, and how long it may take; then the medians of `repeats`."""

    nbytes: int = 512 << 20
    seconds: float = 2.0
    repeats: int = 3
    threads: int = 2


class File(NamedTuple):
    """A file that can be read: open descriptor, name in messages, bytes."""

    descriptor: int
    name: str
    nbytes: int


def nearest_directory(path: Path) -> Path:
    """Return `path` if it is a directory, else the nearest one above it."""
    existing = path.absolute()
    while not existing.is_dir() and existing != existing.parent:
        existing = existing.parent
    return existing


def disk_id(path: Path) -> str:
    """Return what names the file system of `path`, which need not exist yet."""
    existing = path if path.exists() else nearest_directory(path)
    return f"{existing.stat().st_dev:x}-{os.statvfs(existing).f_fsid:x}"


@contextmanager
def workplace(directory: Path, effort: Effort) -> Iterator[Path]:
    """Yield a new directory below `directory` that is removed with all it holds.

    Refused where it cannot be made, or where the disk has too little room.
    """
    check_space(directory, effort.nbytes + BESIDE_NBYTES)
    place = directory / f"{PREFIX}{secrets.token_hex(8)}"
    try:  # before it is made: a signal may come at any moment
        try:
            place.mkdir(mode=0o700)
        except OSError as error:
            raise Refused(
                f"cannot write here: {error.strerror}",
                where=str(directory),
                hint="--dst names a directory on the disk that outputs will go to",
            ) from error
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def measure_writes(directory: Path, effort: Effort) -> tuple[Rates, bool]:
    """Return the GB/s of durable writes to a file in `directory`, and whether they were direct."""
    data = _noise()
    runs: list[list[float]] = []
    direct = True
    for _ in range(effort.repeats):
        found = [_write(directory, data, threads, effort) for threads in (1, effort.threads)]
        runs.append([rate for rate, _ in found])
        direct = direct and all(one for _, one in found)
    return Rates("write", *_medians(runs)), direct


def _write(directory: Path, data: Bytes, threads: int, effort: Effort) -> tuple[float, bool]:
    """Return GB/s and whether the page cache was passed by. The file has no name while it lasts."""
    start = time.perf_counter()
    try:
        with OutputFile(directory / "written", effort.nbytes) as output:
            output.partial.unlink()

            def write(block: int) -> int:
                nbytes = min(BLOCK_NBYTES, effort.nbytes - block * BLOCK_NBYTES)
                output.write(block * BLOCK_NBYTES, data[:nbytes])
                return nbytes

            nbytes = _in_threads(write, -(-effort.nbytes // BLOCK_NBYTES), threads, effort)
            output.sync()
            direct = output.direct
    except IOFailed as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in system.FULL:
            hint = f"free {effort.nbytes:,} bytes, or name another directory with --dst"
            raise Refused(error.what, where=str(directory), hint=hint) from error
        raise
    return nbytes / (time.perf_counter() - start) / 1e9, direct


def made_file(directory: Path, effort: Effort) -> Path:
    """Return a durable file as large as one run reads."""
    data, path = _noise(), directory / "read"
    with OutputFile(path, effort.nbytes) as output:
        for at in range(0, effort.nbytes, BLOCK_NBYTES):
            output.write(at, data[: effort.nbytes - at])
        output.commit()
    return path


def measure_reads(paths: Sequence[Path], effort: Effort) -> tuple[Rates, bool]:
    """Return the GB/s of reading from these files, the largest first, not from the page cache.

    And whether that passed it by; else it is asked to forget those pages first. A run reads half
    of what one writes.
    """
    files, direct = _open_all(paths, effort)
    try:
        # A run goes on where the last one ended: what was read before may be in somebody's cache.
        blocks = cycle(
            (file, at)
            for file in files
            for at in range(0, max(file.nbytes - BLOCK_NBYTES, 0) + 1, BLOCK_NBYTES)
        )
        each = -(-effort.nbytes // 2 // BLOCK_NBYTES)
        if not direct:
            for file in files:
                system.drop_pages(file.descriptor, 0, 0)
        runs = [
            [_read(list(islice(blocks, each)), threads, effort) for threads in (1, effort.threads)]
            for _ in range(effort.repeats)
        ]
    finally:
        for file in files:
            os.close(file.descriptor)
    return Rates("read", *_medians(runs)), direct


def _open_all(paths: Sequence[Path], effort: Effort) -> tuple[list[File], bool]:
    """Return the largest files, as many as a run reads, and whether they pass the page cache by."""
    chosen: list[tuple[Path, int]] = []
    for path in sorted(paths, key=lambda one: one.stat().st_size, reverse=True):
        if sum(nbytes for _, nbytes in chosen) < effort.nbytes * effort.repeats:
            chosen.append((path, path.stat().st_size))
    direct: list[File] = []
    try:
        for path, nbytes in chosen if system.DIRECT_FLAG else ():
            flags = os.O_RDONLY | os.O_CLOEXEC | system.DIRECT_FLAG
            direct.append(File(system.open_file(path, flags), str(path), nbytes))
            os.preadv(direct[-1].descriptor, [aligned(PAGE_NBYTES).data], 0)
        if direct:
            return direct, True
    except OSError:  # some file systems open directly and then refuse
        for file in direct:
            os.close(file.descriptor)
    return [
        File(open_regular(path, str(path)), str(path), nbytes) for path, nbytes in chosen
    ], False


def cached_share(paths: Iterable[Path]) -> float:
    """Return which share of these files the page cache holds; 0 where nothing tells."""
    there = total = 0
    for path in paths:
        descriptor = open_regular(path, str(path))
        try:
            nbytes = os.fstat(descriptor).st_size
            total += nbytes
            there += min(system.cached_nbytes(descriptor, 0, nbytes), nbytes) if nbytes else 0
        except OSError:
            return 0.0
        finally:
            os.close(descriptor)
    return there / total if total else 0.0


def _read(blocks: Sequence[tuple[File, int]], threads: int, effort: Effort) -> float:
    """Return the GB/s of reading blocks."""
    own = threading.local()

    def read(block: int) -> int:
        if not hasattr(own, "buffer"):
            own.buffer = aligned(BLOCK_NBYTES)
        file, at = blocks[block]
        try:
            return os.preadv(file.descriptor, [own.buffer.data], at)
        except OSError as error:
            raise system.failed("read", error, f"{file.name}, byte {at}") from error

    start = time.perf_counter()
    nbytes = _in_threads(read, len(blocks), threads, effort)
    return nbytes / (time.perf_counter() - start) / 1e9


def _in_threads(work: Callable[[int], int], blocks: int, threads: int, effort: Effort) -> int:
    """Return the bytes that `work` moved for blocks 0, 1, ...; ends early when the time is over."""
    numbers = count()
    over = threading.Event()
    deadline = time.perf_counter() + effort.seconds

    def run(_: int) -> int:
        nbytes = 0
        while (block := next(numbers)) < blocks and not over.is_set():
            nbytes += work(block)
            if time.perf_counter() >= deadline:
                break
        return nbytes

    with ThreadPoolExecutor(threads) as pool:
        try:
            return sum(pool.map(run, range(threads)))
        finally:
            over.set()  # Ctrl-C: no thread begins another block


def _medians(runs: Sequence[Sequence[float]]) -> list[float]:
    return [median(found) for found in zip(*runs, strict=True)]


def _noise() -> Bytes:
    """Return a block that no file system compresses or finds twice in itself."""
    data = aligned(BLOCK_NBYTES)
    data[:] = np.frombuffer(os.urandom(BLOCK_NBYTES), np.uint8)
    return data
