"""The CPU kernels: GB/s on one and two threads, beside what memory allows and what peers reach."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from bench import aims, kernel_profile, plots
from bench.aims import Aim
from bench.architectures import Size
from bench.checkpoints import source
from bench.kernel_peers import QUANTIZERS, Run, installed, peers_of
from bench.kernel_probe import form_title
from bench.kernel_profile import Profiles
from bench.kt_job import THREADS, packing_rate
from bench.kt_job import python as kt_python
from moeconv.codecs import amx as amx_codec
from moeconv.measure import kernels
from moeconv.measure.cases import Case, Draw, cases
from moeconv.measure.figures import Rates
from moeconv.measure.kernels import Bench

TORCH, KT = "torch, not packed", "kt-kernel, packing"
# Title of a row -> the least share of the roofline.
SHARES: Mapping[str, float] = {
    "MXFP4": 0.75,
    "FP8, blocks of 128 x 128": 0.75,
    "packed INT4": 0.75,
    "GPTQ INT4": 0.25,
}
# Title of a row, and of a peer -> how many times as fast ours is to be.
TIMES: Mapping[tuple[str, str], float] = {
    ("MXFP4", "transformers"): 50,
    ("FP8, blocks of 128 x 128", "DeepSeek's formula"): 25,
    ("packed INT4", "compressed-tensors"): 15,
    ("GPTQ INT4", "GPTQModel's formula"): 25,
    **{(f"ggml {name}", "gguf-py"): 15.0 for name in ("Q4_K", "Q6_K", "Q8_0", "MXFP4")},
    **{(form_title(name), TORCH): 10.0 for name in amx_codec.FORMS},
    **{(form_title(name), KT): 4.0 for name in amx_codec.FORMS},
}
# What is profiled: all that has an aim.
PROFILED = tuple(dict.fromkeys([*SHARES, *(title for title, _ in TIMES)]))


class Effort(NamedTuple):
    """How much to run; a peer decodes `peer_tiles`, each once."""

    kernels: kernels.Effort = kernels.Effort()
    profile: kernel_profile.Effort = kernel_profile.Effort()
    peer_tiles: int = 8
    peer_repeats: int = 3


class Beside(NamedTuple):
    """GB/s of BF16 of a peer; on all threads where it is compared with ours on all."""

    title: str
    rate: float
    all_threads: bool = False


class Row(NamedTuple):
    """What a kernel reaches beside its peers."""

    rates: Rates
    peers: tuple[Beside, ...]

    def times(self, peer: Beside) -> float:
        """Return how many times a peer's rate ours is, on as many threads."""
        return (self.rates.all if peer.all_threads else self.rates.one) / peer.rate


def rate(runs: Sequence[Run], effort: Effort) -> float:
    """Return the GB/s of a peer on one thread, a tile each, after one that is not counted."""
    runs[0]()
    found = []
    for _ in range(effort.peer_repeats):
        start = time.perf_counter()
        for run in runs:
            run()
        found.append(time.perf_counter() - start)
    return len(runs) * effort.kernels.nbytes / median(found) / 1e9


def peer_rates(case: Case, effort: Effort) -> tuple[Beside, ...]:
    """Return what every peer that is installed reaches; each tile has its own parts."""
    found = []
    for peer in installed(peers_of(case)):
        runs = [peer.make(case.copied(), effort.kernels.tile) for _ in range(effort.peer_tiles)]
        found.append(Beside(peer.title, rate(runs, effort)))
    return tuple(found)


def encoded(bench: Bench, name: str, effort: Effort, theirs: Sequence[Beside]) -> Row:
    """Return the row of one of kt-kernel's packed forms."""
    values = torch.from_numpy(Draw().normal(*effort.kernels.tile)).to(torch.bfloat16)
    quantize = QUANTIZERS[name]
    runs = [partial(quantize, values.clone()) for _ in range(effort.peer_tiles)]
    return Row(bench.encode(name), (Beside(TORCH, rate(runs, effort)), *theirs))


def packed_by_kt(folder: Path, size: Size | None) -> dict[str, Beside]:
    """Return what kt-kernel's own packing call reaches, by form; nothing where it is not there."""
    interpreter = kt_python()
    if not interpreter:
        return {}
    root = source(folder, "qwen3-moe", size).root
    return {
        name: Beside(KT, packing_rate(root, folder, name.removeprefix("amx"), interpreter), True)
        for name in amx_codec.FORMS
    }


