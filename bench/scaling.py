"""Seconds per GB, bytes and peak memory as the model grows, and as workers and memory change."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from bench import aims, plots, profiles
from bench.aims import Aim
from bench.architectures import Size
from bench.checkpoints import Source, source
from bench.growth import (
    BOUNDED,
    GROWING,
    JOBS,
    LAYERS,
    MEMORY,
    MIDDLE,
    OWN_NBYTES,
    ROUNDS,
    WITHIN,
    Row,
    Setting,
    fits,
    of,
    spreads,
    why_not_a_line,
    why_not_level,
)
from bench.measure import Cost, convert, fresh, touch_fresh, warm, write_direct
from bench.profiles import Trace

FRESH = 5  # times that memory is made
MADE_NBYTES = 768 << 20  # more than a run's peak RSS
# One layer is 0.85 GB of BF16: 1, 2, 4, 8 and 16 GB.
SIZE = Size(layers=1, experts=16, hidden=2880, intermediate=2880, vocab=8192)


def run(
    folder: Path, given: Sequence[Setting], repeats: int, sources: Mapping[int, Source]
) -> list[Row]:
    """Run every setting in turn, the default's with an O_DIRECT write of as many bytes each."""
    runs: dict[Setting, list[Cost]] = {one: [] for one in given}
    direct: dict[Setting, list[Cost]] = {one: [] for one in given}
    written = dict.fromkeys(runs, 0)
    target = folder / "scaling-out"
    convert(sources[given[0].layers].root, target, *given[0].options())  # compiles what is not yet
    turns = [one for number in range(repeats * ROUNDS) for one in given if one.runs_in(number)]
    for one in turns:
        root = sources[one.layers].root
        warm(root)
        touch_fresh(MADE_NBYTES)
        cost = fresh(target, lambda: convert(root, target, *one.options(), cores=one.jobs))  # noqa: B023
        runs[one].append(cost)
        written[one] = sum(path.stat().st_size for path in target.glob("*.safetensors"))
        shutil.rmtree(target)
        if one in GROWING and not one.jobs:
            path = folder / "scaling-direct"
            direct[one].append(fresh(target, lambda: write_direct(path, written[one])))  # noqa: B023
            path.unlink()
    return [
        Row(one, sources[one.layers].nbytes, written[one], found, direct[one])
        for one, found in runs.items()
    ]


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


def aimed(rows: Sequence[Row], traces: Mapping[str, Trace]) -> list[Aim]:
    """Return the aims: of the default over the sizes, and of every row's memory."""
    default = [row for row in of(rows, 0) if row.direct]
    rates = [row.per_gb for row in default]
    line = fits(default)[0]
    most = max(rows, key=lambda row: row.cost.peak_rss - nbytes_of(row.setting.memory))
    over = (most.cost.peak_rss - nbytes_of(most.setting.memory)) / 2**30
    return [
        Aim(
            "largest over smallest seconds per GB, start-up included",
            max(rates) / min(rates),
            WITHIN,
            partial(why_not_level, default, traces),
            most=True,
        ),
        Aim(
            f"any size beside {line.start:.2f} s and {line.per_gb:.3f} s per GB",
            line.apart,
            WITHIN,
            partial(why_not_a_line, default),
            most=True,
        ),
        Aim(
            "most by which peak RSS is over `--memory`, GiB",
            over,
            OWN_NBYTES / 2**30,
            lambda: f"of {most.gb:.2f} GB with {most.setting.memory}",
            most=True,
        ),
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
    sources = {
        layers: source(folder / f"scaling-{layers}", "gpt-oss", size._replace(layers=layers))
        for layers in LAYERS
    }
    rows = run(folder, (*GROWING, *BOUNDED), repeats, sources)
    growing = rows[: len(GROWING)]
    default = of(growing, 0)
    traces = {
        f"{row.setting.layers} layers, {row.gb:.2f} GB": profiles.profile(
            sources[row.setting.layers].root, folder, *row.setting.options(), repeats=1
        )
        for row in default
    }
    for layers in sources:
        shutil.rmtree(folder / f"scaling-{layers}")
    made = [touch_fresh(1 << 30) for _ in range(FRESH)]
    line = fits(default)[0]
    gain = of(growing, 1)[-1].cost.wall / of(growing, 2)[-1].cost.wall
    return [
        "## Scaling: the size of the model, workers and memory",
        "",
        "gpt-oss MXFP4 to BF16 with more and more layers. Workers are kept on as many cores by",
        f"`taskset`. Medians of {repeats}, in turn, of more for the default's small models; source",
        "in the page cache, output durable.",
        "Bytes are rchar, read_bytes, wchar and write_bytes of /proc/self/io.",
        "",
        *table(growing),
        "",
        *pictures(pictured, growing),
        "",
        "The line nearest to the default's rows has "
        f"{line.start:.2f} s whatever the size and {line.per_gb:.3f} s per GB.",
        f"Of the largest model, two workers on two cores make {gain:.2f} times what one makes.",
        "How far runs of the same lie apart, and O_DIRECT writes of as many bytes in turn with",
        "them, which start nothing and compute nothing:",
        "",
        *spreads(default),
        "",
        "What a run writes to memory for the first time, about its peak RSS whatever the size, the",
        "kernel has to make; on a virtual machine the host may have taken it away meanwhile. So",
        f"{MADE_NBYTES >> 20} MiB are written to before each run. 1 GiB, one after the other, took "
        f"{', '.join(f'{seconds:.2f}' for seconds in made)} s.",
        "",
        f"Under other bounds, {LAYERS[MIDDLE]} layers:",
        "",
        *table(rows[len(GROWING) :]),
        "",
        *aims.table(aimed(rows, traces)),
        "",
        "### Where the time goes",
        "",
        "The default's runs once more, watched as those of the main job:",
        "",
        *profiles.overlaps(traces),
        "",
        "Commands: `moeconv convert SOURCE OUT --memory M [--jobs N] --verify none`; all of it:",
        "`python -m bench --only scaling`.",
    ]
