"""ggml's types with one half (and offset) per 32 columns: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1.

A byte of 4-bit codes holds columns j (low) and j + 16 (high). The order of operations is that of
gguf-py's quants.py.
"""

from __future__ import annotations

from moeconv.kernels.cpu.base import Array, Pair, Triple
from moeconv.kernels.cpu.cache import compiled, jitable
from moeconv.kernels.cpu.floats import u2, u4
from moeconv.kernels.cpu.ggml_values import (
    SIGNATURE,
    any_wild,
    f4,
    half,
    row_of,
)
from moeconv.kernels.cpu.sixteens import (
    NO_OFFSET,
    NO_ZERO,
    scale_nibbles,
    scale_of,
    scale_signed_bytes,
    with_mask,
)

COLS, HALF = 32, 16  # columns of a block; those that take the low nibbles
ZERO_4, ZERO_5 = f4(8), f4(16)
scale_five = scale_of(with_mask)


@jitable
def _q8_0(stored: Array, out: Array) -> None:
    for block in range(out.size // COLS):
        at, given = block * 34, block * COLS * out.itemsize
        by = (NO_ZERO, half(stored, at), NO_OFFSET)
        scale_signed_bytes(stored, out, (at + 2, given), by)
        scale_signed_bytes(stored, out, (at + 18, given + HALF * out.itemsize), by)


@jitable
def _q4_0(stored: Array, out: Array) -> None:
    for block in range(out.size // COLS):
        at, given = block * 18, block * COLS * out.itemsize
        by = (ZERO_4, half(stored, at), NO_OFFSET)
        scale_nibbles(stored, out, (at + 2, 0, given), by)
        scale_nibbles(stored, out, (at + 2, 4, given + HALF * out.itemsize), by)


@jitable
def _q4_1(stored: Array, out: Array) -> None:
    for block in range(out.size // COLS):
        at, given = block * 20, block * COLS * out.itemsize
        by = (NO_ZERO, half(stored, at), half(stored, at + 2))
        scale_nibbles(stored, out, (at + 4, 0, given), by)
        scale_nibbles(stored, out, (at + 4, 4, given + HALF * out.itemsize), by)


@jitable
def _q5_0(stored: Array, out: Array) -> None:
    for block in range(out.size // COLS):
        at, given = block * 22, block * COLS * out.itemsize
        by = (ZERO_5, half(stored, at), NO_OFFSET)
        scale_five(stored, out, (at + 6, 0, at + 2, given), by)
        scale_five(stored, out, (at + 6, 4, at + 4, given + HALF * out.itemsize), by)


@jitable
def _q5_1(stored: Array, out: Array) -> None:
    for block in range(out.size // COLS):
        at, given = block * 24, block * COLS * out.itemsize
        by = (NO_ZERO, half(stored, at), half(stored, at + 2))
        scale_five(stored, out, (at + 8, 0, at + 4, given), by)
        scale_five(stored, out, (at + 8, 4, at + 6, given + HALF * out.itemsize), by)


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
