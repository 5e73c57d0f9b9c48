"""What is run as the model grows, how far runs of the same lie apart, and the line they follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bench import profiles
from bench.measure import Cost, middle, spread
from bench.profiles import Trace

LAYERS = (1, 2, 4, 9, 19)
MIDDLE = 2  # the index in LAYERS whose model shows --memory
MEMORIES = ("256MiB", "1GiB", "2GiB")
MEMORY = MEMORIES[-1]
# Layers -> the default runs every so many rounds, of ROUNDS a repeat; all else runs once a repeat.
EVERY: Mapping[int, int] = {1: 1, 2: 2, 4: 2}
ROUNDS = 4
OWN_NBYTES = 0.35 * 2**30  # the aim: Python, its packages and the plan
WITHIN = 1.10


class Setting(NamedTuple):
    """One run to measure; `jobs` 0: as moeconv chooses, else on as many cores alone."""

    layers: int
    jobs: int
    memory: str = MEMORY

    def options(self) -> tuple[str, ...]:
        """Return the options of convert."""
        jobs = ("--jobs", str(self.jobs)) if self.jobs else ()
        return ("--memory", self.memory, *jobs, "--verify", "none")

    def runs_in(self, number: int) -> bool:
        """Return whether this runs in a round: small models of the default more often."""
        often = EVERY.get(self.layers, ROUNDS) if self in GROWING and not self.jobs else ROUNDS
        return number % often == 0


class Row(NamedTuple):
    """All runs of one setting; `direct`: O_DIRECT writes of as many bytes, in turn with them."""

    setting: Setting
    source_nbytes: int
    output_nbytes: int
    runs: Sequence[Cost]
    direct: Sequence[Cost] = ()

    @property
    def cost(self) -> Cost:
        """The medians."""
        return middle(self.runs)

    @property
    def gb(self) -> float:
        """The GB of output."""
        return self.output_nbytes / 1e9

    @property
    def per_gb(self) -> float:
        """The seconds per GB of output."""
        return self.cost.wall / self.gb


JOBS: Mapping[int, str] = {0: "default", 1: "`--jobs 1`, one core", 2: "`--jobs 2`, two cores"}
GROWING = tuple(Setting(layers, jobs) for layers in LAYERS for jobs in JOBS)
BOUNDED = tuple(Setting(LAYERS[MIDDLE], jobs, one) for one in MEMORIES[:-1] for jobs in (1, 2))


def of(rows: Sequence[Row], jobs: int) -> list[Row]:
    """Return the rows with this number of jobs."""
    return [row for row in rows if row.setting.jobs == jobs]


class Fit(NamedTuple):
    """The line nearest to the medians of runs over their GB: seconds of it, and per GB.

    `apart`: the farthest median over its line's, at least 1; `at`: the index of that size.
    """

    start: float
    per_gb: float
    apart: float
    at: int


def fit(gb: Sequence[float], runs: Sequence[Sequence[Cost]]) -> Fit:
    """Return the line: least squares of relative errors, small models count as much as large."""
    sizes = np.array(gb)
    wall = np.array([middle(found).wall for found in runs])
    terms = np.stack([np.ones_like(sizes), sizes], axis=1) / wall[:, None]
    start, per_gb = (
        float(one) for one in np.linalg.lstsq(terms, np.ones_like(wall), rcond=None)[0]
    )
    off = np.abs(wall / (start + per_gb * sizes) - 1)
    return Fit(start, per_gb, 1 + float(off.max()), int(off.argmax()))


def fits(rows: Sequence[Row]) -> tuple[Fit, Fit]:
    """Return the lines of the default's runs, and of the O_DIRECT writes beside them."""
    sizes = [row.gb for row in rows]
    return fit(sizes, [row.runs for row in rows]), fit(sizes, [row.direct for row in rows])


def spreads(rows: Sequence[Row]) -> list[str]:
    """Return the Markdown rows that say how far runs of the same lie apart."""
    lines = [
        "| GB out | turns | seconds | from - to | CPU seconds in the kernel, from - to "
        "| against its line | O_DIRECT write, seconds | from - to | against its line | times it |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    ours, direct = fits(rows)
    for row in rows:
        cells = [f"{row.gb:.2f}", f"{len(row.runs)}"]
        walls = []
        for found, line in ((row.runs, ours), (row.direct, direct)):
            wall = middle(found).wall
            off = wall / (line.start + line.per_gb * row.gb)
            kernel = [spread(found, system=True)] if found is row.runs else []
            cells += [f"{wall:.2f}", spread(found), *kernel, f"{off:.2f}"]
            walls.append(wall)
        lines.append(f"| {' | '.join(cells)} | {walls[0] / walls[1]:.2f} |")
    return lines


def why_not_level(rows: Sequence[Row], traces: Mapping[str, Trace]) -> str:
    """Return what does not grow with the model."""
    first, *_, last = traces.values()
    told = [
        f"{one.working[0]:.2f} s pass before the workers begin, {one.wall - one.working[1]:.2f} "
        f"after they have ended and {profiles.overlap(one).seconds / row.gb:.3f} a GB between"
        for one, row in ((first, rows[0]), (last, rows[-1]))
    ]
    line = fits(rows)[0]
    return (
        f"{line.start:.2f} s are the same for all; watched, of the smallest {told[0]}, of the "
        f"largest {told[1]} (Where the time goes); between are {rows[0].cost.system:.2f} and "
        f"{rows[-1].cost.system:.2f} CPU s in the kernel, which makes the same memory for both"
    )


def why_not_a_line(rows: Sequence[Row]) -> str:
    """Return how far runs of the same command lie apart where a median is off the line."""
    ours, direct = fits(rows)
    row = rows[ours.at]
    return (
        f"the farthest is {row.gb:.2f} GB, whose {len(row.runs)} turns took {spread(row.runs)} s, "
        f"{spread(row.runs, system=True)} of CPU in the kernel among them, where fresh memory is "
        "made; "
        f"an O_DIRECT write of as many bytes took {spread(row.direct)} s in the same turns, and "
        f"such writes are off a line of their own by {direct.apart:.2f}"
    )
