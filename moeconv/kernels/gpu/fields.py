"""Bit fields on a GPU: codes of 2 to 8 bits in 32-bit words, as exact float32.

A field is masked where it lies and given the exponent at which its lowest bit is worth 1: that is
2^(23 - place) + code, and one subtraction leaves code - zero. EXPONENT of place 0 comes as an
argument, `exponent`: a constant takes ptxas an instruction more for each field.
"""

from __future__ import annotations

import triton
import triton.language as tl

EXPONENT = 150 << 23  # of a float32 whose last bit is worth 1
UNIT = tl.constexpr(8)  # neighbouring codes that a thread takes together


@triton.jit
def lifted(word, exponent, PLACE: tl.constexpr, BITS: tl.constexpr):
    """Return float32 2^(23 - PLACE) + code, of the fields at bit PLACE of int32 words."""
    bits = (word & (((1 << BITS) - 1) << PLACE)) | (exponent - (PLACE << 23))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _less(word, zero, exponent, PLACE: tl.constexpr, BITS: tl.constexpr):
    """Return float32 code - zero of the fields at bit PLACE of int32 words."""
    return lifted(word, exponent, PLACE, BITS) - (zero + (1 << (23 - PLACE)))


@triton.jit
def woven(a, b, c, d, e, f, g, h):
    """Return [..., 2, 2, 2] of eight [...]: the new axes count from a to h."""
    even = tl.join(tl.join(a, e), tl.join(c, g))
    return tl.join(even, tl.join(tl.join(b, f), tl.join(d, h)))


@triton.jit
def _nibbles(word, zero, exponent):
    """Return float32 [..., 2, 2, 2] of the eight nibbles of int32 words."""
    high = word >> 16
    return woven(
        _less(word, zero, exponent, 0, 4),
        _less(word, zero, exponent, 4, 4),
        _less(word, zero, exponent, 8, 4),
        _less(word, zero, exponent, 12, 4),
        _less(high, zero, exponent, 0, 4),
        _less(high, zero, exponent, 4, 4),
        _less(high, zero, exponent, 8, 4),
        _less(high, zero, exponent, 12, 4),
    )


@triton.jit
def _bytes(low, high, zero, exponent):
    """Return float32 [..., 2, 2, 2] of the bytes of two int32 words."""
    return woven(
        _less(low, zero, exponent, 0, 8),
        _less(low, zero, exponent, 8, 8),
        _less(low >> 16, zero, exponent, 0, 8),
        _less(low >> 16, zero, exponent, 8, 8),
        _less(high, zero, exponent, 0, 8),
        _less(high, zero, exponent, 8, 8),
        _less(high >> 16, zero, exponent, 0, 8),
        _less(high >> 16, zero, exponent, 8, 8),
    )


@triton.jit
def _streamed(stream, zero, exponent, BITS: tl.constexpr):
    """Return float32 [..., 2, 2, 2] of the eight lowest fields of uint64."""
    return woven(
        _less(stream.to(tl.int32), zero, exponent, 0, BITS),
        _less((stream >> BITS).to(tl.int32), zero, exponent, 0, BITS),
        _less((stream >> (2 * BITS)).to(tl.int32), zero, exponent, 0, BITS),
        _less((stream >> (3 * BITS)).to(tl.int32), zero, exponent, 0, BITS),
        _less((stream >> (4 * BITS)).to(tl.int32), zero, exponent, 0, BITS),
        _less((stream >> (5 * BITS)).to(tl.int32), zero, exponent, 0, BITS),
        _less((stream >> (6 * BITS)).to(tl.int32), zero, exponent, 0, BITS),
        _less((stream >> (7 * BITS)).to(tl.int32), zero, exponent, 0, BITS),
    )


@triton.jit
def _word(words, at, stride, there):
    """Return int32 words `at` of streams that begin at `words`, their words `stride` apart."""
    return tl.load(words + at.to(tl.int64) * stride, mask=there, other=0)


@triton.jit
def _wide(words, at, stride, there):
    """Return uint64 of what _word returns."""
    return _word(words, at, stride, there).to(tl.uint32, bitcast=True).to(tl.uint64)


@triton.jit
def unit_codes(
    words, unit, stride, there, count, zero, exponent, BITS: tl.constexpr, FLIP: tl.constexpr
):
    """Return float32 code - zero [R, U, 2, 2, 2] of units [1, U] of streams without gaps.

    words: pointers [R, 1] to streams of `count` words, `stride` apart; there: mask [R, 1]; zero:
    float32 [R, U], or one for all.
    """
    if BITS == 4:
        word = _word(words, unit, stride, there & (unit < count))
        found = _nibbles(word ^ FLIP, zero, exponent)
    elif BITS == 8:
        low = _word(words, unit * 2, stride, there & (unit * 2 < count))
        high = _word(words, unit * 2 + 1, stride, there & (unit * 2 + 1 < count))
        found = _bytes(low ^ FLIP, high ^ FLIP, zero, exponent)
    else:
        bit = unit * (UNIT * BITS)
        at, shift = bit >> 5, (bit & 31).to(tl.uint64)
        stream = _wide(words, at, stride, there & (at < count))
        if BITS > 2:
            stream |= _wide(words, at + 1, stride, there & (at + 1 < count)) << 32
        stream >>= shift
        if BITS == 7:  # 56 bits, from bit 24 on: in three words
            third = _wide(words, at + 2, stride, there & (at + 2 < count))
            stream |= tl.where(shift > 8, third << ((64 - shift) & 63), 0)
        found = _streamed(stream, zero, exponent, BITS)
    return found


@triton.jit
def fields(
    words, index, stride, there, BITS: tl.constexpr, ELEMENTS: tl.constexpr, WORDS: tl.constexpr
):
    """Return int32 fields `index` of streams whose runs of ELEMENTS fields fill WORDS words."""
    begin = index % ELEMENTS * BITS
    at, shift = index // ELEMENTS * WORDS + (begin >> 5), begin & 31
    if WORDS == 1:
        found = (_word(words, at, stride, there) >> shift.to(tl.int32)) & ((1 << BITS) - 1)
    else:
        low = _wide(words, at, stride, there)
        high = _wide(words, at + 1, stride, there & (shift + BITS > 32))
        stream = (low | (high << 32)) >> shift.to(tl.uint64)
        found = (stream & ((1 << BITS) - 1)).to(tl.int32)
    return found
