"""Where the time of a conversion goes: what its threads do, and how far that overlaps."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bench import timeline, trace
from bench.checkpoints import Source
from bench.measure import fresh, run_telling, warm
from bench.timeline import Part
from bench.trace import MAIN, Span

ROOT = Path(__file__).parents[1]
CODE = (
    f"sys.path.insert(0, {str(ROOT)!r})\n"
    "from bench import trace\n"
    "trace.run(float(sys.argv[1]), sys.argv[2], sys.argv[3:])\n"
    "_tell()\n"  # ends as moeconv/__main__.py does
    "import os\n"
    "os._exit(0)\n"
)
# What overlaps with what.
KINDS: Mapping[str, tuple[str, ...]] = {
    "reading": (trace.READING,),
    "computing": (
        trace.DECODING,
        trace.QUANTIZING,
        trace.COUNTING,
        trace.PLACING,
        trace.DIGESTING,
    ),
    "writing": (trace.WRITING,),
}
BEFORE = (trace.STARTING, trace.IMPORTING, trace.PLANNING, trace.LOADING, trace.MAKING)


class Trace(NamedTuple):
    """One conversion: seconds, CPU seconds of all its threads, its calls, in order."""

    wall: float
    cpu: float
    spans: tuple[Span, ...]

    @property
    def parts(self) -> list[Part]:
        """What every thread is innermost in, from when to when."""
        every = (part for lane in self.lanes for part in innermost(self.spans, lane))
        return [part for part in every if part.stop > part.start]

    @property
    def lanes(self) -> list[str]:
        """The threads, the main one first."""
        return sorted({span.lane for span in self.spans}, key=lambda lane: (lane != MAIN, lane))

    @property
    def working(self) -> tuple[float, float]:
        """When the first worker begins and the last one ends."""
        found = [span for span in self.spans if span.lane != MAIN]
        return min(span.start for span in found), max(span.stop for span in found)

    def cpu_of(self, *whats: str) -> float:
        """Return the CPU seconds of all threads in what is named so."""
        return sum(span.cpu for span in self.spans if span.what in whats)


def innermost(spans: Sequence[Span], lane: str) -> Iterator[Part]:
    """Yield what a thread is innermost in; its spans lie in each other or apart."""
    inside: list[Span] = []
    at = 0.0
    for span in sorted(
        (span for span in spans if span.lane == lane), key=lambda one: (one.start, -one.stop)
    ):
        while inside and inside[-1].stop <= span.start:
            ended = inside.pop()
            yield Part(lane, ended.what, at, ended.stop)
            at = ended.stop
        if inside:
            yield Part(lane, inside[-1].what, at, span.start)
        inside.append(span)
        at = span.start
    while inside:
        ended = inside.pop()
        yield Part(lane, ended.what, at, ended.stop)
        at = ended.stop


def traced(source: Path, target: Path, *options: str) -> Trace:
    """Convert once, watched, in a process of its own."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        words = ("convert", str(source), str(target), "--progress", "none", *options)
        began = time.monotonic()
        cost = run_telling(CODE, (repr(began), report.name, *words)).cost
        end, busy, found = json.loads(Path(report.name).read_text())
    ending = Span(MAIN, trace.ENDING, end, max(cost.wall, end), max(cost.cpu - busy, 0.0))
    return Trace(cost.wall, cost.cpu, (*(Span(*one) for one in found), ending))


