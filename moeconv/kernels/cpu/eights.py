"""FP8 codes to BF16, 16 at a time: what a scale makes of 16 mantissas, and exponents added to it.

Rounding does not depend on the exponent while nothing is subnormal or too large. So a table needs
the outputs of 16 codes, those of the low 4 bits: mantissa and the last bits of the exponent. The
rest of the exponent is added to the upper byte of a BF16, whose last bit is worth two of it. The
subnormal codes, which have no exponent to add, have a table of their own.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from moeconv.kernels.cpu.base import Array, nb
from moeconv.kernels.cpu.cache import intrinsic, jitable
from moeconv.kernels.cpu.scaled import f4
from moeconv.kernels.cpu.shuffles import (
    HAS_WORDS,
    PERMUTE,
    STRIDE,
    UPPER,
    WIDE,
    Generate,
    Reads,
    Write,
    all_of,
    mixed,
    permuted,
    words_of,
)
from moeconv.kernels.cpu.sixteens import NO_OFFSET, NO_ZERO
from moeconv.kernels.cpu.sixteens import fill_table as fill
from moeconv.kernels.cpu.vectors import LANES, Builder, Intrinsic, Vector, ir, load, picked, store

u1, u2 = np.uint8, np.uint16
E4M3, E5M2 = range(2)
# Where a row begins in codes and in outputs (elements); its columns; how far into its group the
# first of them lies.
Place = tuple[int, int, int, int]
TABLE = 4 * LANES  # bytes: the table of normal codes (see shuffles.py), then of subnormal ones
PIECES = range(0, TABLE, 2 * LANES if HAS_WORDS else LANES)  # its vectors


def look_up_of(mantissa_bits: int, lanes: int) -> Generate:
    """Return what makes the look-up of so many finite codes in planes of bytes."""
    drop = 1 + mantissa_bits  # what is left of the exponent counts in the upper byte
    upper, tiny = 0x70 >> drop, _tiny(mantissa_bits)

    def generate(builder: Builder, read: Reads, write: Write) -> None:
        for first in range(0, lanes, LANES):
            stored = read[0](first, LANES)
            low = builder.and_(stored, all_of(15))
            found = [PERMUTE(builder, read[1](plane * LANES, LANES), low) for plane in range(4)]
            steps = builder.and_(builder.lshr(stored, all_of(drop)), all_of(upper))
            is_tiny = builder.icmp_unsigned("==", builder.and_(stored, all_of(tiny)), all_of(0))
            lower = builder.select(is_tiny, found[2], found[0])
            above = builder.select(is_tiny, found[3], builder.add(found[1], steps))
            above = builder.xor(above, builder.and_(stored, all_of(0x80)))
            write(2 * first, mixed(builder, [lower, above]))

    return generate


def word_look_up_of(mantissa_bits: int, lanes: int) -> Generate:
    """Return the same of 16 or 32 codes and tables of words; needs HAS_WORDS.

    A subnormal code has no exponent to add. 32 codes take a fifth bit, which chooses the table.
    """
    rest, tiny = 7 - mantissa_bits, _tiny(mantissa_bits)

    def generate(builder: Builder, read: Reads, write: Write) -> None:
        def every(value: int) -> Any:
            return ir.Constant(words_of(lanes), [value] * lanes)

        codes = builder.sext(read[0](0, lanes), words_of(lanes))  # the sign where it is to be
        tables = [builder.bitcast(read[1](at, 2 * LANES), words_of(LANES)) for at in (0, 2 * LANES)]
        is_tiny = builder.icmp_unsigned("==", builder.and_(codes, every(tiny)), every(0))
        if lanes == LANES:
            normal, small = (permuted(builder, table, codes) for table in tables)
            found = builder.select(is_tiny, small, normal)
        else:
            both = picked(builder, (tables[0], tables[1]), [*range(lanes)])
            low = builder.and_(codes, every(15))
            taken = builder.select(is_tiny, builder.or_(low, every(16)), low)
            found = permuted(builder, both, taken)
        steps = builder.and_(builder.shl(codes, every(rest)), every(0x70 << rest))
        sign = builder.and_(codes, every(0x8000))
        write(0, builder.xor(builder.add(found, steps), sign))

    return generate


def _tiny(mantissa_bits: int) -> int:
    """Return the bits of a code's exponent, none of which a subnormal code has."""
    return 0x78 if mantissa_bits == 3 else 0x7C


def _bases(mantissa_bits: int, bias: int) -> tuple[Any, Any]:
    """Return float32 [16] and [16]: 16 codes as if none were subnormal, and as if all were."""
    codes = np.arange(16)
    mantissa, exponent = codes % (1 << mantissa_bits), codes >> mantissa_bits
    normal = np.ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits)
    tiny = np.ldexp(1.0 * mantissa, 1 - bias - mantissa_bits)
    return normal.astype(f4), tiny.astype(f4)


def _are_below(builder: Builder, magnitudes: Vector, wild: int) -> Any:
    lanes = magnitudes.type.count
    mask = builder.icmp_unsigned(">=", magnitudes, all_of(wild, lanes))
    bits = builder.bitcast(mask, ir.IntType(lanes))
    return builder.icmp_unsigned("==", bits, ir.Constant(bits.type, 0))


