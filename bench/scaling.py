"""Seconds per GB and peak memory as the model grows, and as `--memory` and `--jobs` change."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench.checkpoints import Size, Source, source
from bench.measure import Cost, convert, fresh, middle

# One layer is 0.85 GB of BF16: 1, 2, 4 and 8 GB.
SIZE = Size(layers=1, experts=16, hidden=2880, intermediate=2880, vocab=8192)
LAYERS = (1, 2, 4, 9)
MIDDLE = 2  # the index in LAYERS whose model shows --memory and --jobs
MEMORIES = ("256MiB", "1GiB", "2GiB")
JOBS = (1, 2)
MEMORY_REPEATS = 2
OWN_NBYTES = 0.35 * 2**30  # the aim: Python, its packages and the plan


class Row(NamedTuple):
    """Medians of one run. `memory`, `jobs`: its options."""

    layers: int
    output_nbytes: int
    memory: str
    jobs: int
    cost: Cost


class Setting(NamedTuple):
    """One run to measure."""

    layers: int
    memory: str
    jobs: int


def settings() -> tuple[list[Setting], list[Setting]]:
    """Return the runs of the first table and of the second."""
    growing = [Setting(layers, "2GiB", 2) for layers in LAYERS]
    bounded = [Setting(LAYERS[MIDDLE], memory, jobs) for memory in MEMORIES for jobs in JOBS]
    return growing, bounded


def run_settings(
    folder: Path, sources: dict[int, Source], given: Sequence[Setting], repeats: int
) -> list[Row]:
    """Run every setting `repeats` times in turn."""
    costs: dict[Setting, list[Cost]] = {one: [] for one in given}
    written = dict.fromkeys(costs, 0)
    target = folder / "scaling-out"
    for one in (one for _ in range(repeats) for one in costs):
        options = ("--memory", one.memory, "--jobs", str(one.jobs), "--verify", "none")
        root = sources[one.layers].root
        costs[one].append(fresh(target, lambda: convert(root, target, *options)))  # noqa: B023
        written[one] = sum(path.stat().st_size for path in target.glob("*.safetensors"))
        shutil.rmtree(target)
    return [
        Row(one.layers, written[one], one.memory, one.jobs, middle(found))
        for one, found in costs.items()
    ]


def run(folder: Path, repeats: int = 3, size: Size = SIZE) -> tuple[list[Row], list[Row]]:
    """Return the rows of both tables; the sources are removed."""
    growing, bounded = settings()
    sources = {
        layers: source(folder / f"scaling-{layers}", "gpt-oss", size._replace(layers=layers))
        for layers in LAYERS
    }
    found = run_settings(folder, sources, growing, repeats)
    limited = run_settings(folder, sources, bounded, min(repeats, MEMORY_REPEATS))
    for layers in LAYERS:
        shutil.rmtree(folder / f"scaling-{layers}")
    return found, limited


def nbytes_of(memory: str) -> int:
    """Return the bytes of one of MEMORIES."""
    unit = {"MiB": 2**20, "GiB": 2**30}[memory[-3:]]
    return int(memory[:-3]) * unit


def growing_table(rows: Sequence[Row]) -> list[str]:
    """Return the Markdown rows of the sizes."""
    per_gb = [row.cost.wall / (row.output_nbytes / 1e9) for row in rows]
    lines = [
        "| layers | GB out | seconds | seconds per GB | against the largest "
        "| CPU seconds per GB | peak RSS, GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, rate in zip(rows, per_gb, strict=True):
        gb = row.output_nbytes / 1e9
        lines.append(
            f"| {row.layers} | {gb:.2f} | {row.cost.wall:.2f} | {rate:.2f} "
            f"| {rate / per_gb[-1]:.2f} | {row.cost.cpu / gb:.2f} "
            f"| {row.cost.peak_rss / 2**30:.2f} |"
        )
    return lines


def bounded_table(rows: Sequence[Row]) -> list[str]:
    """Return the Markdown rows of the bounds."""
    lines = [
        "| --memory | --jobs | seconds | seconds per GB | peak RSS, GiB "
        "| most that it may be, GiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        allowed = (OWN_NBYTES + nbytes_of(row.memory)) / 2**30
        lines.append(
            f"| {row.memory} | {row.jobs} | {row.cost.wall:.2f} "
            f"| {row.cost.wall / (row.output_nbytes / 1e9):.2f} "
            f"| {row.cost.peak_rss / 2**30:.2f} | {allowed:.2f} |"
        )
    return lines


def section(folder: Path, repeats: int = 3, size: Size = SIZE) -> list[str]:
    """Return the part of docs/benchmarks.md."""
    growing, bounded = run(folder, repeats, size)
    few = min(repeats, MEMORY_REPEATS)
    return [
        "## Scaling: the size of the model, memory and jobs",
        "",
        "gpt-oss MXFP4 to BF16 with more and more layers, `--memory 2GiB --jobs 2`. Start-up is in",
        "the seconds and weighs most in the smallest. Medians of "
        f"{repeats}, in turn; source in the",
        "page cache, output durable. Aims: seconds per GB within 10 % of each other; peak RSS at",
        "most 0.35 GiB more than `--memory`, at any size.",
        "",
        *growing_table(growing),
        "",
        f"The model of {LAYERS[MIDDLE]} layers under other bounds, medians of {few}:",
        "",
        *bounded_table(bounded),
        "",
        "Commands: `moeconv convert SOURCE OUT --memory M --jobs N --verify none`; all of it:",
        "`python -m bench --only scaling`.",
    ]