def profile(source: Path, folder: Path, *options: str, repeats: int = 3) -> Trace:
    """Return the one of `repeats` runs whose seconds are their median; the source is warm."""
    target = folder / "traced"
    found = []
    for _ in range(repeats):
        warm(source)
        found.append(fresh(target, lambda: traced(source, target, *options)))
    shutil.rmtree(target)
    return sorted(found, key=lambda one: one.wall)[len(found) // 2]


def profiles(
    folder: Path, given: Source, ways: Mapping[str, tuple[str, ...]], repeats: int
) -> dict[str, Trace]:
    """Return the profile of every way: title -> options of convert."""
    return {
        title: profile(given.root, folder, *options, repeats=repeats)
        for title, options in ways.items()
    }


def table(found: Trace) -> list[str]:
    """Return the Markdown rows: seconds of each thread in each phase, and CPU seconds of all."""
    names = ["main thread", *(f"worker {at + 1}" for at in range(len(found.lanes) - 1))]
    lines = [
        f"| seconds of | {' | '.join(names)} | CPU seconds of all | share |",
        f"|---|{'---|' * len(names)}---|---|",
    ]
    seconds: dict[tuple[str, str], float] = {}
    for part in found.parts:
        key = part.what, part.lane
        seconds[key] = seconds.get(key, 0.0) + part.stop - part.start
    for what in dict.fromkeys(what for what in timeline.COLORS if found.cpu_of(what) or seconds):
        of_lanes = [seconds.get((what, lane), 0.0) for lane in found.lanes]
        if max(*of_lanes, found.cpu_of(what)) >= 0.0005:
            lines.append(_row(what, of_lanes, found.cpu_of(what), found.cpu))
    rest = found.cpu - sum(span.cpu for span in found.spans)
    lines.append(_row("what no call covers, and watching", [0.0] * len(names), rest, found.cpu))
    whole = [
        sum(value for (_, lane), value in seconds.items() if lane == one) for one in found.lanes
    ]
    return [*lines, _row("all of it", whole, found.cpu, found.cpu)]


def _row(what: str, seconds: Sequence[float], cpu: float, whole: float) -> str:
    cells = [f"{value:.3f}" if value >= 0.0005 else "" for value in seconds]
    return f"| {what} | {' | '.join(cells)} | {cpu:.3f} | {cpu / whole:.0%} |"


class Overlap(NamedTuple):
    """Of the seconds in which workers run: shares in which something is read, computed, written.

    `together`: two or three of these at once; `none`: none of them; `cores`: how many are busy.
    """

    seconds: float
    shares: Mapping[str, float]
    together: float
    none: float
    cores: float


def overlap(found: Trace) -> Overlap:
    """Return how far reading, computing and writing overlap."""
    start, stop = found.working
    kind_of = {what: kind for kind, whats in KINDS.items() for what in whats}
    marks: list[tuple[float, str, int]] = []
    for part in found.parts:
        if part.lane != MAIN and part.what in kind_of:
            marks.append((part.start, kind_of[part.what], 1))
            marks.append((part.stop, kind_of[part.what], -1))
    running = dict.fromkeys(KINDS, 0)
    shares = dict.fromkeys(KINDS, 0.0)
    at, together, none = start, 0.0, 0.0
    for moment, kind, change in [*sorted(marks), (stop, "", 0)]:
        now = [name for name, count in running.items() if count]
        for name in now:
            shares[name] += moment - at
        together += (moment - at) * (len(now) > 1)
        none += (moment - at) * (not now)
        at = moment
        if kind:
            running[kind] += change
    cpu = sum(span.cpu for span in found.spans if span.lane != MAIN)
    whole = stop - start
    told = {name: seconds / whole for name, seconds in shares.items()}
    return Overlap(whole, told, together / whole, none / whole, cpu / whole)


def overlaps(found: Mapping[str, Trace]) -> list[str]:
    """Return the Markdown rows, one a job."""
    lines = [
        "| | seconds | before the workers | workers run | after them "
        f"| {' | '.join(KINDS)} | two or three at once | none | cores busy |",
        f"|---|---|---|---|---|{'---|' * len(KINDS)}---|---|---|",
    ]
    for title, one in found.items():
        told = overlap(one)
        shares = " | ".join(f"{share:.0%}" for share in told.shares.values())
        lines.append(
            f"| {title} | {one.wall:.2f} | {one.working[0]:.2f} | {told.seconds:.2f} "
            f"| {one.wall - one.working[1]:.2f} | {shares} "
            f"| {told.together:.0%} | {told.none:.0%} | {told.cores:.2f} |"
        )
    return lines


def section(pictured: Path, found: Mapping[str, Trace], repeats: int) -> list[str]:
    """Return the part of a page that shows where conversions' time goes. `found`: by title."""
    lines = [
        "### Where the time goes",
        "",
        f"The same commands with every thread watched, of {repeats} runs the one with the median",
        "seconds. A thread's seconds are those in which it is there and in nothing else below:",
        "what waits for a core or for Python's lock counts for what it does then. Start-up is in",
        "them all. Shares of overlapping are of the seconds in which workers run.",
        "",
        *overlaps(found),
    ]
    for title, one in found.items():
        plain = title.replace("`", "")
        words = "".join(letter if letter.isalnum() else " " for letter in plain.lower()).split()
        path = pictured / f"time-{'-'.join(words)}.svg"
        heading = f"{plain}: what each thread does"
        lines += ["", *timeline.draw(path, heading, one.lanes, one.parts), "", *table(one)]
    return lines


def why_not_as_fast(found: Trace) -> str:
    """Return what of a conversion's seconds is no writing, and where the page shows it."""
    return f"{no_writing(found)} (Where the time goes)"


def no_writing(found: Trace) -> str:
    """Return what of a conversion's seconds is no writing."""
    told = overlap(found)
    start, stop = found.working
    return (
        f"of {found.wall:.2f} s watched {start:.2f} pass before the workers begin and "
        f"{found.wall - stop:.2f} after they have ended; while they run, something is written "
        f"{told.shares['writing']:.0%} of the time and computed {told.shares['computing']:.0%}"
    )


def why_not_times(found: Trace, most: float) -> str:
    """Return what is in the way of more; `most`: times the peer that an O_DIRECT write is."""
    return (
        f"the O_DIRECT write of the output alone is {most:.1f} times as fast as the peer; "
        f"{why_not_as_fast(found)}"
    )


def why_cpu(found: Trace, aimed: float) -> str:
    """Return where CPU seconds go that are to be at most `aimed`."""
    start = found.cpu_of(*BEFORE)
    counted = {
        "start": start,
        "reading": found.cpu_of(trace.READING),
        "the kernels": found.cpu_of(trace.DECODING, trace.QUANTIZING, trace.COUNTING),
        "turning and placing": found.cpu_of(trace.PLACING),
        "digests": found.cpu_of(trace.DIGESTING),
        "writing": found.cpu_of(trace.WRITING),
    }
    told = ", ".join(f"{name} {seconds:.2f}" for name, seconds in counted.items())
    return (
        f"the aim allows {aimed:.2f} CPU s; watched, {found.cpu:.2f} went: {told}, all else "
        f"{found.cpu - sum(counted.values()):.2f} (Where the time goes)"
    )