def _run_of(generate: Generate, mantissa_bits: int, lanes: int, step: int) -> Intrinsic:
    """Return what is called `run(codes, tables, groups, out, begin)` in compiled functions.

    It returns whether all codes are finite. begin: the byte of the codes, the group and the byte
    of the output to begin at; how many times `lanes` codes to look up. step: groups from one
    look-up to the next, 0 or 1.
    """

    def make(context: Any, builder: Builder, signature: Any, given: Any) -> Any:
        codes, tables, groups, out = zip(signature.args[:4], given[:4], strict=True)
        at, group, out_at, count = (builder.extract_value(given[4], which) for which in range(4))
        tools: Any = import_module("numba.core.cgutils")
        top = tools.alloca_once_value(builder, all_of(0, lanes))

        def after(begin: Any, step: int, by: Any) -> Any:
            return builder.add(begin, builder.mul(by, ir.Constant(by.type, step)))

        def table_of(group: Any) -> list[Vector]:
            stored = load(context, builder, (*groups, after(count.type(0), 8, group)), 8)
            table = builder.bitcast(stored, count.type)
            places = [builder.add(table, count.type(byte)) for byte in PIECES]
            return [load(context, builder, (*tables, place), PIECES.step) for place in places]

        table = [] if step else table_of(group)
        with tools.for_range(builder, count) as loop:
            pieces = table_of(builder.add(group, loop.index)) if step else table
            first, out_first = after(at, lanes, loop.index), after(out_at, 2 * lanes, loop.index)

            def read_codes(byte: int, nbytes: int) -> Vector:
                return load(context, builder, (*codes, after(first, 1, count.type(byte))), nbytes)

            def write(byte: int, vector: Vector) -> None:
                store(context, builder, (*out, after(out_first, 1, count.type(byte))), vector)

            magnitudes = builder.and_(read_codes(0, lanes), all_of(0x7F, lanes))
            above = builder.icmp_unsigned(">", magnitudes, builder.load(top))
            builder.store(builder.select(above, magnitudes, builder.load(top)), top)
            generate(builder, (read_codes, lambda byte, _: pieces[PIECES.index(byte)]), write)
        return _are_below(builder, builder.load(top), WILD[mantissa_bits])

    @intrinsic
    def run(typing: Any, codes: Any, tables: Any, groups: Any, out: Any, begin: Any) -> Any:
        return nb.boolean(codes, tables, groups, out, begin), make

    return run


WILD = {3: 0x7F, 2: 0x7C}  # by the bits of a mantissa: the lowest magnitude that is Inf or NaN
E4M3_NORMAL, E4M3_TINY = _bases(3, 7)
E5M2_NORMAL, E5M2_TINY = _bases(2, 15)


@jitable
def fill_table(form: int, scale: np.float32, tables: Array, begin: int) -> None:
    """Fill the table that begins at a byte, of a scale that is tame and not 0."""
    by = (NO_ZERO, scale, NO_OFFSET)
    if form == E4M3:
        fill(E4M3_NORMAL, tables, begin, by)
        fill(E4M3_TINY, tables, begin + 2 * LANES, by)
    else:
        fill(E5M2_NORMAL, tables, begin, by)
        fill(E5M2_TINY, tables, begin + 2 * LANES, by)


@jitable
def are_finite(codes: Array, wild: int) -> bool:
    """Return whether all magnitudes of codes are below `wild`."""
    top = u1(0)
    for i in range(codes.size):
        top = max(top, u1(codes[i] & u1(0x7F)))
    return bool(top < wild)


@jitable
def _decode_one(byte: np.uint8, tables: Array, table: int, mantissa_bits: int) -> np.uint16:
    """Return the BF16 of a code, as a look-up does it."""
    low, rest = int(byte & u1(15)), u1(byte & u1(0x70))
    tiny = (byte & u1(0x7F)) >> u1(mantissa_bits) == 0
    begin = table + STRIDE * low + (2 * LANES if tiny else 0)
    upper = u1(tables[begin + UPPER] + u1(rest >> u1(1 + mantissa_bits)))
    return u2(u2(u1(upper ^ u1(byte & u1(0x80)))) << u2(8)) | u2(tables[begin])


def _decoder(mantissa_bits: int) -> Any:
    """Return a jitable function that decodes a row."""
    of = word_look_up_of if HAS_WORDS else look_up_of
    one = _run_of(of(mantissa_bits, lanes=LANES), mantissa_bits, LANES, 0)
    run = _run_of(of(mantissa_bits, lanes=WIDE), mantissa_bits, WIDE, 0)
    each = _run_of(of(mantissa_bits, lanes=WIDE), mantissa_bits, WIDE, 1)
    wild = WILD[mantissa_bits]

    @jitable
    def decode_row(
        codes: Array, tables: Array, groups: Array, out: Array, place: Place, group_cols: int
    ) -> bool:
        """Fill a row of the BF16 bits `out`; return whether all codes are finite, without which
        it is not filled right.

        groups: where the tables of the columns begin.
        """
        at, out_at, cols, first = place
        col, group, stop, fine = 0, 0, min(group_cols - first, cols), True
        if group_cols == WIDE and first == 0:  # MXFP8: the loop below would take half of the time
            group = cols // WIDE
            fine = each(codes, tables, groups, out, (at, 0, 2 * out_at, group))
            col, stop = group * WIDE, cols
        while col < cols:
            count = (stop - col) // WIDE
            begin = (at + col, group, 2 * (out_at + col), count)
            fine = run(codes, tables, groups, out, begin) and fine
            col += count * WIDE
            if stop - col >= LANES:
                begin = (at + col, group, 2 * (out_at + col), 1)
                fine = one(codes, tables, groups, out, begin) and fine
                col += LANES
            while col < stop:
                byte = codes[at + col]
                fine = (byte & u1(0x7F)) < wild and fine
                bits = _decode_one(byte, tables, groups[group], mantissa_bits)
                out[2 * (out_at + col)] = u1(bits)
                out[2 * (out_at + col) + 1] = u1(bits >> u2(8))
                col += 1
            group, stop = group + 1, min(stop + group_cols, cols)
        return fine

    return decode_row


decode_e4m3, decode_e5m2 = _decoder(3), _decoder(2)
