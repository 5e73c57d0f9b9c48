"""Windows decoded in strips: a tile that stays in the caches, turned from there to its place.

A kernel writes along the lines that its parts are stored in. Where the output runs across them
no other memory than a tile is needed, and none but the parts and the output is passed through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import lcm
from typing import Any, NamedTuple

import numpy.typing as npt

from moeconv.codecs import CODECS, weight_block
from moeconv.codecs.base import Window, part_slice
from moeconv.kernels.cpu import Counts, copy_into
from moeconv.kernels.cpu.copies import CLASHING_NBYTES, LINE_NBYTES
from moeconv.store.buffers import BufferPool
from moeconv.types import Weight

Array = npt.NDArray[Any]
# parts, window, output: a kernel with what is the same for all strips of a window
Decode = Callable[[Mapping[str, Array], Window, Array], Counts]

TILE_NBYTES = 3 << 20  # larger ones leave the caches, smaller ones are more calls
FEWEST_LINES = 32  # turned they fill whole cache lines, of 2 bytes and of 4


class Tile(NamedTuple):
    """Memory for `lines` lines of `length` elements, `pitch` bytes apart."""

    lines: int
    length: int
    pitch: int

    @property
    def nbytes(self) -> int:
        return self.lines * self.pitch


def tile_of(weight: Weight, window: Window, itemsize: int) -> Tile:
    """Return the tile for the strips of a window, which begin on blocks."""
    lines, length = _stored(weight, window)
    unit = lcm(weight_block(weight)[weight.transposed], FEWEST_LINES)
    pitch = length * itemsize
    pitch += 0 if pitch % CLASHING_NBYTES else LINE_NBYTES
    step = max(TILE_NBYTES // pitch // unit, 1) * unit
    return Tile(min(step, lines), length, pitch)


def strips(weight: Weight, window: Window, lines: int) -> Iterator[Window]:
    """Yield a window in runs of lines: of rows, of columns where these are stored as lines."""
    first = window.col_start if weight.transposed else window.row_start
    last = first + _stored(weight, window)[0]
    for start in range(first, last, lines):
        stop = min(start + lines, last)
        if weight.transposed:
            yield window._replace(col_start=start, col_stop=stop)
        else:
            yield window._replace(row_start=start, row_stop=stop)


def parts_of(
    weight: Weight, parts: Mapping[str, Array], window: Window, strip: Window
) -> dict[str, Array]:
    """Return what a strip needs of a window's parts, which are [major, minor]."""
    tiles = CODECS[weight.codec].tiles(weight.params)
    given = {}
    for part, array in parts.items():
        whole, cut = (part_slice(tiles[part], one, weight) for one in (window, strip))
        major, minor = cut.major.start - whole.major.start, cut.minor.start - whole.minor.start
        given[part] = array[major : major + cut.major.length, minor : minor + cut.minor.length]
    return given


def decode_in_strips(
    decode: Decode,
    weight: Weight,
    parts: Mapping[str, Array],
    window: Window,
    out: Array,
    pool: BufferPool,
) -> Counts:
    """Fill out [lines, length], of any strides, with a window; return what it holds."""
    tile = tile_of(weight, window, out.itemsize)
    total, done = Counts(0, 0, 0), 0
    with pool.take(tile.nbytes) as memory:
        bytes_of_lines = memory.array.reshape(tile.lines, tile.pitch)
        decoded = bytes_of_lines[:, : tile.length * out.itemsize].view(out.dtype)
        for strip in strips(weight, window, tile.lines):
            lines = _stored(weight, strip)[0]
            found = decode(parts_of(weight, parts, window, strip), strip, decoded[:lines])
            copy_into(out[done : done + lines], decoded[:lines])
            total = total.plus(found)
            done += lines
    return total


def _stored(weight: Weight, window: Window) -> tuple[int, int]:
    """Return how many lines a window has as it is stored, and how long they are."""
    shape = (window.rows, window.cols)
    return shape[::-1] if weight.transposed else shape
