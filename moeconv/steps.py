"""A task in pieces that fit in memory: runs of rows (of columns, where the output is transposed).

Pieces come in the order of the bytes that they write, so that a region's digest is taken in one
pass; the digests do not depend on how small the pieces are.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm
from typing import NamedTuple

from moeconv.arrange import OutFile
from moeconv.codecs import CODECS
from moeconv.codecs.amx import packed_rows
from moeconv.codecs.base import Window, block_of
from moeconv.decoding import TOLD_THEIR_DTYPE, has_kernel, is_copy
from moeconv.kernels.cpu.scratch import RULES
from moeconv.layouts.base import Draft
from moeconv.parts import PartRead, part_reads
from moeconv.rects import Rect
from moeconv.store import direct, reader, writer
from moeconv.store.buffers import PAGE_NBYTES, size_class
from moeconv.strips import tile_of
from moeconv.tasks import Region, Task
from moeconv.types import DTYPE_BITS, Span, Weight

CONSTANT_TIMES = 3  # a constant's bytes, and its elements in float32


class Piece(NamedTuple):
    """What is in memory at once: a window per member, and (index of the region, its part)."""

    windows: tuple[Window, ...]
    regions: tuple[tuple[int, Region], ...]


class Work(NamedTuple):
    """A task with what it refers to."""

    task: Task
    weights: tuple[Weight, ...]  # of its members
    files: Sequence[OutFile]

    @property
    def transposed(self) -> bool:
        return any(
            self.files[region.file].tensors[region.tensor].draft.transposed
            for region in self.task.regions
        )

    def line_nbytes(self, region: Region) -> int:
        """Return the bytes of one row of a region's output matrix."""
        return region.nbytes // max(region.stop - region.start, 1)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Return the dtypes that the task writes: every piece is decoded to all of them.

        So the experts' NaN are counted whichever regions a run writes, in however many pieces.
        """
        return tuple(sorted({self.dtype(region) for region in self.task.regions}))

    @property
    def first_row(self) -> int:
        """Return the row of its members at which the task begins."""
        return self.task.members[0].rows.start

    def dtype(self, region: Region) -> str:
        """Return the dtype that a region is written in, or encoded from."""
        return self.draft(region).decoded

    def draft(self, region: Region) -> Draft:
        """Return the draft of the tensor that a region is a part of."""
        return self.files[region.file].tensors[region.tensor].draft


def lent_nbytes(nbytes: int) -> int:
    """Return the most memory that a pool takes for a buffer, at any phase."""
    return size_class(nbytes + PAGE_NBYTES - 1)


def piece_nbytes(work: Work, piece: Piece) -> int:
    """Return the most bytes that a piece has in memory: parts, decoded values, regions, scratch."""
    total = beside = written = 0  # beside: what reading or writing takes at once
    for _, region in piece.regions:
        total += _region_nbytes(work, piece, region)
        written = max(written, region.nbytes)
    for member, weight, window in zip(work.task.members, work.weights, piece.windows, strict=True):
        reads = part_reads(weight, member.slot, window)
        for read in reads:
            total += lent_nbytes(read.nbytes)
        beside = max(beside, _reading_nbytes(reads))
        total += _decoding_nbytes(work, weight, window, reads)
    if written >= writer.DIRECT_MIN_NBYTES:
        beside = max(beside, _bounce_nbytes(written, writer.BOUNCE_NBYTES))
    return total + beside


def _bounce_nbytes(nbytes: int, most: int) -> int:
    """Return what goes by way of a bounce: past the page cache, what lies not as its pages do."""
    return lent_nbytes(min(most, nbytes + 2 * PAGE_NBYTES))


def _reading_nbytes(reads: Sequence[PartRead]) -> int:
    """Return the most memory that the reader takes: bounces, and what it reads to throw away."""
    spans = [read.scratch_nbytes for read in reads if read.scratch_nbytes]
    ranges = [read.nbytes for read in reads if not read.scratch_nbytes]
    gaps = sum(ranges) // direct.LEAST_WANTED if len(ranges) > 1 else 0
    total = max(map(lent_nbytes, spans), default=0)
    most = max(sum(ranges) + gaps, *spans, 0)
    if most >= reader.DIRECT_MIN_NBYTES:
        return total + _bounce_nbytes(most, reader.BOUNCE_NBYTES)
    return total + (lent_nbytes(gaps) if gaps else 0)


def _region_nbytes(work: Work, piece: Piece, region: Region) -> int:
    """Return what a region takes beside what its members were read or decoded to."""
    draft = work.draft(region)
    if draft.constant is not None:
        return region.nbytes * CONSTANT_TIMES
    if draft.encode:
        (rect,) = region.rects
        turned = work.weights[rect.member].transposed
        values = rect.rows.length * rect.cols.length * DTYPE_BITS[draft.decoded] // 8
        return lent_nbytes(region.nbytes) + (lent_nbytes(values) if turned else 0)
    return 0 if lies_ready(work, piece, region) else lent_nbytes(region.nbytes)


def lies_ready(work: Work, piece: Piece, region: Region) -> bool:
    """Return whether a region is all of the lines that its one member was read or decoded to."""
    if len(region.rects) != 1:
        return False
    (rect,), draft = region.rects, work.draft(region)
    weight, window = work.weights[rect.member], piece.windows[rect.member]
    along_columns = work.transposed and has_kernel(weight)
    if is_copy(weight, draft.dtype):
        along_columns = weight.transposed
    line, whole = rect.cols.length, window.cols
    if along_columns:
        line, whole = rect.rows.length, window.rows
    filled = rect.rows.length * rect.cols.length * DTYPE_BITS[draft.dtype] // 8
    return (
        along_columns == draft.transposed
        and rect.rows.step == 1
        and line == whole
        and filled == region.nbytes
    )


def _decoding_nbytes(work: Work, weight: Weight, window: Window, reads: Sequence[PartRead]) -> int:
    """Return what a window's values take, and what is needed to make them."""
    dtypes = [dtype for dtype in work.dtypes if not is_copy(weight, dtype)]
    if not dtypes:
        return 0
    elements = window.rows * window.cols
    total = sum(lent_nbytes(elements * DTYPE_BITS[dtype] // 8) for dtype in dtypes)
    if not has_kernel(weight):
        held = CODECS[weight.codec].reference_nbytes * (window.rows + 1) * (window.cols + 1)
        return total + held + sum(read.nbytes for read in reads)  # copies of what lies turned
    if work.transposed != weight.transposed:
        tiles = (tile_of(weight, window, DTYPE_BITS[dtype] // 8) for dtype in dtypes)
        total += max(lent_nbytes(tile.nbytes) for tile in tiles)
    return total + max(_scratch_nbytes(weight, reads, window, dtype) for dtype in dtypes)


def _scratch_nbytes(weight: Weight, reads: Sequence[PartRead], window: Window, dtype: str) -> int:
    """Return the most memory that a kernel takes beside parts, output and tiles."""
    if weight.codec in TOLD_THEIR_DTYPE:
        return 0
    wide = {read.part: read.nbytes * 2 for read in reads if read.ref.dtype in ("BF16", "F16")}
    rule = RULES.get(weight.codec)
    if rule is None:
        return sum(wide.values())
    taken = {read.part: wide.get(read.part, read.nbytes) for read in reads}
    return sum(wide.values()) + rule(taken, window, weight.params, dtype)


def pieces(work: Work, max_nbytes: int) -> tuple[Piece, ...]:
    """Return the task in pieces of at most max_nbytes each, as far as its blocks allow."""
    whole = _whole(work)
    nbytes = piece_nbytes(work, whole)
    if nbytes <= max_nbytes or not work.weights:
        return (whole,)
    length, block = _split_axis(work)
    if length <= block:
        return (whole,)
    step = max(length * max_nbytes // nbytes // block, 1) * block
    while True:
        cut = _cut_every(work, length, step)
        largest = max(piece_nbytes(work, piece) for piece in cut)
        if largest <= max_nbytes or step == block:
            return cut
        step = max(min(step - block, step * max_nbytes // largest // block * block), block)


def _cut_every(work: Work, length: int, step: int) -> tuple[Piece, ...]:
    return tuple(_piece(work, Span(at, min(at + step, length))) for at in range(0, length, step))


def floor_nbytes(work: Work) -> int:
    """Return the bytes of the smallest pieces that a task can be cut into: of the largest one."""
    whole = piece_nbytes(work, _whole(work))
    if not work.weights:
        return whole
    length, block = _split_axis(work)
    if length <= block:
        return whole
    starts = {0, (length - 1) // block * block}
    for region in work.task.regions:  # where a rectangle ends its padding comes along
        for rect in region.rects:
            last = rect.cols.stop if work.transposed else rect.rows.stop - work.first_row
            starts.add(min(max(last - 1, 0), length - 1) // block * block)
    cut = (_piece(work, Span(at, min(at + block, length))) for at in starts)
    return min(whole, max(piece_nbytes(work, piece) for piece in cut))


def _whole(work: Work) -> Piece:
    windows = tuple(
        Window(member.rows.start, member.rows.stop, 0, weight.cols)
        for member, weight in zip(work.task.members, work.weights, strict=True)
    )
    return Piece(windows, tuple(enumerate(work.task.regions)))


def _split_axis(work: Work) -> tuple[int, int]:
    """Return (length, block) of the axis along which a task is cut; (1, 1) where it cannot be."""
    block_rows = block_cols = 1
    for weight in work.weights:
        tiles = tuple(CODECS[weight.codec].tiles(weight.params).values())
        rows, cols = block_of(tiles, weight.rows, weight.cols)
        block_rows, block_cols = lcm(block_rows, rows), lcm(block_cols, cols)
    if work.transposed:
        lengths = {weight.cols for weight in work.weights}
        return (lengths.pop(), block_cols) if len(lengths) == 1 else (1, 1)
    steps = [
        rect.rows.step * packed_rows(work.draft(region).encode)
        for region in work.task.regions
        for rect in region.rects
    ]
    extents = {member.rows for member in work.task.members}
    if len(extents) != 1:
        return 1, 1
    return extents.pop().length, lcm(block_rows, *steps)


def _piece(work: Work, span: Span) -> Piece:
    """Return the piece for `span` of the split axis, counted from the members' first row."""
    if work.transposed:
        windows = tuple(Window(0, weight.rows, span.start, span.stop) for weight in work.weights)
        cut = [_cut_columns(region, span) for region in work.task.regions]
    else:
        first = work.first_row
        rows = Span(first + span.start, first + span.stop)
        windows = tuple(Window(rows.start, rows.stop, 0, weight.cols) for weight in work.weights)
        cut = [_cut_rows(region, rows) for region in work.task.regions]
    regions = tuple(
        (index, _placed(work, whole, rects))
        for index, (whole, rects) in enumerate(zip(work.task.regions, cut, strict=True))
        if rects
    )
    return Piece(windows, regions)


def _cut_rows(region: Region, rows: Span) -> tuple[Rect, ...]:
    cut = []
    for rect in region.rects:
        length, step = rect.rows.length, rect.rows.step
        first = min(max(-(-(rows.start - rect.rows.start) // step), 0), length)
        last = min(max(-(-(rows.stop - rect.rows.start) // step), 0), length)
        is_end = (first < last == length) or (length == 0 and rows.start == 0)
        padding = rect.own_rows - length if is_end else 0
        if last - first + padding > 0:
            start = rect.rows.start + first * step
            cut.append(
                rect._replace(
                    rows=Span(start, start + (last - first) * step, step),
                    at_row=rect.at_row + first * rect.row_step,
                    own_rows=last - first + padding,
                )
            )
    return tuple(cut)


def _cut_columns(region: Region, cols: Span) -> tuple[Rect, ...]:
    cut = []
    for rect in region.rects:
        start, stop = max(rect.cols.start, cols.start), min(rect.cols.stop, cols.stop)
        is_end = stop == rect.cols.stop and start <= stop
        padding = rect.own_cols - rect.cols.length if is_end else 0
        if stop - start + padding > 0 and start <= stop:
            cut.append(
                rect._replace(
                    cols=Span(start, stop),
                    at_col=rect.at_col + start - rect.cols.start,
                    own_cols=stop - start + padding,
                )
            )
    return tuple(cut)


def _placed(work: Work, whole: Region, rects: Sequence[Rect]) -> Region:
    """Return the part of a region that some of its rectangles fill."""
    if work.transposed:
        start = min(rect.at_col for rect in rects)
        stop = max(rect.at_col + rect.own_cols for rect in rects)
    else:
        start = min(rect.at_row for rect in rects)
        stop = max(rect.at_row + max(rect.own_rows - 1, 0) * rect.row_step + 1 for rect in rects)
    line = work.line_nbytes(whole)
    return whole._replace(
        start=start,
        stop=stop,
        offset=whole.offset + (start - whole.start) * line,
        nbytes=(stop - start) * line,
        rects=tuple(rects),
    )
