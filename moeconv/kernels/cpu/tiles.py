"""Halves of AMX tiles: 16 rows that are quantized and turned in registers, 64 bytes of each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from moeconv.codecs.amx import HALF_ROWS, TILE_BYTES
from moeconv.kernels.cpu.base import nb
from moeconv.kernels.cpu.cache import cpu_features, intrinsic
from moeconv.kernels.cpu.squares import turned
from moeconv.kernels.cpu.vectors import Builder, Place, Vector, bytes_of, ir, load, picked, store

QUADS = TILE_BYTES // 4  # words of 4 codes per row of a tile
# Adding 1.5 * 2^23 leaves the nearest even integer in the low bits of a float32 below 2^22.
ROUNDER = 12582912.0
FLOATS, WORDS = (ir.VectorType(kind, QUADS) for kind in (ir.FloatType(), ir.IntType(32)))
# Words of the squares that are turned: as many as a vector register holds.
SIDE = QUADS if "+avx512f" in cpu_features() else 4

Factors = tuple[Vector, Vector]  # of a row: lift, inverse
# The codes of 64 values from a column on, a byte each.
Codes = Callable[[int], Vector]


def _word(value: int) -> Any:
    return ir.Constant(WORDS, [value] * QUADS)


def _byte(value: int) -> Any:
    return ir.Constant(bytes_of(TILE_BYTES), [value] * TILE_BYTES)


def _rounded(builder: Builder, bits: Vector, factors: Factors) -> Vector:
    """Return 16 float32 (as bits) over their row's scale: bytes, each in the low bits of a word."""
    value = builder.bitcast(bits, FLOATS)
    for factor in factors:
        value = builder.fmul(value, factor)
    value = builder.fadd(value, ir.Constant(FLOATS, [ROUNDER] * QUADS))
    return builder.bitcast(value, WORDS)


def _codes(builder: Builder, read: Callable[[int], Vector], factors: Factors, first: int) -> Vector:
    """Return the codes of the 64 BF16 from `first` on. read: 64 bytes from a byte of a row on."""
    found = []
    for at in (2 * first, 2 * first + TILE_BYTES):
        pairs = builder.bitcast(read(at), WORDS)
        even = _rounded(builder, builder.shl(pairs, _word(16)), factors)
        odd = _rounded(builder, builder.and_(pairs, _word(0xFFFF0000)), factors)
        both = builder.or_(builder.and_(even, _word(0xFFFF)), builder.shl(odd, _word(16)))
        found.append(builder.bitcast(both, bytes_of(TILE_BYTES)))
    return picked(builder, (found[0], found[1]), range(0, 2 * TILE_BYTES, 2))


def _shortened(builder: Builder, codes: Vector) -> Vector:
    """Return codes of 8 bits whose upper four are rounded, halves away from zero."""
    negative = builder.ashr(codes, _byte(7))  # -1: what lies halfway goes down
    return builder.add(builder.add(codes, _byte(8)), negative)


def _row(builder: Builder, codes: Codes, bits: int) -> Vector:
    """Return the bytes of a row: 64 codes, or 128 of which the first 64 are the low nibbles."""
    if bits == 8:
        return codes(0)
    low, high = (_shortened(builder, codes(first)) for first in (0, TILE_BYTES))
    return builder.or_(builder.lshr(low, _byte(4)), builder.and_(high, _byte(0xF0)))


def _turned(builder: Builder, rows: list[Vector], side: int) -> list[Vector]:
    """Return the columns of 16 rows of 16 words, by squares of 16 or 4 words."""
    if side == QUADS:
        return turned(builder, rows)
    columns = []
    for quad in range(0, QUADS, side):
        parts = [picked(builder, (row, row), range(quad, quad + side)) for row in rows]
        squares = [turned(builder, parts[row : row + side]) for row in range(0, HALF_ROWS, side)]
        for top, second, third, last in zip(*squares, strict=True):
            upper, lower = (
                picked(builder, pair, range(2 * side)) for pair in ((top, second), (third, last))
            )
            columns.append(picked(builder, (upper, lower), range(QUADS)))
    return columns


def half_tile_of(bits: int, side: int = SIDE) -> Any:
    """Return `fill(memory, factors, out, place)`, which fills 1024 bytes of `out`.

    side: words of the squares that are turned, 16 or 4.
    place: the byte of memory where the first row begins, bytes from row to row, the element of
    factors (lift, inverse of each row) and the byte of out to begin at. No bounds are checked.
    """

    @intrinsic
    def fill(typing: Any, memory: Any, factors: Any, out: Any, place: Any) -> Any:
        def generate(context: Any, builder: Builder, signature: Any, given: Any) -> Any:
            begin, pitch, factor, write = (builder.extract_value(given[3], i) for i in range(4))

            def at(which: int, first: Any, byte: int) -> Place:
                where = builder.add(first, ir.Constant(first.type, byte))
                return signature.args[which], given[which], where

            def spread(number: int) -> Vector:
                first = builder.mul(factor, ir.Constant(factor.type, 4))
                stored = load(context, builder, at(1, first, 4 * number), 4)
                one = builder.bitcast(stored, ir.VectorType(ir.FloatType(), 1))
                return builder.shuffle_vector(one, one, ir.Constant(WORDS, [0] * QUADS))

            def read(row: int, byte: int) -> Vector:
                first = builder.add(begin, builder.mul(pitch, ir.Constant(pitch.type, row)))
                return load(context, builder, at(0, first, byte), TILE_BYTES)

            rows = []
            for row in range(HALF_ROWS):
                pair = (spread(2 * row), spread(2 * row + 1))
                codes = partial(_codes, builder, partial(read, row), pair)
                rows.append(builder.bitcast(_row(builder, codes, bits), WORDS))
            for quad, column in enumerate(_turned(builder, rows, side)):
                store(context, builder, at(2, write, quad * TILE_BYTES), column)
            return context.get_dummy_value()

        return nb.void(memory, factors, out, place), generate

    return fill


fill_8, fill_4 = half_tile_of(8), half_tile_of(4)
