"""Squares of elements that are turned in registers: 16 x 16 bytes, 8 x 8 of 2 bytes, 4 x 4 of 4."""

from __future__ import annotations

from typing import Any

from moeconv.kernels.cpu.base import PAIR, nb
from moeconv.kernels.cpu.cache import intrinsic
from moeconv.kernels.cpu.vectors import Builder, Place, Vector, ir, load, picked, store

NBYTES = 16  # of a vector: a row of a square


def turned(builder: Builder, rows: list[Vector]) -> list[Vector]:
    """Return the columns of a square: each pass mixes row i with row i + side / 2."""
    side = len(rows)
    half = side // 2
    order = [place for lane in range(side) for place in (lane, side + lane)]
    for _ in range(side.bit_length() - 1):
        rows = [
            picked(builder, (rows[row], rows[row + half]), order[begin : begin + side])
            for row in range(half)
            for begin in (0, side)
        ]
    return rows


@intrinsic
def turn_square(typing: Any, source: Any, out: Any, read: Any, write: Any) -> Any:
    """Fill a square of `out` with the columns of one of `source`.

    read, write: the first element of each, and the elements from row to row, int64. A row is
    NBYTES long. No bounds are checked.
    """
    nbytes = source.dtype.bitwidth // 8
    side = NBYTES // nbytes

    def generate(context: Any, builder: Builder, signature: Any, given: Any) -> Any:
        kinds, kind = signature.args, ir.VectorType(ir.IntType(8 * nbytes), side)

        def place(which: int, row: int) -> Place:
            begin, pitch = (builder.extract_value(given[2 + which], i) for i in range(2))
            element = builder.add(begin, builder.mul(pitch, ir.Constant(pitch.type, row)))
            at = builder.mul(element, ir.Constant(pitch.type, nbytes))
            return kinds[which], given[which], at

        rows = [load(context, builder, place(0, row), NBYTES) for row in range(side)]
        columns = turned(builder, [builder.bitcast(row, kind) for row in rows])
        for row, column in enumerate(columns):
            store(context, builder, place(1, row), column)
        return context.get_dummy_value()

    return nb.void(source, out, PAIR, PAIR), generate