def run(effort: Effort, packed: Mapping[str, Beside] | None = None) -> Iterator[Row]:
    """Yield every row; peers have one thread of torch. `packed`: of kt-kernel, by form."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with kernels.bench(effort.kernels) as bench:
            for case in cases(effort.kernels.tile):
                yield Row(bench.decode(case), peer_rates(case, effort))
            for name in amx_codec.FORMS:
                theirs = [packed[name]] if packed and name in packed else []
                yield encoded(bench, name, effort, theirs)
    finally:
        torch.set_num_threads(threads)


def table(rows: Sequence[Row]) -> list[str]:
    """Return the Markdown rows."""
    lines = [
        "| | 1 thread | 2 threads | 2 / 1 | roofline | share of it | its 2 / 1 "
        "| peer | its GB/s | times it |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        found, roof = row.rates, ["", "", ""]
        one, two = found.one, found.all
        if found.roof:
            ratio = found.roof_all / found.roof
            roof = [f"{found.roof:.2f}", f"{one / found.roof:.0%}", f"{ratio:.2f}"]
        cells = [found.title, f"{one:.2f}", f"{two:.2f}", f"{two / one:.2f}", *roof]
        for peer in row.peers or (None,):
            beside = ["", "", ""]
            if peer:
                beside = [peer.title, f"{peer.rate:.3f}", f"{row.times(peer):.1f}"]
            lines.append(f"| {' | '.join([*cells, *beside])} |")
            cells = [""] * len(cells)
    return lines


def aimed(rows: Sequence[Row], profiled: Profiles) -> list[Aim]:
    """Return the aims, of the rows and peers that are there."""
    by_title = {row.rates.title: row for row in rows}
    shares = [(row, least) for title, least in SHARES.items() if (row := by_title.get(title))]
    found = [
        Aim(
            f"{row.rates.title}: share of the roofline",
            row.rates.one / row.rates.roof,
            least,
            partial(kernel_profile.why_share, profiled, row.rates.title),
            form=".0%",
        )
        for row, least in shares
    ]
    found += [
        Aim(
            f"{row.rates.title}: times {peer.title}",
            row.times(peer),
            TIMES[key],
            partial(kernel_profile.why_times, profiled, row.rates.title, peer.rate, TIMES[key]),
            form=".1f",
        )
        for row in rows
        for peer in row.peers
        if (key := (row.rates.title, peer.title)) in TIMES
    ]
    found += [
        Aim(
            f"{row.rates.title}: two threads, times one",
            row.rates.all / row.rates.one,
            1.8,
            partial(kernel_profile.why_twice, profiled, row.rates.title),
        )
        for row, _ in shares
    ]
    return found


def picture(path: Path, rows: Sequence[Row]) -> list[str]:
    """Write the plot of the shares of the roofline; return the lines that show it."""
    bars = [
        plots.Bar(row.rates.title, row.rates.one / row.rates.roof, row.rates.title in SHARES)
        for row in rows
        if row.rates.roof
    ]
    heading = "Share of the roofline, one thread; dashed: the aim for those in colour but GPTQ"
    return plots.bars(path, heading, bars, ".0%", aim=0.75)


def section(
    folder: Path, pictured: Path, effort: Effort | None = None, size: Size | None = None
) -> list[str]:
    """Return the part of docs/benchmarks.md."""
    effort = effort or Effort()
    rows = list(run(effort, packed_by_kt(folder, size)))
    profiled = kernel_profile.run(PROFILED, effort.profile)
    told = (
        f"kt-kernel packs a layer of experts on {THREADS} threads and is beside ours on 2."
        if kt_python()
        else "kt-kernel did not run: MOECONV_KT_PYTHON names no Python that has it."
    )
    ours = effort.kernels
    held, moved = ours.tiles * ours.nbytes, ours.passes * ours.tiles * ours.nbytes
    return [
        "## Kernels on the CPU",
        "",
        f"GB/s of BF16 output (of BF16 input where a kernel quantizes): {moved / 1e6:.0f} MB per",
        f"run through {ours.tiles} tiles that hold {held / 1e6:.0f} MB and as many inputs,",
        f"medians of {ours.repeats}, in turn with the roofline. The roofline is a compiled loop",
        "that reads as many bits per value and writes the same tiles with regular",
        "stores, and does nothing else: 4-bit formats read n bytes and write 4 n, 8-bit ones 2 n;",
        "up to 5 bits count as 4, up to 8 as 8. Peers run on one thread on",
        f"{effort.peer_tiles * ours.nbytes / 1e6:.0f} MB, a tile at a time whose result they",
        f"allocate and that may stay in the cache, medians of {effort.peer_repeats}.",
        "gguf-py gives float32 and counts two bytes per value like the others, so ratios are of",
        "values per second. transformers' formula turns its result. DeepSeek's, GPTQModel's,",
        "AutoAWQ's and bitsandbytes' formulas are those of their repositories, stated anew in",
        "torch; torch and plain torch are one-liners and the readable references of codecs/.",
        told,
        "",
        *table(rows),
        "",
        *picture(pictured / "kernels.svg", rows),
        "",
        *aims.table(aimed(rows, profiled)),
        "",
        *kernel_profile.section(profiled),
        "",
        "All of it: `python -m bench --only kernels`.",
    ]
