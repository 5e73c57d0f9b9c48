"""Workload x figures -> how long a conversion takes, and what bounds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from moeconv.measure.figures import (
    COPY,
    DIGEST,
    TRANSPOSE,
    Device,
    Disk,
    Figures,
    Rates,
    find_rates,
    roof_key,
)
from moeconv.workload import Workload

READ, WRITE, DECODE, MEMORY = "disk read", "disk write", "decode", "memory"
START, UP, DEVICE, DOWN = "start", "to the device", "device", "from the device"
_COPIED_BITS = 16  # of the roofline that reads as much as it writes


class Bound(NamedTuple):
    """What alone takes `seconds` for `nbytes` with the tasks in flight; `one`: with a single task.

    In either all of it is done: a share of the seconds is a share of the work.
    """

    name: str
    nbytes: int
    seconds: float
    one: float

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
    """The disks that a conversion reads and writes, how many tasks are in flight, and the GPUs.

    `cards` of them, all as `device` is; without any the CPU decodes. `shared`: both disks are one.
    `cached`: the share of the source that the page cache holds, which no disk reads.
    """

    source: Disk
    output: Disk
    jobs: int
    device: Device | None = None
    cards: int = 0
    shared: bool = False
    cached: float = 0.0


def estimate(work: Workload, figures: Figures, place: Place) -> Estimate | None:
    """Return how long the work takes; None where a disk or the GPU was not measured."""
    read, write = place.source.read, place.output.write
    if read is None or write is None or (place.cards and place.device is None):
        return None
    jobs, device = place.jobs, place.device
    seconds = device.start_seconds if device else figures.start_seconds
    start = Bound(START, 0, seconds, seconds)
    copied = round(work.read_nbytes * place.cached)  # from the page cache
    doing = {**work.work, COPY: work.work.get(COPY, 0) + copied}
    decode, lacking = _work((DECODE, work.written_nbytes), doing, figures.rates, jobs)
    there, lacking_there = _device(work, device, place) if device else ((), ())
    lacking = tuple(sorted({*work.slow, *lacking, *lacking_there}))
    disks = (
        _bound((READ, work.read_nbytes - copied), read, jobs),
        _bound((WRITE, work.written_nbytes), write, jobs),
    )
    working = (*(_one_disk(*disks) if place.shared else disks), decode, *there)
    memory = _memory(work, figures, jobs)
    bounds = (start, *disks, decode, *there, memory)
    taken = max(together(working, jobs), memory.seconds)
    return Estimate(start.seconds + taken, max(bounds, key=_seconds), bounds, lacking)


def together(stations: Sequence[Bound], jobs: int) -> float:
    """Return the seconds of `jobs` tasks in flight that go round these stations.

    Mean-value analysis of a closed network (Reiser and Lavenberg 1980): a task that comes to a
    station waits for those it finds there. With one task the seconds add up, with many the
    slowest station decides, and in between those of like length get into each other's way. What
    a task alone takes longer than several their share is time in which it keeps nobody waiting.
    """
    apart = sum(max(one.one - one.seconds, 0.0) for one in stations)
    queues = [0.0] * len(stations)
    through = 0.0
    for number in range(1, jobs + 1):
        stays = [one.seconds * (1 + queue) for one, queue in zip(stations, queues, strict=True)]
        through = number / (apart + sum(stays))
        queues = [through * stay for stay in stays]
    return 1 / through


def _one_disk(read: Bound, write: Bound) -> tuple[Bound]:
    """Return the one station of a disk that is read and written: it does either at a time."""
    return (read._replace(seconds=read.seconds + write.seconds, one=read.one + write.one),)


def _seconds(bound: Bound) -> float:
    return bound.seconds


def _bound(what: tuple[str, int], rates: Rates, jobs: int) -> Bound:
    """Return the bound of (name, nbytes) at these rates."""
    name, nbytes = what
    one = nbytes / rates.one / 1e9
    return Bound(name, nbytes, max(nbytes / rates.all / 1e9, one / jobs), one)


def _work(
    what: tuple[str, int], work: Mapping[str, int], rates: Mapping[str, Rates], jobs: int
) -> tuple[Bound, tuple[str, ...]]:
    """Return the bound of kinds of work done one after another, and which were not measured."""
    seconds = one = 0.0
    lacking = []
    for key, nbytes in work.items():
        rate = find_rates(rates, key)
        if rate is None:
            lacking.append(key)
        else:
            found = _bound((key, nbytes), rate, jobs)
            seconds, one = seconds + found.seconds, one + found.one
    return Bound(*what, seconds, one), tuple(lacking)


def _device(
    work: Workload, device: Device, place: Place
) -> tuple[tuple[Bound, ...], tuple[str, ...]]:
    """Return the bounds of GPUs that share the work, and which kernels were not measured."""
    cards = place.cards
    rates = {key: one._replace(all=one.one * cards) for key, one in device.rates.items()}
    moved = sum(work.device.values())
    kernels, lacking = _work((DEVICE, moved), work.device, rates, place.jobs)
    up = Rates(UP, device.up, device.up * cards)
    down = Rates(DOWN, device.down, device.down * cards)
    bounds = (
        _bound((UP, work.up_nbytes), up, place.jobs),
        kernels,
        _bound((DOWN, work.down_nbytes), down, place.jobs),
    )
    return bounds, lacking


def _memory(work: Workload, figures: Figures, jobs: int) -> Bound:
    """Return the time of all bytes that pass between processor, disks and memory, at its speed."""
    once = work.read_nbytes + 2 * work.written_nbytes  # decoded, digested, fetched by the disk
    once += work.down_nbytes
    moved = once + sum(
        nbytes * (2 if key in (COPY, TRANSPOSE) else 1)
        for key, nbytes in work.work.items()
        if key != DIGEST
    )
    rates = find_rates(figures.rates, roof_key(_COPIED_BITS))
    if rates is None:
        return Bound(MEMORY, moved, 0.0, 0.0)
    return _bound((MEMORY, moved), Rates(MEMORY, 2 * rates.one, 2 * rates.all), jobs)
