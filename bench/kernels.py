"""The CPU kernels: GB/s on one and two threads, beside what memory allows and what peers reach."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch

from bench.kernel_peers import Run, installed, peers_of
from moeconv.codecs import amx as amx_codec
from moeconv.measure import kernels
from moeconv.measure.cases import Case, Draw, cases
from moeconv.measure.figures import Rates
from moeconv.measure.kernels import Bench


class Effort(NamedTuple):
    """How much to run; a peer decodes `peer_tiles`, each once."""

    kernels: kernels.Effort = kernels.Effort()
    peer_tiles: int = 8
    peer_repeats: int = 3


class Row(NamedTuple):
    """What a kernel reaches beside its peers: title and GB/s of BF16 of each."""

    rates: Rates
    peers: tuple[tuple[str, float], ...]


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


def peer_rates(case: Case, effort: Effort) -> tuple[tuple[str, float], ...]:
    """Return title and GB/s of every peer that is installed; each tile has its own parts."""
    found = []
    for peer in installed(peers_of(case)):
        runs = [peer.make(case.copied(), effort.kernels.tile) for _ in range(effort.peer_tiles)]
        found.append((peer.title, rate(runs, effort)))
    return tuple(found)


def encoded(bench: Bench, name: str, effort: Effort) -> Row:
    """Return the row of one of kt-kernel's packed forms."""
    values = Draw().normal(*effort.kernels.tile).view(np.uint32) & np.uint32(0xFFFF0000)
    floats, form = values.view(np.float32), amx_codec.FORMS[name]
    peer = rate([lambda: amx_codec.encode(floats, form)] * effort.peer_tiles, effort)
    return Row(bench.encode(name), (("plain numpy", peer),))


def run(effort: Effort) -> Iterator[Row]:
    """Yield every row; peers have one thread of torch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with kernels.bench(effort.kernels) as bench:
            for case in cases(effort.kernels.tile):
                yield Row(bench.decode(case), peer_rates(case, effort))
            for name in amx_codec.FORMS:
                yield encoded(bench, name, effort)
    finally:
        torch.set_num_threads(threads)


def table(rows: Iterator[Row]) -> list[str]:
    """Return the Markdown rows."""
    lines = [
        "| | 1 thread | 2 threads | 2 / 1 | roofline | share of it | its 2 / 1 "
        "| peer | its GB/s | times it |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for found, peers in rows:
        one, two, roof = found.one, found.all, ["", "", ""]
        if found.roof:
            ratio = found.roof_all / found.roof
            roof = [f"{found.roof:.2f}", f"{one / found.roof:.0%}", f"{ratio:.2f}"]
        cells = [found.title, f"{one:.2f}", f"{two:.2f}", f"{two / one:.2f}", *roof]
        for title, peer in peers or (("", 0.0),):
            beside = [title, f"{peer:.3f}", f"{one / peer:.0f}"] if peer else ["", "", ""]
            lines.append(f"| {' | '.join([*cells, *beside])} |")
            cells = [""] * len(cells)
    return lines


def section(folder: Path, effort: Effort | None = None) -> list[str]:
    """Return the part of docs/benchmarks.md; `folder` is not used."""
    effort = effort or Effort()
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
        "up to 5 bits count as 4, up to 8 as 8. Where it gains as little from a second thread,",
        "memory or the machine is the limit, not the kernel. Peers run on one thread on",
        f"{effort.peer_tiles * ours.nbytes / 1e6:.0f} MB, a tile at a time whose result they",
        f"allocate and that may stay in the cache, medians of {effort.peer_repeats}.",
        "gguf-py gives float32 and counts two bytes per value like the others, so ratios are of",
        "values per second; transformers' formula turns its result; plain torch and numpy are the",
        "readable references of moeconv/codecs. Aims: at least 75 % of the roofline for MXFP4,",
        "FP8 and INT4, 25 % for GPTQ; 1.8 times as much on 2 threads; 50 times transformers for",
        "MXFP4, 15 times compressed-tensors for packed INT4, 15 times gguf-py.",
        "",
        *table(run(effort)),
        "",
        "All of it: `python -m bench --only kernels`.",
    ]
