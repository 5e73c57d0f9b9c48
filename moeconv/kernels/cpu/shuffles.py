"""Look-ups of 16 codes at a time, as one instruction: numba makes no byte shuffles of its own.

A table holds 16 outputs as planes of 16 bytes: the lowest byte of each output, then the next.
A plane is one vector, and 16 codes pick 16 of its bytes at once.

Every look-up is called `look_up(codes, tables, out, begin)` in compiled functions: uint8 arrays,
and the bytes of codes, tables and out to begin at. No bounds are checked: it reads 16 codes and
one table, and writes 16 outputs. Nothing has to be aligned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from moeconv.kernels.cpu.base import nb
from moeconv.kernels.cpu.cache import cpu_features, intrinsic
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

PSHUFB = "llvm.x86.ssse3.pshuf.b.128"
BYTES, LOW_FIRST, HIGH_FIRST = range(3)  # how codes lie: one a byte, or two and in which order

Permute = Callable[[Builder, Vector, Vector], Vector]
LookUp = Intrinsic


def pshufb(builder: Builder, plane: Vector, codes: Vector) -> Vector:
    """Return plane[codes] by the instruction of SSSE3."""
    signature = ir.FunctionType(plane.type, [plane.type, plane.type])
    tools: Any = import_module("numba.core.cgutils")
    function = tools.get_or_insert_function(builder.module, signature, PSHUFB)
    return builder.call(function, [plane, codes])


def portable(builder: Builder, plane: Vector, codes: Vector) -> Vector:
    """Return plane[codes] byte by byte, in the form that LLVM makes TBL of on AArch64."""
    found = ir.Constant(plane.type, ir.Undefined)
    for lane in range(LANES):
        place = ir.Constant(ir.IntType(32), lane)
        byte = builder.extract_element(plane, builder.extract_element(codes, place))
        found = builder.insert_element(found, byte, place)
    return found


PERMUTE: Permute = pshufb if "+ssse3" in cpu_features() else portable


def all_of(value: int, lanes: int = LANES) -> Any:
    """Return a vector of equal bytes."""
    return ir.Constant(bytes_of(lanes), [value] * lanes)


def mixed(builder: Builder, vectors: Sequence[Vector]) -> Vector:
    """Return the first bytes of the vectors, the second ones, and so on; 1, 2 or 4 vectors."""
    if len(vectors) == 1:
        return vectors[0]
    half = len(vectors) // 2
    even, odd = (mixed(builder, vectors[first::2]) for first in (0, 1))
    order = [place for lane in range(LANES * half) for place in (lane, LANES * half + lane)]
    return picked(builder, (even, odd), order)


def _unpacked(builder: Builder, pairs: Vector, form: int) -> Vector:
    """Return 16 codes of 8 bytes."""
    half = LANES // 2
    low, high = builder.and_(pairs, all_of(15, half)), builder.lshr(pairs, all_of(4, half))
    order = [place for lane in range(half) for place in (lane, half + lane)]
    return picked(builder, (low, high) if form == LOW_FIRST else (high, low), order)


def look_up_of(form: int, nbytes: int, permute: Permute = PERMUTE) -> LookUp:
    """Return a look-up of outputs of `nbytes`: 2 or 4, which is how many planes a table has.

    form: how codes lie; of BYTES the low nibble counts.
    """

    @intrinsic
    def look_up(typing: Any, codes: Any, tables: Any, out: Any, begin: Any) -> Any:
        def generate(context: Any, builder: Builder, signature: Any, given: Any) -> Any:
            at, table, out_at = (builder.extract_value(given[3], i) for i in range(3))
            arrays = tuple(zip(signature.args, given, strict=True))
            stored = load(
                context, builder, (*arrays[0], at), LANES if form == BYTES else LANES // 2
            )
            if form == BYTES:
                taken = builder.and_(stored, all_of(15))
            else:
                taken = _unpacked(builder, stored, form)
            found = []
            for plane in range(nbytes):
                place = builder.add(table, ir.Constant(table.type, plane * LANES))
                outputs = load(context, builder, (*arrays[1], place), LANES)
                found.append(permute(builder, outputs, taken))
            store(context, builder, (*arrays[2], out_at), mixed(builder, found))
            return context.get_dummy_value()

        return nb.void(codes, tables, out, begin), generate

    return look_up


nibbles_to_16, nibbles_to_32 = look_up_of(LOW_FIRST, 2), look_up_of(LOW_FIRST, 4)
turned_to_16, turned_to_32 = look_up_of(HIGH_FIRST, 2), look_up_of(HIGH_FIRST, 4)
codes_to_16 = look_up_of(BYTES, 2)
