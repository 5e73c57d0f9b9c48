"""ggml's K types: super-blocks of 256 columns, whose halves scale the small scales in them.

The order of operations is that of gguf-py's quants.py.
"""

from __future__ import annotations

import numpy as np

from moeconv.kernels.cpu.base import Array, Pair, Triple
from moeconv.kernels.cpu.cache import compiled, jitable
from moeconv.kernels.cpu.floats import u2, u4
from moeconv.kernels.cpu.ggml_values import (
    SIGNATURE,
    any_wild,
    bits_at,
    f4,
    half,
    i4,
    number,
    put,
    row_of,
)

COLS = 256  # of a block


@jitable
def _scale(packed: Array, index: int) -> np.int32:
    """Return the 6-bit scale of sub-block `index`, of the 12 bytes of Q4_K and Q5_K."""
    if index < 4:
        return bits_at(packed[index], 0, 63)
    return i4(bits_at(packed[index + 4], 0, 15) | i4(bits_at(packed[index - 4], 6, 3) << i4(4)))


@jitable
def _offset(packed: Array, index: int) -> np.int32:
    """Return the 6-bit offset of sub-block `index`, of the 12 bytes of Q4_K and Q5_K."""
    if index < 4:
        return bits_at(packed[index + 4], 0, 63)
    return i4(bits_at(packed[index + 4], 4, 15) | i4(bits_at(packed[index], 6, 3) << i4(4)))


