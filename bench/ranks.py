"""Many ranks cost what one file costs: bytes read and wall time of every layout, one source."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bench import aims, profiles
from bench.aims import Aim
from bench.architectures import Size
from bench.checkpoints import Source, source
from bench.measure import Cost, convert, fresh, middle, moeconv, spread

TITLES = {"qwen3-moe": "Qwen3-MoE, BF16", "gpt-oss": "gpt-oss, MXFP4"}
VLLM = ("--layout", "vllm", "--tp")
BASE = "hf"
TARGETS: Mapping[str, tuple[str, ...]] = {
    BASE: ("--layout", "hf"),
    "tp1": (*VLLM, "1"),
    "tp2": (*VLLM, "2"),
    "tp8": (*VLLM, "8"),
    "tp8-ep": (*VLLM, "8", "--ep"),
    "kt-int8": ("--layout", "ktransformers", "--numa", "2", "--dtype", "int8"),
}
# kt-kernel reads experts without biases, and gpt-oss' have some: moeconv refuses.
LEFT_OUT = {("gpt-oss", "kt-int8")}


class Row(NamedTuple):
    """All runs of one target beside the bytes of its output."""

    kind: str
    target: str
    output_nbytes: int
    source_nbytes: int
    runs: Sequence[Cost]

    @property
    def cost(self) -> Cost:
        """The medians."""
        return middle(self.runs)


def targets_of(kind: str) -> list[str]:
    """Return the targets that a source can be written as."""
    return [name for name in TARGETS if (kind, name) not in LEFT_OUT]


def run_source(folder: Path, kind: str, given: Source, repeats: int) -> list[Row]:
    """Write every target `repeats` times in turn, after a turn that does not count."""
    costs: dict[str, list[Cost]] = {name: [] for name in targets_of(kind)}
    written = dict.fromkeys(costs, 0)
    for name in (name for _ in range(repeats + 1) for name in costs):
        target = folder / f"ranks-{name}"
        options = (*TARGETS[name], "--verify", "none")
        costs[name].append(fresh(target, lambda: convert(given.root, target, *options)))  # noqa: B023
        written[name] = sum(path.stat().st_size for path in target.rglob("*.safetensors"))
        shutil.rmtree(target)
    return [
        Row(kind, name, written[name], given.nbytes, found[1:]) for name, found in costs.items()
    ]


def run(folder: Path, repeats: int = 3, sizes: Mapping[str, Size] | None = None) -> list[Row]:
    """Return the rows of both sources."""
    rows: list[Row] = []
    for kind in TITLES:
        rows += run_source(folder, kind, source(folder, kind, (sizes or {}).get(kind)), repeats)
    return rows


def table(rows: Sequence[Row]) -> list[str]:
    """Return the Markdown rows."""
    base = {row.kind: row.cost for row in rows if row.target == BASE}
    lines = [
        "| source | options | GB out | bytes read / source | seconds | from - to "
        "| seconds against hf |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        wall = row.cost.wall
        lines.append(
            f"| {TITLES[row.kind]} | `{' '.join(TARGETS[row.target])}` "
            f"| {row.output_nbytes / 1e9:.2f} | {row.cost.read_chars / row.source_nbytes:.3f} "
            f"| {wall:.2f} | {spread(row.runs)} | {wall / base[row.kind].wall:.2f} |"
        )
    return lines


def named(row: Row) -> str:
    """Return what a row is of."""
    return f"{TITLES[row.kind]}, `{' '.join(TARGETS[row.target])}`"


def why_read(row: Row) -> str:
    """Return what is read beside the source."""
    beside = row.cost.read_chars - row.source_nbytes
    own = moeconv("--version").read_chars
    return (
        f"{named(row)} reads {beside / 1e6:.0f} MB more than the source holds, of which Python and "
        f"what it imports to say its version are {own / 1e6:.0f}"
    )


def why_slow(folder: Path, row: Row, base: Row) -> str:
    """Return how far runs lie apart, and what the slow one does, watched."""
    options = (*TARGETS[row.target], "--verify", "none")
    watched = profiles.profile(folder / row.kind, folder, *options)
    return (
        f"{named(row)} took {spread(row.runs)} s, {named(base)} {spread(base.runs)} s; of the "
        f"former {profiles.no_writing(watched)}"
    )


def aimed(folder: Path, rows: Sequence[Row]) -> list[Aim]:
    """Return the aims: of the worst row of each; `folder` has the sources."""
    base = {row.kind: row for row in rows if row.target == BASE}
    read = max(rows, key=lambda row: row.cost.read_chars / row.source_nbytes)
    slow = max(rows, key=lambda row: row.cost.wall / base[row.kind].cost.wall)
    return [
        Aim(
            "bytes read, times the source's, at worst",
            read.cost.read_chars / read.source_nbytes,
            1.05,
            partial(why_read, read),
            most=True,
            form=".3f",
        ),
        Aim(
            "seconds, times those of `--layout hf`, at worst",
            slow.cost.wall / base[slow.kind].cost.wall,
            1.15,
            partial(why_slow, folder, slow, base[slow.kind]),
            most=True,
        ),
    ]


def section(folder: Path, repeats: int = 3, sizes: Mapping[str, Size] | None = None) -> list[str]:
    """Return the part of docs/benchmarks.md."""
    rows = run(folder, repeats, sizes)
    return [
        "## Ranks: any number of them from one reading",
        "",
        "What splitting costs against writing the same source as one set of files: bytes read are",
        "rchar of /proc/self/io, so whatever is read twice shows, the interpreter and the",
        "libraries that it imports included. ktransformers writes the experts alone, as int8.",
        f"Medians of {repeats}, in turn, source in the page cache, output durable.",
        "",
        *table(rows),
        "",
        *aims.table(aimed(folder, rows)),
        "",
        "Commands: `moeconv convert SOURCE OUT OPTIONS --verify none`; all of it:",
        "`python -m bench --only ranks`.",
    ]
