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
    row_of,
)
from moeconv.kernels.cpu.sixteens import NO_OFFSET, NO_ZERO, By, fields, scale_nibbles, scale_of

COLS = 256  # of a block
scale_two, scale_three = scale_of(fields(2)), scale_of(fields(2, high=1))
scale_five, scale_six = scale_of(fields(4, high=1)), scale_of(fields(4, high=2))
ZERO_3, ZERO_6 = f4(4), f4(32)


@jitable
def _scale(stored: Array, at: int, index: int) -> np.int32:
    """Return the 6-bit scale of sub-block `index`, of the 12 bytes of Q4_K and Q5_K."""
    if index < 4:
        return bits_at(stored[at + index], 0, 63)
    low, high = bits_at(stored[at + index + 4], 0, 15), bits_at(stored[at + index - 4], 6, 3)
    return i4(low | i4(high << i4(4)))


@jitable
def _offset(stored: Array, at: int, index: int) -> np.int32:
    """Return the 6-bit offset of sub-block `index`, of the 12 bytes of Q4_K and Q5_K."""
    if index < 4:
        return bits_at(stored[at + index + 4], 0, 63)
    low, high = bits_at(stored[at + index + 4], 4, 15), bits_at(stored[at + index], 6, 3)
    return i4(low | i4(high << i4(4)))


@jitable
def _affine(stored: Array, at: int, d: np.float32, dmin: np.float32, index: int) -> By:
    """Return what scales sub-block `index` of Q4_K and Q5_K; at: of the 12 bytes."""
    offset = f4(dmin * number(_offset(stored, at, index)))
    return NO_ZERO, f4(d * number(_scale(stored, at, index))), f4(-offset)


@jitable
def _q4_k(stored: Array, out: Array) -> None:
    """The low nibbles of 32 bytes are a sub-block, the high ones the next."""
    for block in range(out.size // 256):
        at = block * 144
        d, dmin = half(stored, at), half(stored, at + 2)
        for pair in range(4):
            first = _affine(stored, at + 4, d, dmin, pair * 2)
            second = _affine(stored, at + 4, d, dmin, pair * 2 + 1)
            for begin in range(0, 32, 16):
                codes = at + 16 + pair * 32 + begin
                given = (block * 256 + pair * 64 + begin) * out.itemsize
                scale_nibbles(stored, out, (codes, 0, given), first)
                scale_nibbles(stored, out, (codes, 4, given + 32 * out.itemsize), second)


@jitable
def _q5_k(stored: Array, out: Array) -> None:
    """As Q4_K; the fifth bit of column j of sub-block i is bit i of byte j."""
    for block in range(out.size // 256):
        at = block * 176
        d, dmin = half(stored, at), half(stored, at + 2)
        for pair in range(4):
            first = _affine(stored, at + 4, d, dmin, pair * 2)
            second = _affine(stored, at + 4, d, dmin, pair * 2 + 1)
            for begin in range(0, 32, 16):
                codes, high = at + 48 + pair * 32 + begin, at + 16 + begin
                given = (block * 256 + pair * 64 + begin) * out.itemsize
                scale_five(stored, out, (codes, 0, high, pair * 2, given), first)
                given += 32 * out.itemsize
                scale_five(stored, out, (codes, 4, high, pair * 2 + 1, given), second)


@jitable
def _signed(stored: Array, at: int) -> np.float32:
    return number(np.int8(stored[at]))


@jitable
def _q6_k(stored: Array, out: Array) -> None:
    """A byte of high bits has those of columns j, j + 32, j + 64 and j + 96 of 128."""
    step = 32 * out.itemsize
    for block in range(out.size // 256):
        begin = block * 210
        d = half(stored, begin + 208)
        for part in range(4):
            low = begin + part // 2 * 64 + part % 2 * 16
            high = begin + 128 + part // 2 * 32 + part % 2 * 16
            scale = begin + 192 + part // 2 * 8 + part % 2
            at = (block * 256 + part // 2 * 128 + part % 2 * 16) * out.itemsize
            s0, s1 = f4(d * _signed(stored, scale)), f4(d * _signed(stored, scale + 2))
            s2, s3 = f4(d * _signed(stored, scale + 4)), f4(d * _signed(stored, scale + 6))
            scale_six(stored, out, (low, 0, high, 0, at), (ZERO_6, s0, NO_OFFSET))
            scale_six(stored, out, (low + 32, 0, high, 2, at + step), (ZERO_6, s1, NO_OFFSET))
            scale_six(stored, out, (low, 4, high, 4, at + 2 * step), (ZERO_6, s2, NO_OFFSET))
            scale_six(stored, out, (low + 32, 4, high, 6, at + 3 * step), (ZERO_6, s3, NO_OFFSET))


@jitable
def _two_by(byte: np.uint8, d: np.float32, dmin: np.float32) -> By:
    """Return what a byte of Q2_K's scales and offsets scales by."""
    offset = f4(dmin * number(bits_at(byte, 4, 15)))
    return NO_ZERO, f4(d * number(bits_at(byte, 0, 15))), f4(-offset)


@jitable
def _q2_k(stored: Array, out: Array) -> None:
    """A byte of codes has those of columns j, j + 32, j + 64 and j + 96 of 128."""
    step = 32 * out.itemsize
    for block in range(out.size // 256):
        begin = block * 84
        d, dmin = half(stored, begin + 80), half(stored, begin + 82)
        for part in range(4):
            first = begin + 16 + part // 2 * 32 + part % 2 * 16
            scale = begin + part // 2 * 8 + part % 2
            at = (block * 256 + part // 2 * 128 + part % 2 * 16) * out.itemsize
            for index in range(4):
                by = _two_by(stored[scale + 2 * index], d, dmin)
                scale_two(stored, out, (first, 2 * index, at + index * step), by)


@jitable
def _q3_k_scale(stored: Array, at: int, index: int) -> np.int32:
    """Return scale `index` of the 12 bytes: 4 low bits of one, 2 high bits of another."""
    low = bits_at(stored[at + index % 8], index // 8 * 4, 15)
    high = bits_at(stored[at + 8 + index % 4], index // 4 * 2, 3)
    return i4(i4(low | i4(high << i4(4))) - i4(32))


@jitable
def _q3_k(stored: Array, out: Array) -> None:
    """As Q2_K; the third bits of columns 32 b + j are bit b of byte j, 0 meaning less 4."""
    step = 32 * out.itemsize
    for block in range(out.size // 256):
        begin = block * 110
        d = half(stored, begin + 108)
        for part in range(4):
            first, high = begin + 32 + part // 2 * 32 + part % 2 * 16, begin + part % 2 * 16
            scale, bit = part // 2 * 8 + part % 2, part // 2 * 4
            at = (block * 256 + part // 2 * 128 + part % 2 * 16) * out.itemsize
            for index in range(4):
                six = _q3_k_scale(stored, begin + 96, scale + 2 * index)
                by = (ZERO_3, f4(d * number(six)), NO_OFFSET)
                place = (first, 2 * index, high, bit + index, at + index * step)
                scale_three(stored, out, place, by)


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
