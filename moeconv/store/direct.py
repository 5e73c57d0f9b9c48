"""Past the page cache: what a file system says of it, and whole pages around ranges of bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from moeconv.store import system
from moeconv.store.buffers import PAGE_NBYTES, Bytes, address

LEAST_WANTED = 32  # bytes wanted for each that is read and thrown away
Ranges = Sequence[tuple[int, Bytes]]  # (offset in the file, the bytes to fill), in order


def open_direct(path: Path, flags: int) -> int:
    """Return a descriptor that goes past the page cache, or -1 where the file system has none.

    It is asked whether whole pages can; where it does not tell, only trying will.
    """
    if not system.DIRECT_FLAG:
        return -1
    try:
        descriptor = system.open_file(path, flags | os.O_CLOEXEC | system.DIRECT_FLAG)
    except OSError as error:
        if error.errno not in system.UNSUPPORTED:
            raise
        return -1
    units = system.direct_units(descriptor)
    if units is not None and any(unit == 0 or PAGE_NBYTES % unit for unit in units):
        os.close(descriptor)
        return -1
    return descriptor


def is_cached(descriptor: int, offset: int, nbytes: int) -> bool | None:
    """Return whether most of a range is in the page cache; None where nothing tells.

    Where the kernel cannot count pages, the one in the middle is asked for without waiting.
    """
    try:
        return 2 * system.cached_nbytes(descriptor, offset, nbytes) >= nbytes
    except OSError:
        pass
    try:
        return system.read_cached(descriptor, [bytearray(1)], offset + nbytes // 2) > 0
    except BlockingIOError:
        return False
    except OSError:
        return None


def extent(ranges: Ranges) -> tuple[int, int]:
    """Return where ranges in order begin and end."""
    last, view = ranges[-1]
    return ranges[0][0], last + view.size


def near(ranges: Ranges, gap_nbytes: int) -> Iterator[Ranges]:
    """Yield ranges in order as groups that one request reads.

    A gap within a group is at most so long, and a small share of what is wanted around it: many
    small ranges must not read a file many times.
    """
    group: list[tuple[int, Bytes]] = []
    wanted = 0
    for offset, view in ranges:
        gap = offset - extent(group)[1] if group else 0
        if group and not 0 <= gap <= min(gap_nbytes, (wanted + view.size) // LEAST_WANTED):
            yield group
            group, wanted = [], 0
        group.append((offset, view))
        wanted += view.size
    if group:
        yield group


def bounced(ranges: Ranges, most_nbytes: int) -> Iterator[Ranges]:
    """Yield a group whole if it is read in place, else in parts of at most that many pages' bytes.

    Parts begin on pages but for the first of a range.
    """
    if all(_congruent(*one) for one in ranges):
        yield ranges
        return
    for offset, view in ranges:
        at = offset
        while at < offset + view.size:
            start, at = at, at // PAGE_NBYTES * PAGE_NBYTES + most_nbytes
            yield [(start, view[start - offset : at - offset])]


def _congruent(offset: int, view: Bytes) -> bool:
    return (address(view) - offset) % PAGE_NBYTES == 0


class Run(NamedTuple):
    """Whole pages [start, stop) of a file: read in place, or None where only parts are wanted."""

    start: int
    stop: int
    place: Bytes | None


def pages_around(ranges: Ranges) -> list[Run]:
    """Return the runs of pages, one after the other, that hold the ranges and what is between.

    A range is read in place where its address is congruent to its offset.
    """
    runs: list[Run] = []
    at = ranges[0][0] // PAGE_NBYTES * PAGE_NBYTES
    for offset, view in ranges:
        first = -(-offset // PAGE_NBYTES) * PAGE_NBYTES
        last = (offset + view.size) // PAGE_NBYTES * PAGE_NBYTES
        if first < last and _congruent(offset, view):
            if at < first:
                runs.append(Run(at, first, None))
            runs.append(Run(first, last, view[first - offset : last - offset]))
            at = last
    end = ranges[-1][0] + ranges[-1][1].size
    if at < end:
        runs.append(Run(at, -(-end // PAGE_NBYTES) * PAGE_NBYTES, None))
    return runs


def aside_nbytes(runs: Sequence[Run]) -> int:
    """Return the bytes of the pages that are not read in place."""
    return sum(run.stop - run.start for run in runs if run.place is None)


def views_of(runs: Sequence[Run], aside: Bytes) -> list[memoryview]:
    """Return the memory to read the runs into, those that have no place into `aside` in turn."""
    views, used = [], 0
    for run in runs:
        if run.place is not None:
            views.append(run.place.data)
        else:
            views.append(aside[used : used + run.stop - run.start].data)
            used += run.stop - run.start
    return views


def copies_from(runs: Sequence[Run], aside: Bytes, ranges: Ranges) -> Iterator[tuple[Bytes, Bytes]]:
    """Yield (to, from) for the parts of ranges that were read into `aside`."""
    used = 0
    for run in runs:
        if run.place is not None:
            continue
        for offset, view in ranges:
            start, stop = max(offset, run.start), min(offset + view.size, run.stop)
            if start < stop:
                there = used + start - run.start
                yield view[start - offset : stop - offset], aside[there : there + stop - start]
        used += run.stop - run.start
