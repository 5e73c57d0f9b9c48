"""What a codec is, and the one rule that says which stored elements a window of a weight needs.

A weight is a matrix [rows, cols]. Each part covers it with tiles: one tile of `rows` x `cols`
elements is described by `elements` stored elements that lie side by side along the cols axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import lcm
from typing import TYPE_CHECKING, NamedTuple, Protocol

from moeconv.types import Params, Span, TensorRef, Weight, element_count

if TYPE_CHECKING:
    import torch


class Tile(NamedTuple):
    """How much of the weight `elements` stored elements of a part cover; None: the whole axis.

    `axes`: "rc" where the part is stored [rows, cols], "cr" where it is stored [cols, rows], "c"
    and "r" for a vector along one axis. `inner`: trailing dimensions of the header shape that hold
    the `elements` ((16,) for MXFP4 blocks); () where they lie in the last axis itself.
    `pack_rows`: stored elements along rows per `rows` tile (zero points packed along rows).
    `optional`: the part may be absent.
    """

    dtypes: tuple[str, ...]
    rows: int | None = 1
    cols: int | None = 1
    axes: str = "rc"
    elements: int = 1
    inner: tuple[int, ...] = ()
    pack_rows: int = 1
    optional: bool = False


class QuantScheme(NamedTuple):
    """What a config says of the quantization of one module.

    `method`: quant_method ("" where the config has none); `values`: the method's own fields for
    this module (bits, group_size, weight_block_size, ...), targets and overrides resolved.
    """

    method: str
    values: Params


class Codec(Protocol):
    """How the numbers of a weight are written into its parts."""

    @property
    def name(self) -> str: ...

    @property
    def reference_nbytes(self) -> int:
        """Return the bytes per element that `decode` holds at once, its result among them.

        Counted of a row and a column more than the window has, for what it makes along either.
        """
        ...

    def tiles(self, params: Params) -> Mapping[str, Tile]:
        """Return the tile of every part."""
        ...

    def detect(self, found: Mapping[str, TensorRef], scheme: QuantScheme) -> Params | None:
        """Return the codec's parameters if exactly these parts are its own, else None.

        Decides from part names, dtypes, ranks and the config; never from ratios of shapes.
        """
        ...

    def shape(self, found: Mapping[str, TensorRef], params: Params) -> tuple[int, ...]:
        """Return the decoded shape [..., rows, cols], in the orientation that is stored."""
        ...

    def decode(
        self, parts: Mapping[str, torch.Tensor], window: Window, params: Params
    ) -> torch.Tensor:
        """Return float32 [rows, cols] of a block-aligned window: the readable reference.

        `parts`: each [row tiles, col tiles * elements] (transposed for axes "cr"), as stored.
        """
        ...


class Window(NamedTuple):
    """Rows [row_start, row_stop) x cols [col_start, col_stop) of a weight."""

    row_start: int
    row_stop: int
    col_start: int
    col_stop: int

    @property
    def rows(self) -> int:
        return self.row_stop - self.row_start

    @property
    def cols(self) -> int:
        return self.col_stop - self.col_start

    @property
    def turned(self) -> Window:
        """Return the same of a weight whose rows are stored as columns."""
        return Window(self.col_start, self.col_stop, self.row_start, self.row_stop)


class PartSlice(NamedTuple):
    """The stored elements of one slot of a part that a window needs: a 2-D slice [major, minor].

    `extent` is the whole slot's [major, minor]; minor runs side by side in memory.
    """

    extent: tuple[int, int]
    major: Span
    minor: Span


def stored_count(length: int, tile: int | None, count: int = 1) -> int:
    """Return how many stored elements cover `length` elements of an axis."""
    if tile is None:
        return count
    return -(-length * count // tile)


def extent_of(tile: Tile, rows: int, cols: int) -> tuple[int, int]:
    """Return the [row, col] stored extent of one slot of a part, before any transposition."""
    along_rows = 1 if tile.axes == "c" else stored_count(rows, tile.rows, tile.pack_rows)
    along_cols = 1 if tile.axes == "r" else stored_count(cols, tile.cols, tile.elements)
    return along_rows, along_cols


def header_shapes(
    tile: Tile, rows: int, cols: int, *, transposed: bool = False
) -> tuple[tuple[int, ...], ...]:
    """Return the header shapes (of one slot) that are right for a part, the usual one first."""
    along_rows, along_cols = extent_of(tile, rows, cols)
    if tile.axes in ("r", "c"):
        length = along_rows if tile.axes == "r" else along_cols
        return ((length, *tile.inner), (length // max(element_count(tile.inner), 1), *tile.inner))
    cols_axis: tuple[int, ...] = (along_cols,)
    if tile.inner:
        cols_axis = (along_cols // element_count(tile.inner), *tile.inner)
    flipped = (tile.axes == "cr") != transposed
    full = (*cols_axis, along_rows) if flipped else (along_rows, *cols_axis)
    shapes = [full]
    if tile.rows is None and tile.cols is None:
        shapes += [(1,), ()]  # one number for the whole weight
    elif tile.cols is None and tile.elements == 1:
        shapes.append((along_rows,))  # one number per row, without the axis of length 1
    return tuple(shapes)


def block_of(tiles: Sequence[Tile], rows: int, cols: int) -> tuple[int, int]:
    """Return the block: the smallest rows x cols that every tile divides (or the whole axis)."""
    block_rows = block_cols = 1
    for tile in tiles:
        if tile.axes != "c":
            block_rows = lcm(block_rows, tile.rows or 1) if tile.rows else block_rows
        if tile.axes != "r":
            block_cols = lcm(block_cols, tile.cols or 1) if tile.cols else block_cols
    return min(block_rows, max(rows, 1)), min(block_cols, max(cols, 1))


def grow(window: Window, block: tuple[int, int], rows: int, cols: int) -> Window:
    """Return the smallest block-aligned window around `window`, clamped to the weight."""
    block_rows, block_cols = block
    return Window(
        window.row_start // block_rows * block_rows,
        min(-(-window.row_stop // block_rows) * block_rows, rows),
        window.col_start // block_cols * block_cols,
        min(-(-window.col_stop // block_cols) * block_cols, cols),
    )


def part_slice(tile: Tile, window: Window, weight: Weight) -> PartSlice:
    """Return the stored slice of a part that a block-aligned window needs."""
    along_rows, along_cols = extent_of(tile, weight.rows, weight.cols)
    rows = _stored_span(window.row_start, window.row_stop, tile.rows, tile.pack_rows, along_rows)
    cols = _stored_span(window.col_start, window.col_stop, tile.cols, tile.elements, along_cols)
    if tile.axes == "c":
        rows = Span(0, 1)
    if tile.axes == "r":
        cols = Span(0, 1)
    if (tile.axes == "cr") != weight.transposed and tile.axes in ("rc", "cr"):
        return PartSlice((along_cols, along_rows), cols, rows)
    return PartSlice((along_rows, along_cols), rows, cols)


def _stored_span(start: int, stop: int, tile: int | None, count: int, extent: int) -> Span:
    if tile is None:
        return Span(0, extent)
    return Span(start * count // tile, min(-(-stop * count // tile), extent))
