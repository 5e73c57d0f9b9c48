"""What bounds the kernels: the same in the cache and in memory, on one core and on two, by steps.

Processes, not threads, each on a core of its own: nothing of Python's is shared, so that what two
of them gain over one is what the machine has to give. In the cache a rate is the slope over two
sizes, calls apart.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from statistics import median
from typing import NamedTuple

from bench import kernel_probe as probe
from bench.kernel_probe import Job
from moeconv.kernels.cpu.roofline import roof_bits
from moeconv.measure.cases import Tile, cases

# Of a call of each job, with so many processes at once.
Seconds = Callable[[Sequence[Job], int], list[float]]


class Effort(NamedTuple):
    """How much to run: tiles in the second-level cache, tiles in memory, and for how long."""

    small: tuple[Tile, Tile] = (Tile(32, 2048), Tile(128, 2048))  # 128 and 512 KiB of BF16
    large: Tile = Tile(1024, 2048)
    tiles: int = 16  # of the large ones: 64 MiB of BF16
    seconds: float = 0.05
    repeats: int = 5


class Pace(NamedTuple):
    """GB/s of BF16 of one process, and what two make beside it."""

    one: float
    two: float

    @property
    def gain(self) -> float:
        """What two processes make, times one."""
        return self.two / self.one


class Profile(NamedTuple):
    """A kernel in the cache and in memory; `call`: the seconds of a call but for its values."""

    cached: Pace
    memory: Pace
    call: float


def nbytes_of(tile: Tile) -> int:
    """Return the bytes of BF16 of a tile."""
    return tile.rows * tile.cols * 2


@contextmanager
def clock(effort: Effort) -> Iterator[Seconds]:
    """Yield what measures the median seconds of a call on one or two processes."""
    context = multiprocessing.get_context("spawn")
    given = (context.Barrier(2), context.Value("i", 0))
    with ProcessPoolExecutor(2, context, probe.begin, given) as pool:

        def once(jobs: Sequence[Job], processes: int) -> list[float]:
            asked = [
                pool.submit(probe.seconds_per_call, jobs, effort.seconds, together=processes > 1)
                for _ in range(processes)
            ]
            every = [one.result() for one in asked]
            return [sum(of_job) / processes for of_job in zip(*every, strict=True)]

        def middle(jobs: Sequence[Job], processes: int) -> list[float]:
            runs = [once(jobs, processes) for _ in range(effort.repeats)]
            return [median(of_job) for of_job in zip(*runs, strict=True)]

        yield middle


def profile(seconds: Seconds, title: str, effort: Effort) -> Profile:
    """Return the profile of what has this title."""
    cached, memory, call = [], [], 0.0
    small = [Job(title, tile, 1) for tile in effort.small]
    large = Job(title, effort.large, effort.tiles)
    for processes in (1, 2):
        low, high = seconds(small, processes)
        sizes = [nbytes_of(tile) for tile in effort.small]
        slope = max(high - low, high / 100) / (sizes[1] - sizes[0])
        cached.append(processes / slope / 1e9)
        if processes == 1:
            call = max(low - slope * sizes[0], 0.0)
        (each,) = seconds([large], processes)
        memory.append(processes * nbytes_of(effort.large) / each / 1e9)
    return Profile(Pace(*cached), Pace(*memory), call)


def roofs(titles: Sequence[str], tile: Tile) -> dict[str, str]:
    """Return the title of the roofline of every decoder among the titles."""
    return {
        case.title: probe.roof_title(roof_bits(case.bits))
        for case in cases(tile)
        if case.title in titles
    }


STEPPED = (probe.LOADS, probe.STORES, probe.WORDS, probe.NO_ZEROS, probe.SCALES)


class Profiles(NamedTuple):
    """Profiles by title, rooflines included; steps by title, in memory; who has which roofline."""

    of: Mapping[str, Profile]
    steps: Mapping[str, Pace]
    roof_of: Mapping[str, str]
    effort: Effort


def run(titles: Sequence[str], effort: Effort | None = None) -> Profiles:
    """Return the profiles of these kernels."""
    effort = effort or Effort()
    roof_of = roofs(titles, effort.small[0])
    with clock(effort) as seconds:
        found = {
            title: profile(seconds, title, effort)
            for title in [*titles, *sorted(set(roof_of.values()))]
        }
        steps = {}
        for title in STEPPED:
            jobs = [Job(title, effort.large, effort.tiles)]
            one, two = (
                count * nbytes_of(effort.large) / seconds(jobs, count)[0] / 1e9 for count in (1, 2)
            )
            steps[title] = Pace(one, two)
    return Profiles(found, steps, roof_of, effort)


def table(found: Profiles) -> list[str]:
    """Return the Markdown rows."""
    lines = [
        "| | in the cache | two processes | in memory | two processes | of its time, computing "
        "| moving | calling | a call, µs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for title, one in found.of.items():
        shares = ["", "", ""]
        if title not in found.roof_of.values():
            told = share_of_time(found, title)
            shares = [f"{share:.0%}" if share else "" for share in told]
        lines.append(
            f"| {title} | {one.cached.one:.1f} | {one.cached.gain:.2f} | {one.memory.one:.1f} "
            f"| {one.memory.gain:.2f} | {' | '.join(shares)} | {one.call * 1e6:.0f} |"
        )
    return lines


def share_of_time(found: Profiles, title: str) -> tuple[float, float, float]:
    """Return which shares of its time in memory a kernel would take for each alone.

    Its arithmetic (its time in the cache), its bytes (its roofline's; 0: it has none), its calls.
    """
    one = found.of[title]
    moving = 0.0
    if title in found.roof_of:
        moving = one.memory.one / found.of[found.roof_of[title]].memory.one
    calling = one.call / (nbytes_of(found.effort.large) / one.memory.one / 1e9)
    return one.memory.one / one.cached.one, moving, calling


def steps(found: Profiles) -> list[str]:
    """Return the Markdown rows of what parts of two kernels take alone, in memory."""
    packer = probe.form_title("amxint8")
    whole = {
        probe.WORDS: probe.GPTQ,
        probe.NO_ZEROS: probe.GPTQ,
        "packed INT4": probe.GPTQ,
        probe.SCALES: packer,
        probe.LOADS: packer,
    }
    lines = [
        "| alone | GB/s of BF16 | two processes | of whose time | as a share |",
        "|---|---|---|---|---|",
    ]
    alone = {**found.steps, **{"packed INT4": found.of["packed INT4"].memory}}
    for title, pace in alone.items():
        beside = ["", ""]
        if title in whole:
            beside = [whole[title], f"{found.of[whole[title]].memory.one / pace.one:.0%}"]
        lines.append(f"| {title} | {pace.one:.1f} | {pace.gain:.2f} | {' | '.join(beside)} |")
    return lines


def section(found: Profiles) -> list[str]:
    """Return the part of a page that shows what bounds the kernels."""
    effort = found.effort
    low, high = (nbytes_of(tile) >> 10 for tile in effort.small)
    held = effort.tiles * nbytes_of(effort.large) >> 20
    return [
        "### What bounds them",
        "",
        f"GB/s of BF16, of tiles of {low} and {high} KiB again and again (in the cache: the slope",
        f"over both, calls apart) and of {held} MiB gone through (in memory); one process, and",
        "what two at once, on a core each, make times one. Of a kernel's time in memory: what its",
        "arithmetic would take, which is its time in the cache, what moving its bytes would, which",
        "is its roofline's, and its calls from Python. Together they are more than 100% as far as",
        f"they overlap. Medians of {effort.repeats}.",
        "",
        *table(found),
        "",
        "Steps alone, in memory. GPTQ: its words turned and nothing else, all but its zero points,",
        "and as many words as packed INT4 has them, which are not turned. Packing: the scales,",
        "which are a pass of its own over the input, and numpy's reading of that input; numpy's",
        "filling of as many bytes is what stores can do.",
        "",
        *steps(found),
    ]


def why_share(found: Profiles, title: str) -> str:
    """Return what keeps a kernel from its roofline."""
    computing, moving, calling = share_of_time(found, title)
    return (
        f"its arithmetic alone takes {computing:.0%} of its time, moving its bytes alone "
        f"{moving:.0%}, calling it {calling:.0%}: they overlap, but not wholly (What bounds them)"
    )


def why_times(found: Profiles, title: str, peer: float, wanted: float) -> str:
    """Return how far a peer's GB/s leave room for `wanted` times as much."""
    one = found.of[title]
    if title in found.roof_of:
        roof = found.of[found.roof_of[title]]
        limit = (
            f"the roofline, which only moves the bytes, is {roof.memory.one / peer:.1f} times the "
            f"peer in memory and {roof.cached.one / peer:.1f} in the cache"
        )
    else:
        loads, scales = found.steps[probe.LOADS], found.steps[probe.SCALES]
        limit = (
            f"reading the input alone is {loads.one / peer:.1f} times the peer, finding the "
            f"scales alone {scales.one / peer:.1f}"
        )
    return (
        f"{wanted:.0f} times are {wanted * peer:.0f} GB/s; {limit}; ours is "
        f"{one.cached.one / peer:.1f} times in the cache (What bounds them)"
    )


def why_twice(found: Profiles, title: str) -> str:
    """Return what two cores give a kernel in the cache, and memory its roofline."""
    one, roof = found.of[title], found.of[found.roof_of[title]]
    return (
        f"in the cache two processes make {one.cached.gain:.2f} times one, in memory "
        f"{one.memory.gain:.2f}; of its roofline, which computes next to nothing, "
        f"{roof.cached.gain:.2f} and {roof.memory.gain:.2f} (What bounds them)"
    )
