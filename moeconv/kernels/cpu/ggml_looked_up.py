"""ggml's types whose codes are looked up: MXFP4, IQ4_NL, IQ4_XS.

A table of 16 signed bytes is one vector, of which a shuffle picks 16 at once. A byte of codes holds
columns j (low) and j + 16 (high) of 32. The order of operations is that of gguf-py's quants.py.
"""

from __future__ import annotations

import numpy as np

from moeconv.kernels.cpu.base import Array, Pair, Triple
from moeconv.kernels.cpu.cache import compiled, jitable
from moeconv.kernels.cpu.floats import as_f32, u2, u4
from moeconv.kernels.cpu.ggml_values import (
    SIGNATURE,
    any_wild,
    bits_at,
    f4,
    half,
    i4,
    is_narrow,
    number,
    row_of,
)
from moeconv.kernels.cpu.sixteens import NO_OFFSET, NO_ZERO, looked_up, scale_of

# ggml-common.h: kvalues_iq4nl, and kvalues_mxfp4 (the values of E2M1 doubled, without -0)
IQ4 = np.array((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113), np.int8)
E2M1 = np.array((0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12), np.int8)
scale_iq4, scale_e2m1 = scale_of(looked_up(IQ4.tolist())), scale_of(looked_up(E2M1.tolist()))
LAST_TAME = 252  # the last scale byte of MXFP4 with which no product is Inf
# The float32 bits of E2M1 times 2^-128 and 2^-127, scales that are subnormal; most products are.
TINY = (E2M1.astype(np.float64) * [[2.0**-128], [2.0**-127]]).astype(f4).view(u4)


@jitable
def _iq4_nl(stored: Array, out: Array) -> None:
    for block in range(out.size // 32):
        at, given = block * 18, block * 32 * out.itemsize
        by = (NO_ZERO, half(stored, at), NO_OFFSET)
        scale_iq4(stored, out, (at + 2, 0, given), by)
        scale_iq4(stored, out, (at + 2, 4, given + 16 * out.itemsize), by)


@jitable
def _iq4_xs(stored: Array, out: Array) -> None:
    """8 scales of 6 bits: 2 high ones of bytes 2 and 3, 4 low ones of bytes 4 to 7."""
    for block in range(out.size // 256):
        at = block * 136
        d = half(stored, at)
        for index in range(8):
            low = bits_at(stored[at + 4 + index // 2], index % 2 * 4, 15)
            high = bits_at(stored[at + 2 + index // 4], index % 4 * 2, 3)
            by = (NO_ZERO, f4(d * number(i4(low | i4(high << i4(4))) - i4(32))), NO_OFFSET)
            codes, given = at + 8 + index * 16, (block * 256 + index * 32) * out.itemsize
            scale_iq4(stored, out, (codes, 0, given), by)
            scale_iq4(stored, out, (codes, 4, given + 16 * out.itemsize), by)


@jitable
def _tiny(codes: Array, scale: int, out: Array) -> None:
    """Fill 32 columns of scale byte 0 or 1. BF16 is exact, too: its bits are the upper ones."""
    shift = u4(16) if is_narrow(out) else u4(0)
    for j in range(16):
        out[j] = u4(TINY[scale, codes[j] & np.uint8(15)] >> shift)
        out[j + 16] = u4(TINY[scale, codes[j] >> np.uint8(4)] >> shift)


@jitable
def _mxfp4(stored: Array, out: Array) -> None:
    """Scale byte b is half of 2^(b - 127), because the values are doubled."""
    for block in range(out.size // 32):
        at, given = block * 17, block * 32 * out.itemsize
        scale = as_f32(u4(u4(stored[at]) - u4(1)) << u4(23))  # wrong for 0 and 1: see below
        by = (NO_ZERO, scale, NO_OFFSET)
        scale_e2m1(stored, out, (at + 1, 0, given), by)
        scale_e2m1(stored, out, (at + 1, 4, given + 16 * out.itemsize), by)
    for block in range(out.size // 32):  # apart: a branch above would cost the loop's speed
        if stored[block * 17] < 2:
            codes = stored[block * 17 + 1 : block * 17 + 17]
            _tiny(codes, stored[block * 17], out[block * 32 : block * 32 + 32])


@compiled(SIGNATURE)
def iq4_nl(stored: Array, out: Array, pitches: Pair, shape: Triple) -> bool:
    """Fill rows of blocks of 18 bytes for 32 columns."""
    wild = False
    for row in range(shape[0]):
        taken = row_of(stored, row, pitches[0], shape[1] * 18)
        given = row_of(out, row, pitches[1], shape[1] * 32 * shape[2])
        if shape[2] == 2:
            _iq4_nl(taken, given.view(u2))
        else:
            _iq4_nl(taken, given.view(u4))
        wild |= any_wild(taken, 18, 0)
    return wild


@compiled(SIGNATURE)
def iq4_xs(stored: Array, out: Array, pitches: Pair, shape: Triple) -> bool:
    """Fill rows of super-blocks of 136 bytes for 256 columns."""
    wild = False
    for row in range(shape[0]):
        taken = row_of(stored, row, pitches[0], shape[1] * 136)
        given = row_of(out, row, pitches[1], shape[1] * 256 * shape[2])
        if shape[2] == 2:
            _iq4_xs(taken, given.view(u2))
        else:
            _iq4_xs(taken, given.view(u4))
        wild |= any_wild(taken, 136, 0)
    return wild


@compiled(SIGNATURE)
def mxfp4(stored: Array, out: Array, pitches: Pair, shape: Triple) -> bool:
    """Fill rows of blocks of 17 bytes for 32 columns."""
    wild = False
    for row in range(shape[0]):
        taken = row_of(stored, row, pitches[0], shape[1] * 17)
        given = row_of(out, row, pitches[1], shape[1] * 32 * shape[2])
        if shape[2] == 2:
            _mxfp4(taken, given.view(u2))
        else:
            _mxfp4(taken, given.view(u4))
        for block in range(shape[1]):
            wild |= taken[block * 17] > LAST_TAME
    return wild
