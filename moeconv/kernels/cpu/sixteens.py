"""Numbers times a scale, 16 at a time: explicit vectors where a loop might not become any.

An output is ((value - zero) * scale) + offset in float32, each step rounded once, NaN canonical,
and then BF16, or float32 bits where the output array is uint32. `by`: zero, scale and offset; 0.0
as a zero and -0.0 as an offset change no bit. No bounds are checked, and nothing has to be aligned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moeconv.kernels.cpu.base import nb
from moeconv.kernels.cpu.cache import intrinsic
from moeconv.kernels.cpu.shuffles import HAS_WORDS, PERMUTE
from moeconv.kernels.cpu.vectors import (
    LANES,
    Builder,
    Intrinsic,
    Vector,
    bytes_of,
    ir,
    load,
    picked,
    store,
)

TABLE_NBYTES = 2 * LANES  # see shuffles.py
CODES = np.arange(LANES, dtype=np.float32)
NO_ZERO, NO_OFFSET = np.float32(0.0), np.float32(-0.0)
By = tuple[np.float32, np.float32, np.float32]
BY = nb.UniTuple(nb.float32, 3)
I32 = ir.IntType(32)
FLOATS, WORDS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(I32, LANES)
Read = Callable[[int, int], Vector]  # of a place of `begin`, so many bytes
Take = Callable[[Builder, Read, Sequence[Any]], Vector]  # and what else `begin` holds: <16 x i32>


def _splat(builder: Builder, value: Any) -> Vector:
    empty = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    first = builder.insert_element(empty, value, ir.Constant(I32, 0))
    return picked(builder, (first, first), [0] * LANES)


def _words(value: int) -> Vector:
    return ir.Constant(WORDS, [value] * LANES)


def _rounded(builder: Builder, values: Vector, nbytes: int) -> Vector:
    """Return <16 x i16> BF16 of <16 x float>, rounded to nearest even, or <16 x i32> bits."""
    bits = builder.bitcast(values, WORDS)
    if nbytes == 2:
        odd = builder.and_(builder.lshr(bits, _words(16)), _words(1))
        bits = builder.lshr(builder.add(builder.add(bits, _words(0x7FFF)), odd), _words(16))
    is_nan = builder.fcmp_unordered("uno", values, values)
    chosen = builder.select(is_nan, _words(0x7FC0 if nbytes == 2 else 0x7FC00000), bits)
    return builder.trunc(chosen, ir.VectorType(ir.IntType(16), LANES)) if nbytes == 2 else chosen


def _scaled(builder: Builder, values: Vector, by: Any, nbytes: int) -> Vector:
    """Return 16 outputs of <16 x float>."""
    numbers = (builder.extract_value(by, i) for i in range(3))
    zero, scale, offset = (_splat(builder, number) for number in numbers)
    product = builder.fmul(builder.fsub(values, zero), scale)
    return _rounded(builder, builder.fadd(product, offset), nbytes)


def _table_of(nbytes: int) -> Intrinsic:
    """Return what is called `fill(values, tables, at, by)`: planes of outputs of `nbytes`."""

    @intrinsic
    def fill(typing: Any, values: Any, tables: Any, at: Any, by: Any) -> Any:
        """Fill the table from byte `at` on with the outputs of float32 values [16]."""

        def generate(context: Any, builder: Builder, signature: Any, given: Any) -> Any:
            arrays = tuple(zip(signature.args, given, strict=True))
            start = ir.Constant(given[2].type, 0)
            taken = load(context, builder, (*arrays[0], start), 4 * LANES)
            taken = builder.bitcast(taken, FLOATS)
            outputs = _scaled(builder, taken, given[3], nbytes)
            mixed = builder.bitcast(outputs, bytes_of(nbytes * LANES))
            if nbytes == 4 or not HAS_WORDS:
                end = nbytes * LANES
                order = [at for plane in range(nbytes) for at in range(plane, end, nbytes)]
                mixed = picked(builder, (mixed, mixed), order)
            store(context, builder, (*arrays[1], given[2]), mixed)
            return context.get_dummy_value()

        return nb.void(values, tables, at, BY), generate

    return fill


fill_table, fill_wide_table = _table_of(2), _table_of(4)


def scale_of(take: Take) -> Intrinsic:
    """Return what is called `scale(stored, out, begin, by)` in compiled functions.

    begin: int64, as `take` has it and the byte of the output to begin at.
    """

    @intrinsic
    def scale(typing: Any, stored: Any, out: Any, begin: Any, by: Any) -> Any:
        def generate(context: Any, builder: Builder, signature: Any, given: Any) -> Any:
            places = [builder.extract_value(given[2], i) for i in range(begin.count)]
            arrays = tuple(zip(signature.args, given, strict=True))

            def read(place: int, lanes: int) -> Vector:
                return load(context, builder, (*arrays[0], places[place]), lanes)

            values = builder.sitofp(take(builder, read, places), FLOATS)
            nbytes = 4 if out.dtype.bitwidth == 32 else 2
            outputs = _scaled(builder, values, given[3], nbytes)
            store(context, builder, (*arrays[1], places[-1]), outputs)
            return context.get_dummy_value()

        return nb.void(stored, out, begin, BY), generate

    return scale


def _shifted(builder: Builder, numbers: Vector, shift: Any, nbits: int) -> Vector:
    """Return `nbits` bits of 16 numbers from bit `shift` on."""
    by = _splat(builder, builder.trunc(shift, I32))
    return builder.and_(builder.lshr(numbers, by), _words((1 << nbits) - 1))


def _unsigned(builder: Builder, read: Read, begin: Sequence[Any]) -> Vector:
    """begin: the first byte."""
    return builder.zext(read(0, LANES), WORDS)


def _signed(builder: Builder, read: Read, begin: Sequence[Any]) -> Vector:
    """begin: the first byte."""
    return builder.sext(read(0, LANES), WORDS)


def fields(nbits: int, high: int = 0) -> Take:
    """Return what takes `nbits` bits of each byte and, above them, `high` of other bytes.

    begin: the first byte and the field's shift, of both.
    """

    def take(builder: Builder, read: Read, begin: Sequence[Any]) -> Vector:
        low = _shifted(builder, _unsigned(builder, read, begin), begin[1], nbits)
        if not high:
            return low
        above = _shifted(builder, builder.zext(read(2, LANES), WORDS), begin[3], high)
        return builder.or_(low, builder.shl(above, _words(nbits)))

    return take


def with_mask(builder: Builder, read: Read, begin: Sequence[Any]) -> Vector:
    """Take 4 bits of each byte and, above them, a bit of a little-endian word of 16.

    begin: the first byte, the field's shift, the byte of the word.
    """
    low = fields(4)(builder, read, begin)
    word = builder.bitcast(read(2, 2), ir.IntType(16))
    lanes = _splat(builder, builder.zext(word, I32))
    bits = builder.and_(builder.lshr(lanes, ir.Constant(WORDS, list(range(LANES)))), _words(1))
    return builder.or_(low, builder.shl(bits, _words(4)))


def looked_up(values: Sequence[int]) -> Take:
    """Return what takes the signed bytes `values` [16] of 4 bits of each byte.

    begin: the first byte and the field's shift.
    """

    def take(builder: Builder, read: Read, begin: Sequence[Any]) -> Vector:
        codes = builder.trunc(fields(4)(builder, read, begin), bytes_of(LANES))
        table = ir.Constant(bytes_of(LANES), list(values))
        return builder.sext(PERMUTE(builder, table, codes), WORDS)

    return take


scale_bytes, scale_signed_bytes = scale_of(_unsigned), scale_of(_signed)
scale_nibbles = scale_of(fields(4))
