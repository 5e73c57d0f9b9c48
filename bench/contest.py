"""Several ways to the same output, taking turns on one source: ours first, then the others."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.checkpoints import Source
from bench.measure import Cost, copy_plainly, fresh, middle, spread, warm, write_direct
from bench.plots import Bar, bars

DIRECT = "O_DIRECT write of as many bytes, 2 threads"
COPY = "`cp` of the output, synced"
LIMITS = (DIRECT, COPY)


class Turn(NamedTuple):
    """What a way gets: where to write, and what the first one wrote in this turn."""

    source: Path
    target: Path
    ours: Path
    nbytes: int


class Way(NamedTuple):
    """One way; `once`: it is so slow that a single run must do. `command`: for the page."""

    title: str
    run: Callable[[Turn], Cost]
    command: str = ""
    once: bool = False


def direct() -> Way:
    """Return the limit: the same bytes written from memory past the page cache."""

    def run(turn: Turn) -> Cost:
        turn.target.mkdir()
        return write_direct(turn.target / "bytes", turn.nbytes)

    return Way(DIRECT, run)


def copied() -> Way:
    """Return `cp` of the first way's output."""
    return Way(COPY, lambda turn: copy_plainly(turn.ours, turn.target))


class Outcome(NamedTuple):
    """What every way cost, by title, and bytes."""

    source_nbytes: int
    output_nbytes: int
    runs: Mapping[str, Sequence[Cost]]

    @property
    def costs(self) -> dict[str, Cost]:
        """The medians."""
        return {title: middle(found) for title, found in self.runs.items()}

    def times(self, other: str, ours: str) -> float:
        """Return how many times as long one way takes as another."""
        return self.costs[other].wall / self.costs[ours].wall

    def times_cpu(self, other: str, ours: str) -> float:
        """Return how many times the CPU seconds one way takes."""
        return self.costs[other].cpu / self.costs[ours].cpu


def compete(folder: Path, given: Source, ways: Sequence[Way], repeats: int) -> Outcome:
    """Run all ways `repeats` times in turn, after a turn that is not counted."""
    found: dict[str, list[Cost]] = {way.title: [] for way in ways}
    ours, nbytes = folder / "ours", 0
    for number in range(repeats + 1):
        for index, way in enumerate(ways):
            if way.once and number != 1:
                continue
            target = folder / "other" if index else ours
            warm(given.root)
            turn = Turn(given.root, target, ours, nbytes)
            cost = fresh(target, lambda: way.run(turn))  # noqa: B023
            if number:
                found[way.title].append(cost)
            if index:
                shutil.rmtree(target)
            else:
                nbytes = sum(path.stat().st_size for path in ours.glob("*.safetensors"))
    shutil.rmtree(ours)
    return Outcome(given.nbytes, nbytes, found)


def table(outcome: Outcome) -> list[str]:
    """Return the Markdown rows; ratios are to the first way."""
    gb = outcome.output_nbytes / 1e9
    first = next(iter(outcome.costs))
    lines = [
        "| | seconds | from - to | times moeconv's | GB/s of output "
        "| speed against the O_DIRECT write | CPU seconds | times moeconv's | peak RSS, GiB "
        "| bytes read / source |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for title, cost in outcome.costs.items():
        rss = f"{cost.peak_rss / 2**30:.2f}" if cost.peak_rss else ""
        read = f"{cost.read_chars / outcome.source_nbytes:.3f}" if cost.read_chars else ""
        lines.append(
            f"| {title} | {cost.wall:.2f} | {spread(outcome.runs[title])} "
            f"| {outcome.times(title, first):.2f} | {gb / cost.wall:.2f} "
            f"| {outcome.costs[DIRECT].wall / cost.wall:.0%} | {cost.cpu:.1f} "
            f"| {outcome.times_cpu(title, first):.2f} | {rss} | {read} |"
        )
    return lines


def plot(path: Path, outcome: Outcome, heading: str) -> list[str]:
    """Write the picture of the seconds; return the lines that show it."""
    rows = [
        Bar(title.replace("`", ""), cost.wall, title.startswith("moeconv"))
        for title, cost in outcome.costs.items()
    ]
    return bars(path, heading, rows)


def terms(ways: Sequence[Way], repeats: int) -> list[str]:
    """Return the lines that say how a contest is run."""
    once = [way.title for way in ways if way.once]
    return [
        "Start-up, planning and making the output durable are included; the source is in the page",
        f"cache, as it is after a download. Medians of {repeats}, in turn, after a turn that does",
        f"not count{'; once: ' + ', '.join(once) if once else ''}. Bytes read are rchar of",
        "/proc/self/io, which knows nothing of memory maps.",
    ]


def commands(ways: Sequence[Way]) -> list[str]:
    """Return the lines that say how each way was run."""
    return [f"- {way.title}: {way.command}" for way in ways if way.command]
