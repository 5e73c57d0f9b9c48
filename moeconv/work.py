"""A task with what it refers to, and pieces of it: what of a task is in memory at once.

Pieces are runs of rows (of columns, where the output is transposed). They come in the order of the
bytes that they write, so that a region's digest is taken in one pass; the digests do not depend on
how small the pieces are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moeconv.arrange import OutFile
from moeconv.codecs.base import Window
from moeconv.layouts.base import Draft
from moeconv.rects import Rect
from moeconv.tasks import Region, Task
from moeconv.types import Span, Weight


class Piece(NamedTuple):
    """What is in memory at once: a window per member, and (index of the region, its part).

    `held`: the windows whose parts are in memory from a task's first piece to its last, where
    each piece would read them again; else none.
    """

    windows: tuple[Window, ...]
    regions: tuple[tuple[int, Region], ...]
    held: tuple[Window, ...] = ()


class Work(NamedTuple):
    """A task with what it refers to."""

    task: Task
    weights: tuple[Weight, ...]  # of its members
    files: Sequence[OutFile]

    @property
    def transposed(self) -> bool:
        """Return whether an output lies transposed: then the task is cut along columns."""
        return any(self.draft(region).transposed for region in self.task.regions)

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


def whole_piece(work: Work) -> Piece:
    """Return a task as one piece."""
    windows = tuple(
        Window(member.rows.start, member.rows.stop, 0, weight.cols)
        for member, weight in zip(work.task.members, work.weights, strict=True)
    )
    return Piece(windows, tuple(enumerate(work.task.regions)))


def cut_piece(work: Work, span: Span) -> Piece:
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
