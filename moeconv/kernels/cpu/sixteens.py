"""Numbers times a scale, 16 at a time: explicit vectors where a loop might not become any.

An output is ((value - zero) * scale) + offset in float32, each step rounded once, and then BF16,
NaN canonical. `by`: zero, scale and offset; 0.0 as a zero and -0.0 as an offset change no bit. No
bounds are checked, and nothing has to be aligned.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moeconv.kernels.cpu.base import PAIR, nb
from moeconv.kernels.cpu.cache import intrinsic
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

TABLE_NBYTES = 2 * LANES  # the low bytes of 16 outputs, then their high bytes
CODES = np.arange(LANES, dtype=np.float32)
NO_ZERO, NO_OFFSET = np.float32(0.0), np.float32(-0.0)
BY = nb.UniTuple(nb.float32, 3)
F32, I16, I32 = ir.FloatType(), ir.IntType(16), ir.IntType(32)


def _splat(builder: Builder, value: Any) -> Vector:
    empty = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    first = builder.insert_element(empty, value, ir.Constant(I32, 0))
    return picked(builder, (first, first), [0] * LANES)


def _words(value: int) -> Vector:
    return ir.Constant(ir.VectorType(I32, LANES), [value] * LANES)


def _bf16(builder: Builder, values: Vector) -> Vector:
    """Return <16 x i16> of <16 x float>, rounded to nearest even."""
    bits = builder.bitcast(values, ir.VectorType(I32, LANES))
    odd = builder.and_(builder.lshr(bits, _words(16)), _words(1))
    rounded = builder.lshr(builder.add(builder.add(bits, _words(0x7FFF)), odd), _words(16))
    is_nan = builder.fcmp_unordered("uno", values, values)
    chosen = builder.select(is_nan, _words(0x7FC0), rounded)
    return builder.trunc(chosen, ir.VectorType(I16, LANES))


def _scaled(builder: Builder, values: Vector, by: Any) -> Vector:
    """Return the BF16 of 16 values."""
    numbers = (builder.extract_value(by, i) for i in range(3))
    zero, scale, offset = (_splat(builder, number) for number in numbers)
    product = builder.fmul(builder.fsub(values, zero), scale)
    return _bf16(builder, builder.fadd(product, offset))


@intrinsic
def fill_table(typing: Any, values: Any, tables: Any, at: Any, by: Any) -> Any:
    """Fill the table from byte `at` on with the outputs of float32 values [16]."""

    def generate(context: Any, builder: Builder, signature: Any, given: Any) -> Any:
        arrays = tuple(zip(signature.args, given, strict=True))
        start = ir.Constant(given[2].type, 0)
        taken = load(context, builder, (*arrays[0], start), 4 * LANES)
        taken = builder.bitcast(taken, ir.VectorType(F32, LANES))
        pairs = builder.bitcast(_scaled(builder, taken, given[3]), bytes_of(2 * LANES))
        order = [*range(0, 2 * LANES, 2), *range(1, 2 * LANES, 2)]
        store(context, builder, (*arrays[1], given[2]), picked(builder, (pairs, pairs), order))
        return context.get_dummy_value()

    return nb.void(values, tables, at, BY), generate


def _scale_of(signed: bool) -> Intrinsic:
    @intrinsic
    def scale_16(typing: Any, codes: Any, out: Any, begin: Any, by: Any) -> Any:
        def generate(context: Any, builder: Builder, signature: Any, given: Any) -> Any:
            at, out_at = (builder.extract_value(given[2], i) for i in range(2))
            arrays = tuple(zip(signature.args, given, strict=True))
            taken = load(context, builder, (*arrays[0], at), LANES)
            widened = builder.sext if signed else builder.zext
            wide = widened(taken, ir.VectorType(I32, LANES))
            values = builder.sitofp(wide, ir.VectorType(F32, LANES))
            store(context, builder, (*arrays[1], out_at), _scaled(builder, values, given[3]))
            return context.get_dummy_value()

        return nb.void(codes, out, PAIR, BY), generate

    return scale_16


# (codes, out, begin, by) gives the outputs of 16 bytes; begin: the bytes of both to begin at.
scale_bytes = _scale_of(signed=False)
scale_signed_bytes = _scale_of(signed=True)
