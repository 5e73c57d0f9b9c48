"""FP8 codes to BF16, 16 at a time: what a scale makes of 16 mantissas, and exponents added to it.

Rounding does not depend on the exponent while nothing is subnormal or too large. So a table needs
the outputs of 16 codes, those of the low 4 bits: mantissa and the last bits of the exponent. The
rest of the exponent is added to the upper byte of a BF16, whose last bit is worth two of it. The
subnormal codes, which have no exponent to add, have a table of their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moeconv.kernels.cpu.base import Array
from moeconv.kernels.cpu.cache import jitable
from moeconv.kernels.cpu.scaled import bf16_of, f4
from moeconv.kernels.cpu.shuffles import (
    HAS_WORDS,
    PERMUTE,
    STRIDE,
    UPPER,
    WIDE,
    LookUp,
    Permute,
    Reads,
    Write,
    all_of,
    called,
    mixed,
    permuted,
    words_of,
)
from moeconv.kernels.cpu.vectors import LANES, Builder, ir, picked

u1, u2 = np.uint8, np.uint16
# Where a row begins in codes and in outputs (elements); its columns; how far into its group the
# first of them lies.
Place = tuple[int, int, int, int]
TABLE = 4 * LANES  # bytes: the table of normal codes (see shuffles.py), then of subnormal ones


def look_up_of(mantissa_bits: int, permute: Permute = PERMUTE, lanes: int = LANES) -> LookUp:
    """Return `look_up(codes, tables, out, begin)` of finite codes, called as in shuffles.py."""
    drop = 1 + mantissa_bits  # what is left of the exponent counts in the upper byte
    upper, tiny = 0x70 >> drop, _tiny(mantissa_bits)

    def generate(builder: Builder, read: Reads, write: Write) -> None:
        for first in range(0, lanes, LANES):
            stored = read[0](first, LANES)
            low = builder.and_(stored, all_of(15))
            found = [permute(builder, read[1](plane * LANES, LANES), low) for plane in range(4)]
            steps = builder.and_(builder.lshr(stored, all_of(drop)), all_of(upper))
            is_tiny = builder.icmp_unsigned("==", builder.and_(stored, all_of(tiny)), all_of(0))
            lower = builder.select(is_tiny, found[2], found[0])
            above = builder.select(is_tiny, found[3], builder.add(found[1], steps))
            above = builder.xor(above, builder.and_(stored, all_of(0x80)))
            write(2 * first, mixed(builder, [lower, above]))

    return called(generate)


def word_look_up_of(mantissa_bits: int, lanes: int) -> LookUp:
    """Return the same of 16 or 32 codes and tables of words; needs HAS_WORDS.

    A subnormal code has no exponent to add. 32 codes take a fifth bit, which chooses the table.
    """
    rest, tiny = 7 - mantissa_bits, _tiny(mantissa_bits)

    def generate(builder: Builder, read: Reads, write: Write) -> None:
        def every(value: int) -> Any:
            return ir.Constant(words_of(lanes), [value] * lanes)

        codes = builder.zext(read[0](0, lanes), words_of(lanes))
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
        sign = builder.and_(builder.shl(codes, every(8)), every(0x8000))
        write(0, builder.xor(builder.add(found, steps), sign))

    return called(generate)


def _tiny(mantissa_bits: int) -> int:
    """Return the bits of a code's exponent, none of which a subnormal code has."""
    return 0x78 if mantissa_bits == 3 else 0x7C


def _bases(mantissa_bits: int, bias: int) -> Any:
    """Return float32 [32]: 16 codes as if none were subnormal, then as if all were."""
    codes = np.arange(16)
    mantissa, exponent = codes % (1 << mantissa_bits), codes >> mantissa_bits
    normal = np.ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits)
    return np.concatenate([normal, np.ldexp(1.0 * mantissa, 1 - bias - mantissa_bits)]).astype(f4)


BASES = np.stack([_bases(3, 7), _bases(2, 15)])
if HAS_WORDS:
    e4m3_to_16, e5m2_to_16 = word_look_up_of(3, LANES), word_look_up_of(2, LANES)
    more_e4m3_to_16, more_e5m2_to_16 = word_look_up_of(3, WIDE), word_look_up_of(2, WIDE)
else:
    e4m3_to_16, e5m2_to_16 = look_up_of(3), look_up_of(2)
    more_e4m3_to_16, more_e5m2_to_16 = look_up_of(3, lanes=WIDE), look_up_of(2, lanes=WIDE)


@jitable
def fill_table(form: int, scale: np.float32, tables: Array, begin: int) -> None:
    """Fill the table that begins at a byte, of a scale that is tame and not 0."""
    bases = BASES[form]
    for kind in range(2):
        first = begin + kind * 2 * LANES
        for i in range(LANES):
            bits = bf16_of(f4(bases[kind * LANES + i] * scale))
            tables[first + STRIDE * i] = u1(bits)
            tables[first + STRIDE * i + UPPER] = u1(bits >> np.uint16(8))


@jitable
def _decode_one(byte: np.uint8, tables: Array, table: int, mantissa_bits: int) -> np.uint16:
    """Return the BF16 of a code, as a look-up does it."""
    low, rest = int(byte & u1(15)), u1(byte & u1(0x70))
    tiny = (byte & u1(0x7F)) >> u1(mantissa_bits) == 0
    begin = table + STRIDE * low + (2 * LANES if tiny else 0)
    upper = u1(tables[begin + UPPER] + u1(rest >> u1(1 + mantissa_bits)))
    return u2(u2(u1(upper ^ u1(byte & u1(0x80)))) << u2(8)) | u2(tables[begin])


def _decoder(look_up: LookUp, more: LookUp, mantissa_bits: int) -> Any:
    """Return a jitable function that decodes a row. look_up: of 16 codes; more: of 32."""

    @jitable
    def decode_row(
        codes: Array, tables: Array, groups: Array, out: Array, place: Place, group_cols: int
    ) -> None:
        """Fill a row of the BF16 bits `out`. groups: where the tables of the columns begin."""
        at, out_at, cols, first = place
        col, group, stop = 0, 0, min(group_cols - first, cols)
        if group_cols == WIDE and first == 0:  # MXFP8: the loop below would take half of the time
            for group in range(cols // WIDE):
                begin = group * WIDE
                more(codes, tables, out, (at + begin, groups[group], 2 * (out_at + begin)))
            group = cols // WIDE
            col, stop = group * WIDE, cols
        while col < cols:
            table = groups[group]
            for _ in range((stop - col) // WIDE):
                more(codes, tables, out, (at + col, table, 2 * (out_at + col)))
                col += WIDE
            if stop - col >= LANES:
                look_up(codes, tables, out, (at + col, table, 2 * (out_at + col)))
                col += LANES
            while col < stop:
                bits = _decode_one(codes[at + col], tables, table, mantissa_bits)
                out[2 * (out_at + col)] = u1(bits)
                out[2 * (out_at + col) + 1] = u1(bits >> u2(8))
                col += 1
            group, stop = group + 1, min(stop + group_cols, cols)

    return decode_row


decode_e4m3 = _decoder(e4m3_to_16, more_e4m3_to_16, 3)
decode_e5m2 = _decoder(e5m2_to_16, more_e5m2_to_16, 2)
