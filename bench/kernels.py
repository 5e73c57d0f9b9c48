"""The CPU kernels: GB/s on one and two threads, beside what memory allows and what peers reach."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
import torch

from bench.kernel_cases import Case, Draw, Tile, cases
from bench.kernel_peers import Run, installed
from moeconv.codecs import amx as amx_codec
from moeconv.codecs.base import Window
from moeconv.kernels.cpu import KERNELS, amx

Array = npt.NDArray[Any]
Work = Callable[[int], object]  # on the tile of an index


class Effort(NamedTuple):
    """How much to run: `tiles` are gone through `passes` times, a peer decodes `peer_tiles`."""

    tile: Tile = Tile(1024, 2048)  # 4 MiB of BF16
    tiles: int = 32
    passes: int = 2
    repeats: int = 5
    peer_tiles: int = 8
    peer_repeats: int = 3

    @property
    def nbytes(self) -> int:
        """The bytes of BF16 of one tile."""
        return self.tile.rows * self.tile.cols * 2


class Row(NamedTuple):
    """GB/s of BF16; roofs 0 where none was measured; `peers`: title and GB/s."""

    title: str
    one: float
    two: float
    roof: float
    roof_two: float
    peers: tuple[tuple[str, float], ...]


def _expand4(source: Array, out: Array) -> None:
    """Write four bytes for every byte."""
    for i in range(source.size):
        out[i] = np.uint32(source[i]) * np.uint32(0x01010101)


def _expand8(source: Array, out: Array) -> None:
    """Write two bytes for every byte."""
    for i in range(source.size):
        out[i] = np.uint16(source[i]) << np.uint16(8)


def _copy16(source: Array, out: Array) -> None:
    """Write two bytes for every two bytes."""
    for i in range(source.size):
        out[i] = source[i] ^ np.uint16(1)


def _narrow32(source: Array, out: Array) -> None:
    """Write two bytes for every four bytes."""
    for i in range(source.size):
        out[i] = source[i] >> np.uint32(16)


class Roof(NamedTuple):
    """A loop that only moves memory: elements read and written."""

    loop: Callable[[Array, Array], None]
    read: type[np.unsignedinteger[Any]]
    write: type[np.unsignedinteger[Any]]


_compile = numba.njit(nogil=True)
ROOFS = {
    4: Roof(_compile(_expand4), np.uint8, np.uint32),
    8: Roof(_compile(_expand8), np.uint8, np.uint16),
    16: Roof(_compile(_copy16), np.uint16, np.uint16),
    32: Roof(_compile(_narrow32), np.uint32, np.uint16),
}


def roof_bits(bits: int) -> int:
    """Return the roof of a format: the next wider one, except that up to 5 bits take 4."""
    return 4 if bits <= 5 else next(wide for wide in ROOFS if bits <= wide)


def _copied(case: Case) -> Case:
    """Return the case with parts in memory of its own."""
    return case._replace(parts={part: array.copy() for part, array in case.parts.items()})


class Bench:
    """The tiles that every kernel writes to, and the clock."""

    def __init__(self, effort: Effort) -> None:
        self.effort = effort
        tile = effort.tile
        self.outs = [np.zeros((tile.rows, tile.cols), np.uint16) for _ in range(effort.tiles)]
        self.pool = ThreadPoolExecutor(2)

    def rate(self, work: Work, threads: int = 1) -> float:
        """Return the GB/s of going through all tiles `passes` times."""
        whole = range(self.effort.tiles)

        def run(first: int) -> None:
            for _ in range(self.effort.passes):
                for index in whole[first::threads]:
                    work(index)

        start = time.perf_counter()
        if threads == 1:
            run(0)
        else:
            list(self.pool.map(run, range(threads)))
        seconds = time.perf_counter() - start
        return self.effort.passes * self.effort.tiles * self.effort.nbytes / seconds / 1e9

    def rates(self, works: Sequence[tuple[Work, int]]) -> list[float]:
        """Return the medians of several (work, threads), in turn, after a pass over the tiles."""
        for work, _ in works:
            for index in range(self.effort.tiles):
                work(index)
        runs = [[self.rate(*one) for one in works] for _ in range(self.effort.repeats)]
        return [median(found) for found in zip(*runs, strict=True)]

    def peer(self, runs: Sequence[Run]) -> float:
        """Return the GB/s of a peer on one thread, a tile each, after one that is not counted."""
        runs[0]()
        found = []
        for _ in range(self.effort.peer_repeats):
            start = time.perf_counter()
            for run in runs:
                run()
            found.append(time.perf_counter() - start)
        return len(runs) * self.effort.nbytes / median(found) / 1e9

    def peers(self, case: Case) -> tuple[tuple[str, float], ...]:
        """Return title and GB/s of every peer that is installed; each tile has its own parts."""
        found = []
        for peer in installed(case.peers):
            runs = [
                peer.make(_copied(case), self.effort.tile) for _ in range(self.effort.peer_tiles)
            ]
            found.append((peer.title, self.peer(runs)))
        return tuple(found)

    def roof(self, bits: int) -> Work:
        """Return the loop that reads `bits` per value and writes the tiles."""
        roof, width = ROOFS[bits], 16
        nbytes = self.effort.nbytes * bits // width
        given = [np.ones(nbytes, np.uint8).view(roof.read) for _ in self.outs]
        outs = [out.reshape(-1).view(roof.write) for out in self.outs]
        return lambda index: roof.loop(given[index], outs[index])

    def decode(self, case: Case) -> Row:
        """Return the row of a case."""
        tile = self.effort.tile
        window = Window(0, tile.rows, 0, tile.cols)
        copies = [_copied(case).parts for _ in self.outs]
        kernel = KERNELS[case.kernel]

        def work(index: int) -> object:
            return kernel(copies[index], window, case.params, "BF16", self.outs[index])

        roof = self.roof(roof_bits(case.bits))
        works = [(roof, 1), (work, 1), (roof, 2), (work, 2)]
        reached, one, reached_two, two = self.rates(works)
        return Row(case.title, one, two, reached, reached_two, self.peers(case))

    def encode(self, name: str) -> Row:
        """Return the row of one of kt-kernel's packed forms."""
        form, tile = amx_codec.FORMS[name], self.effort.tile
        values = Draw().normal(*tile)
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)
        floats = (bits.astype(np.uint32) << 16).view(np.float32)
        given = [bits.copy() for _ in self.outs]
        packed = [np.zeros(form.nbytes(*tile), np.uint8) for _ in self.outs]
        scales = [np.zeros(tile.rows, np.float32) for _ in self.outs]

        def work(index: int) -> object:
            return amx.encode(given[index], form, scales[index], packed[index])

        one, two = self.rates([(work, 1), (work, 2)])
        peer = self.peer([lambda: amx_codec.encode(floats, form)] * self.effort.peer_tiles)
        return Row(f"{form.name}: quantize and pack", one, two, 0.0, 0.0, (("plain numpy", peer),))


