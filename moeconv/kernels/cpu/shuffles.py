"""Look-ups of 16 or 32 codes at a time, by few instructions: numba makes no shuffles of its own.

A table holds 16 outputs as planes of 16 bytes: the lowest byte of each output, then the next.
A plane is one vector, and 16 codes pick 16 of its bytes at once. Where the CPU picks among words of
16 bits (AVX-512), a table of outputs as wide holds them one after the other; see STRIDE and UPPER.

Every look-up is called `look_up(codes, tables, out, begin)` in compiled functions: uint8 arrays,
and the bytes of codes, tables and out to begin at. No bounds are checked: it reads its codes and
one table, and writes as many outputs. Nothing has to be aligned.
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
    Place,
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
Read = Callable[[int, int], Vector]  # from a byte on, so many bytes
Reads = tuple[Read, Read]  # of codes, of a table
Write = Callable[[int, Vector], None]  # from a byte of the output on
Generate = Callable[[Builder, Reads, Write], None]


def pshufb(builder: Builder, plane: Vector, codes: Vector) -> Vector:
    """Return plane[codes] by the instruction of SSSE3."""
    signature = ir.FunctionType(plane.type, [plane.type, plane.type])
    tools: Any = import_module("numba.core.cgutils")
    function = tools.get_or_insert_function(builder.module, signature, PSHUFB)
    return builder.call(function, [plane, codes])


def words_of(lanes: int) -> Any:
    """Return the type of a vector of words of 16 bits."""
    return ir.VectorType(ir.IntType(16), lanes)


def vpermw(builder: Builder, table: Vector, codes: Vector) -> Vector:
    """Return table[codes & 15] of 16 words, by the instruction of AVX-512BW; 16 or 32 codes.

    The instruction takes a fifth bit of 32 codes: they look into the table twice over.
    """
    lanes = codes.type.count
    if lanes > LANES:
        table = picked(builder, (table, table), [*range(LANES)] * 2)
    return permuted(builder, table, codes)


def permuted(builder: Builder, table: Vector, codes: Vector) -> Vector:
    """Return table[codes] of 16 or 32 words and as many codes, of which only as many bits count."""
    signature = ir.FunctionType(table.type, [table.type, table.type])
    tools: Any = import_module("numba.core.cgutils")
    name = f"llvm.x86.avx512.permvar.hi.{16 * table.type.count}"
    function = tools.get_or_insert_function(builder.module, signature, name)
    return builder.call(function, [table, codes])


def portable(builder: Builder, plane: Vector, codes: Vector) -> Vector:
    """Return plane[codes] byte by byte, in the form that LLVM makes TBL of on AArch64."""
    found = ir.Constant(plane.type, ir.Undefined)
    for lane in range(LANES):
        place = ir.Constant(ir.IntType(32), lane)
        byte = builder.extract_element(plane, builder.extract_element(codes, place))
        found = builder.insert_element(found, byte, place)
    return found


# Whether vectors of words are picked among by one instruction, 16 and 32 at a time.
HAS_WORDS = {"+avx512bw", "+avx512vl"} <= cpu_features()
WIDE = 2 * LANES
# In a table of outputs of 2 bytes: from an output's low byte to the next's, and to its upper byte.
STRIDE, UPPER = (2, 1) if HAS_WORDS else (1, LANES)
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


def called(generate: Generate) -> LookUp:
    """Return a look-up whose instructions `generate` makes."""

    @intrinsic
    def look_up(typing: Any, codes: Any, tables: Any, out: Any, begin: Any) -> Any:
        def make(context: Any, builder: Builder, signature: Any, given: Any) -> Any:
            def place(which: int, byte: int) -> Place:
                first = builder.extract_value(given[3], which)
                at = builder.add(first, ir.Constant(first.type, byte))
                return signature.args[which], given[which], at

            def reader(which: int) -> Read:
                return lambda byte, nbytes: load(context, builder, place(which, byte), nbytes)

            def write(byte: int, vector: Vector) -> None:
                store(context, builder, place(2, byte), vector)

            generate(builder, (reader(0), reader(1)), write)
            return context.get_dummy_value()

        return nb.void(codes, tables, out, begin), make

    return look_up


def look_up_of(form: int, nbytes: int, permute: Permute = PERMUTE, lanes: int = LANES) -> LookUp:
    """Return a look-up of outputs of `nbytes`: 2 or 4, which is how many planes a table has.

    form: how codes lie; of BYTES the low nibble counts. lanes: how many codes, a multiple of 16.
    """
    per_byte = 1 if form == BYTES else 2

    def generate(builder: Builder, read: Reads, write: Write) -> None:
        for first in range(0, lanes, LANES):
            stored = read[0](first // per_byte, LANES // per_byte)
            if form == BYTES:
                taken = builder.and_(stored, all_of(15))
            else:
                taken = _unpacked(builder, stored, form)
            planes = [read[1](plane * LANES, LANES) for plane in range(nbytes)]
            write(first * nbytes, mixed(builder, [permute(builder, one, taken) for one in planes]))

    return called(generate)


def word_look_up_of(form: int, lanes: int) -> LookUp:
    """Return a look-up of 16 or 32 outputs of 2 bytes in a table of words; needs HAS_WORDS."""
    per_byte = 1 if form == BYTES else 2

    def generate(builder: Builder, read: Reads, write: Write) -> None:
        taken = read[0](0, lanes // per_byte)
        if form == BYTES:
            taken = builder.zext(taken, words_of(lanes))
        else:
            taken = _spread(builder, taken, form)
        table = builder.bitcast(read[1](0, 2 * LANES), words_of(LANES))
        write(0, vpermw(builder, table, taken))

    return called(generate)


def _spread(builder: Builder, pairs: Vector, form: int) -> Vector:
    """Return words whose last bits are the codes of pairs; what lies above them is anything."""
    wide = builder.zext(pairs, ir.VectorType(ir.IntType(32), pairs.type.count))

    def by(count: int) -> Any:
        return ir.Constant(wide.type, [count] * pairs.type.count)

    lower, upper = (wide, builder.shl(wide, by(12)))
    if form == HIGH_FIRST:
        lower, upper = builder.lshr(wide, by(4)), builder.shl(wide, by(16))
    return builder.bitcast(builder.or_(lower, upper), words_of(2 * pairs.type.count))


def _of_words(form: int, lanes: int) -> LookUp:
    """Return the look-up of outputs of 2 bytes that suits this CPU."""
    return word_look_up_of(form, lanes) if HAS_WORDS else look_up_of(form, 2, lanes=lanes)


nibbles_to_16, more_nibbles_to_16 = _of_words(LOW_FIRST, LANES), _of_words(LOW_FIRST, WIDE)
turned_to_16 = _of_words(HIGH_FIRST, LANES)
codes_to_16, more_codes_to_16 = _of_words(BYTES, LANES), _of_words(BYTES, WIDE)
nibbles_to_32, turned_to_32 = look_up_of(LOW_FIRST, 4), look_up_of(HIGH_FIRST, 4)
more_nibbles_to_32 = look_up_of(LOW_FIRST, 4, lanes=WIDE)
