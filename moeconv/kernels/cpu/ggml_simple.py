"""ggml's types with one half (and offset) per 32 columns: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1.

A byte of 4-bit codes holds columns j (low) and j + 16 (high). The order of operations is that of
gguf-py's quants.py.
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

COLS = 32  # of a block


@jitable
def _q8_0(stored: Array, out: Array) -> None:
    for block in range(out.size // 32):
        taken = stored[block * 34 : block * 34 + 34]
        given = out[block * 32 : block * 32 + 32]
        d = half(taken, 0)
        for j in range(32):
            put(given, j, f4(number(np.int8(taken[2 + j])) * d))


@jitable
def _q4_0(stored: Array, out: Array) -> None:
    for block in range(out.size // 32):
        taken = stored[block * 18 : block * 18 + 18]
        given = out[block * 32 : block * 32 + 32]
        d = half(taken, 0)
        for j in range(16):
            byte = taken[2 + j]
            put(given, j, f4(d * number(bits_at(byte, 0, 15) - i4(8))))
            put(given, j + 16, f4(d * number(bits_at(byte, 4, 15) - i4(8))))


@jitable
def _q4_1(stored: Array, out: Array) -> None:
    for block in range(out.size // 32):
        taken = stored[block * 20 : block * 20 + 20]
        given = out[block * 32 : block * 32 + 32]
        d, m = half(taken, 0), half(taken, 2)
        for j in range(16):
            byte = taken[4 + j]
            put(given, j, f4(f4(d * number(bits_at(byte, 0, 15))) + m))
            put(given, j + 16, f4(f4(d * number(bits_at(byte, 4, 15))) + m))


@jitable
def _word(stored: Array, at: int) -> np.uint32:
    """Return the little-endian uint32 that begins at byte `at`."""
    low = u4(u4(stored[at]) | u4(u4(stored[at + 1]) << u4(8)))
    high = u4(u4(stored[at + 2]) | u4(u4(stored[at + 3]) << u4(8)))
    return u4(low | u4(high << u4(16)))


@jitable
def _fifth(word: np.uint32, bit: int) -> np.int32:
    """Return 16 where the bit of the word is set."""
    return i4(u4(u4(u4(word >> u4(bit)) & u4(1)) << u4(4)))


@jitable
def _q5_0(stored: Array, out: Array) -> None:
    for block in range(out.size // 32):
        taken = stored[block * 22 : block * 22 + 22]
        given = out[block * 32 : block * 32 + 32]
        d, high = half(taken, 0), _word(taken, 2)
        for j in range(16):
            byte = taken[6 + j]
            first = i4(bits_at(byte, 0, 15) | _fifth(high, j))
            second = i4(bits_at(byte, 4, 15) | _fifth(high, j + 16))
            put(given, j, f4(d * number(first - i4(16))))
            put(given, j + 16, f4(d * number(second - i4(16))))


@jitable
def _q5_1(stored: Array, out: Array) -> None:
    for block in range(out.size // 32):
        taken = stored[block * 24 : block * 24 + 24]
        given = out[block * 32 : block * 32 + 32]
        d, m, high = half(taken, 0), half(taken, 2), _word(taken, 4)
        for j in range(16):
            byte = taken[8 + j]
            first = i4(bits_at(byte, 0, 15) | _fifth(high, j))
            second = i4(bits_at(byte, 4, 15) | _fifth(high, j + 16))
            put(given, j, f4(f4(d * number(first)) + m))
            put(given, j + 16, f4(f4(d * number(second)) + m))


@compiled(SIGNATURE)
def q8_0(stored: Array, out: Array, pitches: Pair, shape: Triple) -> bool:
    """Fill rows of blocks of 34 bytes: d, 32 signed bytes."""
    wild = False
    for row in range(shape[0]):
        taken = row_of(stored, row, pitches[0], shape[1] * 34)
        given = row_of(out, row, pitches[1], shape[1] * COLS * shape[2])
        if shape[2] == 2:
            _q8_0(taken, given.view(u2))
        else:
            _q8_0(taken, given.view(u4))
        wild |= any_wild(taken, 34, 0)
    return wild


@compiled(SIGNATURE)
def q4_0(stored: Array, out: Array, pitches: Pair, shape: Triple) -> bool:
    """Fill rows of blocks of 18 bytes: d, 16 bytes of codes."""
    wild = False
    for row in range(shape[0]):
        taken = row_of(stored, row, pitches[0], shape[1] * 18)
        given = row_of(out, row, pitches[1], shape[1] * COLS * shape[2])
        if shape[2] == 2:
            _q4_0(taken, given.view(u2))
        else:
            _q4_0(taken, given.view(u4))
        wild |= any_wild(taken, 18, 0)
    return wild


@compiled(SIGNATURE)
def q4_1(stored: Array, out: Array, pitches: Pair, shape: Triple) -> bool:
    """Fill rows of blocks of 20 bytes: d, m, 16 bytes of codes."""
    wild = False
    for row in range(shape[0]):
        taken = row_of(stored, row, pitches[0], shape[1] * 20)
        given = row_of(out, row, pitches[1], shape[1] * COLS * shape[2])
        if shape[2] == 2:
            _q4_1(taken, given.view(u2))
        else:
            _q4_1(taken, given.view(u4))
        wild |= any_wild(taken, 20, 0)
        wild |= any_wild(taken, 20, 2)
    return wild


@compiled(SIGNATURE)
def q5_0(stored: Array, out: Array, pitches: Pair, shape: Triple) -> bool:
    """Fill rows of blocks of 22 bytes: d, the codes' fifth bits, 16 bytes of the others."""
    wild = False
    for row in range(shape[0]):
        taken = row_of(stored, row, pitches[0], shape[1] * 22)
        given = row_of(out, row, pitches[1], shape[1] * COLS * shape[2])
        if shape[2] == 2:
            _q5_0(taken, given.view(u2))
        else:
            _q5_0(taken, given.view(u4))
        wild |= any_wild(taken, 22, 0)
    return wild


@compiled(SIGNATURE)
def q5_1(stored: Array, out: Array, pitches: Pair, shape: Triple) -> bool:
    """Fill rows of blocks of 24 bytes: d, m, the codes' fifth bits, 16 bytes of the others."""
    wild = False
    for row in range(shape[0]):
        taken = row_of(stored, row, pitches[0], shape[1] * 24)
        given = row_of(out, row, pitches[1], shape[1] * COLS * shape[2])
        if shape[2] == 2:
            _q5_1(taken, given.view(u2))
        else:
            _q5_1(taken, given.view(u4))
        wild |= any_wild(taken, 24, 0)
        wild |= any_wild(taken, 24, 2)
    return wild
