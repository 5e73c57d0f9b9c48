"""Rectangles: which rows and columns of a source matrix land where in an output matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moeconv.types import Span


class Rect(NamedTuple):
    """Rows and columns of a member's matrix, and where they land in a slot's output matrix.

    It owns `own_rows` rows (every `row_step`-th) x `own_cols` columns there: its own, then zeros.
    """

    member: int
    rows: Span
    cols: Span
    at_row: int
    row_step: int
    at_col: int
    own_rows: int
    own_cols: int


def join_rects(rects: Sequence[Rect]) -> tuple[Rect, ...]:
    """Return the rectangles with neighbours made one: interleaved ones woven, adjacent ones joined.

    gate rows 0::2 to rows 0::2 and up rows 1::2 to rows 1::2 are one plain copy.
    """
    joined: list[Rect] = []
    for rect in sorted(rects, key=lambda one: (one.member, one.at_row, one.at_col)):
        last = joined[-1] if joined else None
        one = None if last is None else (_weave(last, rect) or _append(last, rect))
        if one is None:
            joined.append(rect)
        else:
            joined[-1] = one
    return tuple(joined)


def _same_columns(one: Rect, other: Rect) -> bool:
    return (
        one.member == other.member
        and one.cols == other.cols
        and one.at_col == other.at_col
        and one.own_cols == other.own_cols
        and one.own_rows == one.rows.length
        and other.own_rows == other.rows.length
    )


def _weave(one: Rect, other: Rect) -> Rect | None:
    if not _same_columns(one, other) or not one.rows.step == other.rows.step == 2:
        return None
    if one.row_step != 2 or other.row_step != 2 or one.own_rows != other.own_rows:
        return None
    if other.rows.start != one.rows.start + 1 or other.at_row != one.at_row + 1:
        return None
    rows = Span(one.rows.start, one.rows.start + 2 * one.own_rows)
    return one._replace(rows=rows, row_step=1, own_rows=2 * one.own_rows)


def _append(one: Rect, other: Rect) -> Rect | None:
    if not _same_columns(one, other) or not one.rows.step == other.rows.step == 1:
        return None
    if one.row_step != 1 or other.row_step != 1:
        return None
    if other.rows.start != one.rows.stop or other.at_row != one.at_row + one.own_rows:
        return None
    rows = Span(one.rows.start, other.rows.stop)
    return one._replace(rows=rows, own_rows=one.own_rows + other.own_rows)
