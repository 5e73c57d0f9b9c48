"""A source that the page cache does not hold beside one that it does."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bench import aims
from bench.aims import Aim
from bench.architectures import Size
from bench.checkpoints import Source, source
from bench.measure import Cost, convert, cool, fresh, middle, warm

# Kind of source -> options, and what is written.
JOBS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "gpt-oss": ((), "MXFP4 to BF16"),
    "deepseek-v3": ((), "FP8 to BF16"),
    "qwen3-moe": (("--layout", "ktransformers", "--numa", "1", "--dtype", "int8"), "BF16 to INT8"),
}
STATES: Mapping[str, Callable[[Path], None]] = {"warm": warm, "cold": cool}


class Row(NamedTuple):
    """Medians of one job by the state of its source, and its source's bytes."""

    kind: str
    source_nbytes: int
    costs: Mapping[str, Cost]


def run_source(folder: Path, kind: str, given: Source, repeats: int) -> Row:
    """Run both states `repeats` times in turn, after one that is not counted."""
    target = folder / "cold-out"
    options = JOBS[kind][0]
    found: dict[str, list[Cost]] = {state: [] for state in STATES}
    for number in range(repeats + 1):
        for state, prepare in STATES.items():
            prepare(given.root)
            cost = fresh(target, lambda: convert(given.root, target, *options))
            shutil.rmtree(target)
            if number:
                found[state].append(cost)
    return Row(kind, given.nbytes, {state: middle(costs) for state, costs in found.items()})


def table(rows: Sequence[Row]) -> list[str]:
    """Return the Markdown rows; that a source was cold shows in what came from disk."""
    lines = [
        "| source | | seconds | against warm | CPU seconds | GB in | from disk / source |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for state, cost in row.costs.items():
            lines.append(
                f"| {row.kind}, {JOBS[row.kind][1]} | {state} | {cost.wall:.2f} "
                f"| {cost.wall / row.costs['warm'].wall:.2f} | {cost.cpu:.1f} "
                f"| {row.source_nbytes / 1e9:.2f} | {cost.read_disk / row.source_nbytes:.3f} |"
            )
    return lines


def aimed(row: Row) -> Aim:
    """Return the aim, of the row whose disk delivers most."""
    cold, held = row.costs["cold"], row.source_nbytes

    def why() -> str:
        return (
            f"{row.kind} asks for {cold.read_chars / held:.3f} times the source's bytes, Python's "
            "own files included; what the disk delivered beyond is the kernel's reading ahead"
        )

    read = cold.read_disk / held
    return Aim("read from disk, times the source's bytes", read, 1.05, why, most=True)


def section(folder: Path, repeats: int = 3, sizes: Mapping[str, Size] | None = None) -> list[str]:
    """Return the part of docs/benchmarks.md."""
    rows = [
        run_source(folder, kind, source(folder, kind, (sizes or {}).get(kind)), repeats)
        for kind in JOBS
    ]
    most = max(rows, key=lambda row: row.costs["cold"].read_disk / row.source_nbytes)
    return [
        "## Cold sources",
        "",
        "The source's files dropped from the page cache (POSIX_FADV_DONTNEED) before every run, or",
        "read whole before it. What the disk delivered (read_bytes of /proc/self/io) says which it",
        f"was; what is below the disk may still hold it. Medians of {repeats}, in turn.",
        "",
        *table(rows),
        "",
        *aims.table([aimed(most)]),
        "",
        "All of it: `python -m bench --only cold`.",
    ]
