"""Seconds per GB, bytes and peak memory as the model grows, and as workers and memory change."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench import aims, plots
from bench.aims import Aim
from bench.architectures import Size
from bench.checkpoints import source
from bench.measure import Cost, convert, fresh, middle, warm

# One layer is 0.85 GB of BF16: 1, 2, 4, 8 and 16 GB.
SIZE = Size(layers=1, experts=16, hidden=2880, intermediate=2880, vocab=8192)
LAYERS = (1, 2, 4, 9, 19)
MIDDLE = 2  # the index in LAYERS whose model shows --memory
MEMORIES = ("256MiB", "1GiB", "2GiB")
MEMORY = MEMORIES[-1]
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


class Row(NamedTuple):
    """Medians of one run."""

    setting: Setting
    source_nbytes: int
    output_nbytes: int
    cost: Cost

    @property
    def per_gb(self) -> float:
        """The seconds per GB of output."""
        return self.cost.wall / (self.output_nbytes / 1e9)


JOBS: Mapping[int, str] = {0: "default", 1: "`--jobs 1`, one core", 2: "`--jobs 2`, two cores"}
GROWING = tuple(Setting(layers, jobs) for layers in LAYERS for jobs in JOBS)
BOUNDED = tuple(Setting(LAYERS[MIDDLE], jobs, one) for one in MEMORIES[:-1] for jobs in (1, 2))


def run(folder: Path, given: Sequence[Setting], repeats: int, size: Size) -> list[Row]:
    """Run every setting `repeats` times in turn; the sources are removed."""
    sources = {
        layers: source(folder / f"scaling-{layers}", "gpt-oss", size._replace(layers=layers))
        for layers in sorted({one.layers for one in given})
    }
    costs: dict[Setting, list[Cost]] = {one: [] for one in given}
    written = dict.fromkeys(costs, 0)
    target = folder / "scaling-out"
    convert(sources[given[0].layers].root, target, *given[0].options())  # compiles what is not yet
    for one in (one for _ in range(repeats) for one in costs):
        root = sources[one.layers].root
        warm(root)
        cost = fresh(target, lambda: convert(root, target, *one.options(), cores=one.jobs))  # noqa: B023
        costs[one].append(cost)
        written[one] = sum(path.stat().st_size for path in target.glob("*.safetensors"))
        shutil.rmtree(target)
    for layers in sources:
        shutil.rmtree(folder / f"scaling-{layers}")
    return [
        Row(one, sources[one.layers].nbytes, written[one], middle(found))
        for one, found in costs.items()
    ]


def of(rows: Sequence[Row], jobs: int) -> list[Row]:
    """Return the rows with this number of jobs."""
    return [row for row in rows if row.setting.jobs == jobs]


def fit(rows: Sequence[Row]) -> tuple[float, float]:
    """Return the seconds before the first byte and those per GB of the line nearest to the rows.

    Least squares of relative errors, so that small models count as much as large ones.
    """
    gb = np.array([row.output_nbytes / 1e9 for row in rows])
    wall = np.array([row.cost.wall for row in rows])
    terms = np.stack([np.ones_like(gb), gb], axis=1) / wall[:, None]
    start, per_gb = np.linalg.lstsq(terms, np.ones_like(wall), rcond=None)[0]
    return float(start), float(per_gb)


def table(rows: Sequence[Row]) -> list[str]:
    """Return the Markdown rows."""
    lines = [
        "| workers | --memory | GB out | seconds | seconds per GB | CPU seconds per GB "
        "| peak RSS, GiB | read, bytes per byte out | from disk | written | to disk |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cost, out = row.cost, row.output_nbytes
        moved = (cost.read_chars, cost.read_disk, cost.written_chars, cost.written_disk)
        cells = [
            JOBS[row.setting.jobs],
            row.setting.memory,
            f"{out / 1e9:.2f}",
            f"{cost.wall:.2f}",
            f"{row.per_gb:.3f}",
            f"{cost.cpu / (out / 1e9):.2f}",
            f"{cost.peak_rss / 2**30:.2f}",
            *(f"{nbytes / out:.3f}" for nbytes in moved),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def nbytes_of(memory: str) -> int:
    """Return the bytes of one of MEMORIES."""
    unit = {"MiB": 2**20, "GiB": 2**30}[memory[-3:]]
    return int(memory[:-3]) * unit


def aimed(rows: Sequence[Row]) -> list[Aim]:
    """Return the aims: of the default over the sizes, and of every row's memory."""
    default = of(rows, 0)
    rates = [row.per_gb for row in default]
    start, per_gb = fit(default)
    apart = max(
        abs(row.cost.wall / (start + per_gb * row.output_nbytes / 1e9) - 1) for row in default
    )
    over = max((row.cost.peak_rss - nbytes_of(row.setting.memory)) / 2**30 for row in rows)
    return [
        Aim(
            "largest over smallest seconds per GB, start-up included",
            max(rates) / min(rates),
            WITHIN,
            most=True,
            why=f"{start:.2f} s are the same for all: start-up, planning, the first and the last "
            "task, when not all jobs work, and making files durable",
        ),
        Aim(
            f"any size beside {start:.2f} s and {per_gb:.3f} s per GB", 1 + apart, WITHIN, most=True
        ),
        Aim("most by which peak RSS is over `--memory`, GiB", over, 0.35, most=True),
    ]