def run(effort: Effort) -> Iterator[Row]:
    """Yield every row; peers have one thread of torch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    bench = Bench(effort)
    try:
        for case in cases(effort.tile):
            yield bench.decode(case)
        for name in amx_codec.FORMS:
            yield bench.encode(name)
    finally:
        bench.pool.shutdown()
        torch.set_num_threads(threads)


def table(rows: Iterator[Row]) -> list[str]:
    """Return the Markdown rows."""
    lines = [
        "| | 1 thread | 2 threads | 2 / 1 | roofline | share of it | its 2 / 1 "
        "| peer | its GB/s | times it |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        roof = ["", "", ""]
        if row.roof:
            ratio = row.roof_two / row.roof
            roof = [f"{row.roof:.2f}", f"{row.one / row.roof:.0%}", f"{ratio:.2f}"]
        cells = [row.title, f"{row.one:.2f}", f"{row.two:.2f}", f"{row.two / row.one:.2f}", *roof]
        for title, rate in row.peers or (("", 0.0),):
            beside = [title, f"{rate:.3f}", f"{row.one / rate:.0f}"] if rate else ["", "", ""]
            lines.append(f"| {' | '.join([*cells, *beside])} |")
            cells = [""] * len(cells)
    return lines


def section(folder: Path, effort: Effort | None = None) -> list[str]:
    """Return the part of docs/benchmarks.md; `folder` is not used."""
    effort = effort or Effort()
    held, moved = effort.tiles * effort.nbytes, effort.passes * effort.tiles * effort.nbytes
    return [
        "## Kernels on the CPU",
        "",
        f"GB/s of BF16 output (of BF16 input where a kernel quantizes): {moved / 1e6:.0f} MB per",
        f"run through {effort.tiles} tiles that hold {held / 1e6:.0f} MB and as many inputs,",
        f"medians of {effort.repeats}, in turn with the roofline. The roofline is a compiled loop",
        "that reads as many bits per value and writes the same tiles with regular",
        "stores, and does nothing else: 4-bit formats read n bytes and write 4 n, 8-bit ones 2 n;",
        "up to 5 bits count as 4, up to 8 as 8. Where it gains as little from a second thread,",
        "memory or the machine is the limit, not the kernel. Peers run on one thread on",
        f"{effort.peer_tiles * effort.nbytes / 1e6:.0f} MB, a tile at a time whose result they",
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
