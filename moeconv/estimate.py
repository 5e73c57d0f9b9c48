"""Workload x figures -> how long a conversion takes, and what bounds it."""

from __future__ import annotations

from typing import NamedTuple

from moeconv.measure.figures import (
    COPY,
    DIGEST,
    TRANSPOSE,
    Disk,
    Figures,
    Rates,
    roof_key,
)
from moeconv.workload import Workload

READ, WRITE, DECODE, MEMORY = "disk read", "disk write", "decode", "memory"
START = "start"
_COPIED_BITS = 16  # of the roofline that reads as much as it writes


class Bound(NamedTuple):
    """What alone would take `seconds` for `nbytes`."""

    name: str
    nbytes: int
    seconds: float

    @property
    def gb_per_second(self) -> float:
        return self.nbytes / self.seconds / 1e9 if self.seconds else 0.0


class Estimate(NamedTuple):
    """Seconds of wall time, of which START is the first of the bounds; `limit`: the longest.

    `lacking`: kinds of work that are in it as nothing, because they were never measured.
    """

    seconds: float
    limit: Bound
    bounds: tuple[Bound, ...]
    lacking: tuple[str, ...]


class Place(NamedTuple):
    """The disks that a conversion reads and writes, and how many tasks are in flight."""

    source: Disk
    output: Disk
    jobs: int


def estimate(work: Workload, figures: Figures, place: Place) -> Estimate | None:
    """Return how long the work takes; None where one of the disks was not measured.

    Reading, decoding and writing overlap, so the slowest decides; with one task in flight nothing
    does, and they add up. The source is taken to be on its disk, not in the page cache.
    """
    read, write = place.source.read, place.output.write
    if read is None or write is None:
        return None
    jobs = place.jobs
    cores = min(jobs, figures.threads)
    decode, lacking = _decode_seconds(work, figures, cores)
    bounds = (
        Bound(START, 0, figures.start_seconds),
        _bound(READ, work.read_nbytes, _rate(read, jobs, place.source.threads)),
        _bound(WRITE, work.written_nbytes, _rate(write, jobs, place.output.threads)),
        Bound(DECODE, work.written_nbytes, decode),
        _memory(work, figures, cores),
    )
    working = bounds[1:4]
    taken = sum(one.seconds for one in working) if jobs == 1 else _longest(bounds[1:]).seconds
    return Estimate(figures.start_seconds + taken, _longest(bounds), bounds, lacking)


def _longest(bounds: tuple[Bound, ...]) -> Bound:
    return max(bounds, key=lambda one: one.seconds)


def _bound(name: str, nbytes: int, gb_per_second: float) -> Bound:
    return Bound(name, nbytes, nbytes / gb_per_second / 1e9)


def _rate(rates: Rates, jobs: int, threads: int) -> float:
    """Return the GB/s of `jobs` threads, measured with 1 and with `threads`."""
    return rates.all if jobs >= threads else min(rates.one * jobs, max(rates.one, rates.all))


def _decode_seconds(work: Workload, figures: Figures, cores: int) -> tuple[float, tuple[str, ...]]:
    """Return what all work but reading and writing takes, and what of it was not measured."""
    seconds = 0.0
    lacking = [*work.slow]
    for key, nbytes in work.work.items():
        rates = figures.rate(key)
        if rates is None:
            lacking.append(key)
        else:
            seconds += nbytes / _rate(rates, cores, figures.threads) / 1e9
    return seconds, tuple(sorted(lacking))


def _memory(work: Workload, figures: Figures, cores: int) -> Bound:
    """Return the time of all bytes that pass between processor, disks and memory, at its speed."""
    rates = figures.rate(roof_key(_COPIED_BITS))
    once = work.read_nbytes + 2 * work.written_nbytes  # decoded, digested, fetched by the disk
    moved = once + sum(
        nbytes * (2 if key in (COPY, TRANSPOSE) else 1)
        for key, nbytes in work.work.items()
        if key != DIGEST
    )
    if rates is None:
        return Bound(MEMORY, moved, 0.0)
    return _bound(MEMORY, moved, 2 * _rate(rates, cores, figures.threads))