@jitable
def _q4_k(stored: Array, out: Array) -> None:
    """The low nibbles of 32 bytes are a sub-block, the high ones the next."""
    for block in range(out.size // 256):
        taken = stored[block * 144 : block * 144 + 144]
        d, dmin = half(taken, 0), half(taken, 2)
        for index in range(8):
            given = out[block * 256 + index * 32 : block * 256 + index * 32 + 32]
            codes = taken[16 + index // 2 * 32 : 48 + index // 2 * 32]
            scale = f4(d * number(_scale(taken[4:16], index)))
            offset = f4(dmin * number(_offset(taken[4:16], index)))
            shift = index % 2 * 4
            for j in range(32):
                put(given, j, f4(f4(scale * number(bits_at(codes[j], shift, 15))) - offset))


@jitable
def _q5_k(stored: Array, out: Array) -> None:
    """As Q4_K; the fifth bit of column j of sub-block i is bit i of byte j."""
    for block in range(out.size // 256):
        taken = stored[block * 176 : block * 176 + 176]
        d, dmin, high = half(taken, 0), half(taken, 2), taken[16:48]
        for index in range(8):
            given = out[block * 256 + index * 32 : block * 256 + index * 32 + 32]
            codes = taken[48 + index // 2 * 32 : 80 + index // 2 * 32]
            scale = f4(d * number(_scale(taken[4:16], index)))
            offset = f4(dmin * number(_offset(taken[4:16], index)))
            shift = index % 2 * 4
            for j in range(32):
                fifth = i4(bits_at(high[j], index, 1) << i4(4))
                code = i4(bits_at(codes[j], shift, 15) | fifth)
                put(given, j, f4(f4(scale * number(code)) - offset))


@jitable
def _signed(stored: Array, at: int) -> np.float32:
    return number(np.int8(stored[at]))


@jitable
def _six(byte: np.uint8, shift: int, highs: np.uint8, high_shift: int) -> np.float32:
    """Return the signed number of 4 low bits of a byte and 2 high ones of another."""
    high = i4(bits_at(highs, high_shift, 3) << i4(4))
    return number(i4(bits_at(byte, shift, 15) | high) - i4(32))


@jitable
def _q6_k(stored: Array, out: Array) -> None:
    """A byte of high bits has those of columns j, j + 32, j + 64 and j + 96 of 128."""
    for block in range(out.size // 256):
        taken = stored[block * 210 : block * 210 + 210]
        d = half(taken, 208)
        for part in range(4):
            low = part // 2 * 64 + part % 2 * 16
            high = 128 + part // 2 * 32 + part % 2 * 16
            scale = 192 + part // 2 * 8 + part % 2
            at = block * 256 + part // 2 * 128 + part % 2 * 16
            s0, s1 = f4(d * _signed(taken, scale)), f4(d * _signed(taken, scale + 2))
            s2, s3 = f4(d * _signed(taken, scale + 4)), f4(d * _signed(taken, scale + 6))
            for j in range(16):
                first, second, highs = taken[low + j], taken[low + 32 + j], taken[high + j]
                put(out, at + j, f4(s0 * _six(first, 0, highs, 0)))
                put(out, at + j + 32, f4(s1 * _six(second, 0, highs, 2)))
                put(out, at + j + 64, f4(s2 * _six(first, 4, highs, 4)))
                put(out, at + j + 96, f4(s3 * _six(second, 4, highs, 6)))


@jitable
def _q2_k(stored: Array, out: Array) -> None:
    """A byte of codes has those of columns j, j + 32, j + 64 and j + 96 of 128."""
    for block in range(out.size // 256):
        taken = stored[block * 84 : block * 84 + 84]
        d, dmin = half(taken, 80), half(taken, 82)
        for part in range(4):
            first = 16 + part // 2 * 32 + part % 2 * 16
            scale = part // 2 * 8 + part % 2
            at = block * 256 + part // 2 * 128 + part % 2 * 16
            b0, b1, b2, b3 = taken[scale], taken[scale + 2], taken[scale + 4], taken[scale + 6]
            s0, m0 = f4(d * number(bits_at(b0, 0, 15))), f4(dmin * number(bits_at(b0, 4, 15)))
            s1, m1 = f4(d * number(bits_at(b1, 0, 15))), f4(dmin * number(bits_at(b1, 4, 15)))
            s2, m2 = f4(d * number(bits_at(b2, 0, 15))), f4(dmin * number(bits_at(b2, 4, 15)))
            s3, m3 = f4(d * number(bits_at(b3, 0, 15))), f4(dmin * number(bits_at(b3, 4, 15)))
            for j in range(16):
                byte = taken[first + j]
                put(out, at + j, f4(f4(s0 * number(bits_at(byte, 0, 3))) - m0))
                put(out, at + j + 32, f4(f4(s1 * number(bits_at(byte, 2, 3))) - m1))
                put(out, at + j + 64, f4(f4(s2 * number(bits_at(byte, 4, 3))) - m2))
                put(out, at + j + 96, f4(f4(s3 * number(bits_at(byte, 6, 3))) - m3))


@jitable
def _q3_k_scale(packed: Array, index: int) -> np.int32:
    """Return scale `index` of the 12 bytes: 4 low bits of one, 2 high bits of another."""
    low = bits_at(packed[index % 8], index // 8 * 4, 15)
    high = bits_at(packed[8 + index % 4], index // 4 * 2, 3)
    return i4(i4(low | i4(high << i4(4))) - i4(32))


@jitable
def _three(byte: np.uint8, shift: int, highs: np.uint8, bit: int) -> np.float32:
    """Return the signed number of 2 low bits of a byte and a high one of another."""
    high = i4(bits_at(highs, bit, 1) << i4(2))
    return number(i4(bits_at(byte, shift, 3) | high) - i4(4))


@jitable
def _q3_k(stored: Array, out: Array) -> None:
    """As Q2_K; the third bits of columns 32 b + j are bit b of byte j, 0 meaning less 4."""
    for block in range(out.size // 256):
        taken = stored[block * 110 : block * 110 + 110]
        d = half(taken, 108)
        for part in range(4):
            first, high = 32 + part // 2 * 32 + part % 2 * 16, part % 2 * 16
            scale, bit = part // 2 * 8 + part % 2, part // 2 * 4
            at = block * 256 + part // 2 * 128 + part % 2 * 16
            s0 = f4(d * number(_q3_k_scale(taken[96:108], scale)))
            s1 = f4(d * number(_q3_k_scale(taken[96:108], scale + 2)))
            s2 = f4(d * number(_q3_k_scale(taken[96:108], scale + 4)))
            s3 = f4(d * number(_q3_k_scale(taken[96:108], scale + 6)))
            for j in range(16):
                byte, highs = taken[first + j], taken[high + j]
                put(out, at + j, f4(s0 * _three(byte, 0, highs, bit)))
                put(out, at + j + 32, f4(s1 * _three(byte, 2, highs, bit + 1)))
                put(out, at + j + 64, f4(s2 * _three(byte, 4, highs, bit + 2)))
                put(out, at + j + 96, f4(s3 * _three(byte, 6, highs, bit + 3)))


@compiled(SIGNATURE)
def q4_k(stored: Array, out: Array, pitches: Pair, shape: Triple) -> bool:
    """Fill rows of super-blocks of 144 bytes: d, dmin, 12 bytes of scales, 128 of codes."""
    wild = False
    for row in range(shape[0]):
        taken = row_of(stored, row, pitches[0], shape[1] * 144)
        given = row_of(out, row, pitches[1], shape[1] * COLS * shape[2])
        if shape[2] == 2:
            _q4_k(taken, given.view(u2))
        else:
            _q4_k(taken, given.view(u4))
        wild |= any_wild(taken, 144, 0)
        wild |= any_wild(taken, 144, 2)
    return wild


@compiled(SIGNATURE)
def q5_k(stored: Array, out: Array, pitches: Pair, shape: Triple) -> bool:
    """Fill rows of super-blocks of 176 bytes: as Q4_K, with 32 bytes of fifth bits."""
    wild = False
    for row in range(shape[0]):
        taken = row_of(stored, row, pitches[0], shape[1] * 176)
        given = row_of(out, row, pitches[1], shape[1] * COLS * shape[2])
        if shape[2] == 2:
            _q5_k(taken, given.view(u2))
        else:
            _q5_k(taken, given.view(u4))
        wild |= any_wild(taken, 176, 0)
        wild |= any_wild(taken, 176, 2)
    return wild


@compiled(SIGNATURE)
def q6_k(stored: Array, out: Array, pitches: Pair, shape: Triple) -> bool:
    """Fill rows of super-blocks of 210 bytes: 128 of low bits, 64 of high, 16 scales, d."""
    wild = False
    for row in range(shape[0]):
        taken = row_of(stored, row, pitches[0], shape[1] * 210)
        given = row_of(out, row, pitches[1], shape[1] * COLS * shape[2])
        if shape[2] == 2:
            _q6_k(taken, given.view(u2))
        else:
            _q6_k(taken, given.view(u4))
        wild |= any_wild(taken, 210, 208)
    return wild


@compiled(SIGNATURE)
def q2_k(stored: Array, out: Array, pitches: Pair, shape: Triple) -> bool:
    """Fill rows of super-blocks of 84 bytes: 16 of scales and offsets, 64 of codes, d, dmin."""
    wild = False
    for row in range(shape[0]):
        taken = row_of(stored, row, pitches[0], shape[1] * 84)
        given = row_of(out, row, pitches[1], shape[1] * COLS * shape[2])
        if shape[2] == 2:
            _q2_k(taken, given.view(u2))
        else:
            _q2_k(taken, given.view(u4))
        wild |= any_wild(taken, 84, 80)
        wild |= any_wild(taken, 84, 82)
    return wild


@compiled(SIGNATURE)
def q3_k(stored: Array, out: Array, pitches: Pair, shape: Triple) -> bool:
    """Fill rows of super-blocks of 110 bytes: 32 of third bits, 64 of codes, 12 of scales, d."""
    wild = False
    for row in range(shape[0]):
        taken = row_of(stored, row, pitches[0], shape[1] * 110)
        given = row_of(out, row, pitches[1], shape[1] * COLS * shape[2])
        if shape[2] == 2:
            _q3_k(taken, given.view(u2))
        else:
            _q3_k(taken, given.view(u4))
        wild |= any_wild(taken, 110, 108)
    return wild