def pictures(folder: Path, rows: Sequence[Row]) -> list[str]:
    """Write the plots over the size; return the lines that show them."""

    def over(figure: str, scale: float) -> list[plots.Line]:
        return [
            plots.Line(
                JOBS[jobs].replace("`", ""),
                [
                    (
                        row.output_nbytes / 1e9,
                        (row.per_gb if figure == "per_gb" else row.cost.peak_rss) / scale,
                    )
                    for row in of(rows, jobs)
                ],
            )
            for jobs in JOBS
        ]

    bound = (OWN_NBYTES + nbytes_of(MEMORY)) / 2**30
    right = max(row.output_nbytes for row in rows) / 1e9
    aim = plots.Line("the bound", [(0, bound), (right, bound)])
    seconds = folder / "scaling-seconds.svg"
    memory = folder / "scaling-memory.svg"
    return [
        *plots.lines(seconds, "Seconds per GB of output", over("per_gb", 1), "GB of output"),
        "",
        *plots.lines(memory, "Peak RSS, GiB", over("peak_rss", 2**30), "GB of output", aim),
    ]


def section(folder: Path, pictured: Path, repeats: int = 3, size: Size = SIZE) -> list[str]:
    """Return the part of docs/benchmarks.md."""
    rows = run(folder, (*GROWING, *BOUNDED), repeats, size)
    growing = rows[: len(GROWING)]
    start, per_gb = fit(of(growing, 0))
    gain = of(growing, 1)[-1].cost.wall / of(growing, 2)[-1].cost.wall
    return [
        "## Scaling: the size of the model, workers and memory",
        "",
        "gpt-oss MXFP4 to BF16 with more and more layers. Workers are kept on as many cores by",
        f"`taskset`. Medians of {repeats}, in turn; source in the page cache, output durable.",
        "Bytes are rchar, read_bytes, wchar and write_bytes of /proc/self/io.",
        "",
        *table(growing),
        "",
        *pictures(pictured, growing),
        "",
        "The line nearest to the default's rows has "
        f"{start:.2f} s whatever the size and {per_gb:.3f} s per GB.",
        f"Of the largest model, two workers on two cores make {gain:.2f} times what one makes.",
        "",
        f"Under other bounds, {LAYERS[MIDDLE]} layers:",
        "",
        *table(rows[len(GROWING) :]),
        "",
        *aims.table([*aimed(rows)]),
        "",
        "Commands: `moeconv convert SOURCE OUT --memory M [--jobs N] --verify none`; all of it:",
        "`python -m bench --only scaling`.",
    ]
