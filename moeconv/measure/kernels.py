"""The CPU kernels at work: GB/s on one and on several threads, in turn with the roofline."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from statistics import median
from typing import NamedTuple

import numpy as np
import xxhash

from moeconv.codecs.amx import FORMS
from moeconv.codecs.base import Window
from moeconv.kernels.cpu import KERNELS, amx, copy_into
from moeconv.kernels.cpu.base import Array
from moeconv.kernels.cpu.roofline import OUTPUT_BITS, ROOFS, read_nbytes, roof_bits
from moeconv.measure.cases import Case, Draw, Tile
from moeconv.measure.figures import COPY, DIGEST, TRANSPOSE, Rates

TURNED_COLS = 2880  # of gpt-oss
Work = Callable[[int], object]  # on the tile of an index


class Effort(NamedTuple):
    """How much to run: `tiles` are gone through `passes` times."""

    tile: Tile = Tile(1024, 2048)  # 4 MiB of BF16
    tiles: int = 32
    passes: int = 2
    repeats: int = 5
    threads: int = 2

    @property
    def nbytes(self) -> int:
        """The bytes of BF16 of one tile."""
        return self.tile.rows * self.tile.cols * 2


class Bench:
    """The tiles that every kernel writes to, and the clock."""

    def __init__(self, effort: Effort, pool: ThreadPoolExecutor) -> None:
        self.effort = effort
        tile = effort.tile
        self.outs = [np.zeros((tile.rows, tile.cols), np.uint16) for _ in range(effort.tiles)]
        self._pool = pool

    def rate(self, work: Work, threads: int = 1) -> float:
        """Return the GB/s of going through all tiles `passes` times."""
        whole = range(self.effort.tiles)

        def run(first: int) -> None:
            if threads > 1:
                keep_apart(first)
            for _ in range(self.effort.passes):
                for index in whole[first::threads]:
                    work(index)

        start = time.perf_counter()
        if threads == 1:
            run(0)
        else:
            list(self._pool.map(run, range(threads)))
        seconds = time.perf_counter() - start
        return self.effort.passes * self.effort.tiles * self.effort.nbytes / seconds / 1e9

    def rates(self, works: Sequence[Work]) -> list[float]:
        """Return the medians of all works on one thread, then of all on all threads.

        In turn, after a pass over the tiles that is not counted.
        """
        for work in works:
            for index in range(self.effort.tiles):
                work(index)
        turns = [(work, threads) for threads in (1, self.effort.threads) for work in works]
        runs = [[self.rate(*one) for one in turns] for _ in range(self.effort.repeats)]
        return [median(found) for found in zip(*runs, strict=True)]

    def roof(self, bits: int) -> Work:
        """Return the loop that reads `bits` per value and writes the tiles."""
        nbytes = read_nbytes(bits, self.effort.nbytes)
        given = [np.ones(nbytes, np.uint8) for _ in self.outs]
        outs = [out.reshape(-1).view(np.uint8) for out in self.outs]
        return lambda index: ROOFS[bits](given[index], outs[index])

    def decode(self, case: Case) -> Rates:
        """Return the rates of a case."""
        tile = self.effort.tile
        window = Window(0, tile.rows, 0, tile.cols)
        copies = [case.copied().parts for _ in self.outs]
        kernel = KERNELS[case.kernel]

        def work(index: int) -> object:
            return kernel(copies[index], window, case.params, "BF16", self.outs[index])

        roof, one, roof_all, every = self.rates([self.roof(roof_bits(case.bits)), work])
        return Rates(case.title, one, every, roof, roof_all)

    def encode(self, name: str) -> Rates:
        """Return the rates of one of kt-kernel's packed forms, of its BF16 input."""
        form, tile = FORMS[name], self.effort.tile
        bits = (Draw().normal(*tile).view(np.uint32) >> 16).astype(np.uint16)
        given = [bits.copy() for _ in self.outs]
        packed = [np.zeros(form.nbytes(*tile), np.uint8) for _ in self.outs]
        scales = [np.zeros(tile.rows, np.float32) for _ in self.outs]

        def work(index: int) -> object:
            return amx.encode(given[index], form, scales[index], packed[index])

        one, every = self.rates([work])
        return Rates(f"{form.name}: quantize and pack", one, every)

    def work(self, name: str) -> Rates:
        """Return the rates of what conversions do to decoded bytes: DOING[name]."""
        title, act = DOING[name]
        given = [out.copy() for out in self.outs]
        one, every = self.rates([lambda index: act(given[index], self.outs[index])])
        return Rates(title, one, every)

    def memory(self, bits: int) -> Rates:
        """Return the rates of a roofline."""
        one, every = self.rates([self.roof(bits)])
        return Rates(f"{bits} bits to {OUTPUT_BITS}", one, every)


def keep_apart(thread: int) -> None:
    """Keep the thread that calls on a core of its own, as far as there are as many.

    A run is over before the system has spread threads that wake at once on one core.
    """
    if hasattr(os, "sched_setaffinity"):  # Linux
        cores = sorted(os.sched_getaffinity(os.getpid()))
        os.sched_setaffinity(0, {cores[thread % len(cores)]})


def _digest(source: Array, out: Array) -> None:
    xxhash.xxh3_128(source.data).digest()


def _copy(source: Array, out: Array) -> None:
    """Copy the left and the right half of each row: rows of many ranks are no single run."""
    middle = source.shape[1] // 2
    copy_into(out[:, :middle], source[:, :middle])
    copy_into(out[:, middle:], source[:, middle:])


def _transpose(source: Array, out: Array) -> None:
    """Turn a matrix of TURNED_COLS columns: at a power of two its rows would share cache sets."""
    cols = min(TURNED_COLS, source.size)
    whole = source.size // cols * cols
    taken, given = source.reshape(-1)[:whole], out.reshape(-1)[:whole]
    copy_into(given.reshape(cols, -1), taken.reshape(-1, cols).T)


# What a conversion does beside decoding: title, and the work on arrays [rows, cols] of 16 bits.
DOING: Mapping[str, tuple[str, Callable[[Array, Array], None]]] = {
    COPY: ("copying rows", _copy),
    TRANSPOSE: ("transposing", _transpose),
    DIGEST: ("digests", _digest),
}


@contextmanager
def bench(effort: Effort) -> Iterator[Bench]:
    """Yield what measures with this effort; its threads end with it."""
    with ThreadPoolExecutor(effort.threads) as pool:
        yield Bench(effort, pool)
