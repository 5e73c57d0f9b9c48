"""The numbers and scales in ggml's blocks, for any tensor of places in them.

`at` points to the first byte of each element's block, `col` is its column in the block, `group` the
index of its group of columns that share a scale. Constants are named in gpu/ggml.py. The order of
operations is that of gguf-py's quants.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

# ggml-common.h: kvalues_iq4nl, and kvalues_mxfp4 (the values of E2M1 doubled), 4 signed bytes each
IQ4_0, IQ4_1, IQ4_2, IQ4_3 = (
    tl.constexpr(int.from_bytes(bytes(value & 0xFF for value in four), "little", signed=True))
    for four in ((-127, -104, -83, -65), (-49, -35, -22, -10), (1, 13, 25, 38), (53, 69, 89, 113))
)
FP4_0, FP4_1, FP4_2, FP4_3 = (
    tl.constexpr(int.from_bytes(bytes(value & 0xFF for value in four), "little", signed=True))
    for four in ((0, 1, 2, 3), (4, 6, 8, 12), (0, -1, -2, -3), (-4, -6, -8, -12))
)


@triton.jit
def byte(at, mask):
    """Return int32 of bytes."""
    return tl.load(at, mask=mask, other=0).to(tl.int32)


@triton.jit
def run(at, mask, VEC: tl.constexpr):
    """Return int32 of bytes [R, C] that lie side by side for every VEC columns."""
    return byte(tl.max_contiguous(at, (1, VEC)), mask)


@triton.jit
def signed(code):
    """Return int32 of bytes 0..255 that are signed."""
    return (code << 24) >> 24


@triton.jit
def half(at, mask):
    """Return float32 of the float16 in two bytes at any address."""
    bits = byte(at, mask) | (byte(at + 1, mask) << 8)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def looked_up(code, first, second, third, fourth):
    """Return signed byte `code` 0..15 of four words."""
    low = tl.where((code & 4) != 0, second, first)
    high = tl.where((code & 4) != 0, fourth, third)
    word = tl.where((code & 8) != 0, high, low)
    return (word << (24 - ((code & 3) << 3))) >> 24


@triton.jit
def nibbles(at, col, mask, VEC: tl.constexpr):
    """Return 4-bit codes: of 32 columns the first 16 are low, the others high in 16 bytes."""
    return (run(at + (col // 32) * 16 + col % 16, mask, VEC) >> (col % 32 // 16 * 4)) & 15


@triton.jit
def simple_codes(at, col, mask, KIND: tl.constexpr, CODES: tl.constexpr, VEC: tl.constexpr):
    """Return int32 numbers of the types whose blocks have 32 columns, and of IQ4_XS."""
    if KIND == "Q8_0":
        code = signed(run(at + CODES + col, mask, VEC))
    else:
        code = nibbles(at + CODES, col, mask, VEC)
    if KIND == "Q4_0":
        code = code - 8
    elif KIND == "Q5_0":
        code = (code | (((byte(at + 2 + col // 8, mask) >> (col % 8)) & 1) << 4)) - 16
    elif KIND == "Q5_1":
        code = code | (((byte(at + 4 + col // 8, mask) >> (col % 8)) & 1) << 4)
    elif KIND == "MXFP4":
        code = looked_up(code, FP4_0, FP4_1, FP4_2, FP4_3)
    elif KIND == "IQ4_NL" or KIND == "IQ4_XS":
        code = looked_up(code, IQ4_0, IQ4_1, IQ4_2, IQ4_3)
    return code


@triton.jit
def k_codes(at, col, mask, KIND: tl.constexpr, CODES: tl.constexpr, VEC: tl.constexpr):
    """Return int32 numbers of the K types: super-blocks of 256 columns."""
    part, quarter, j = col // 128, col % 128 // 32, col % 32
    if KIND == "Q4_K" or KIND == "Q5_K":
        code = (run(at + CODES + col // 64 * 32 + j, mask, VEC) >> (quarter % 2 * 4)) & 15
        if KIND == "Q5_K":
            code = code | (((run(at + 16 + j, mask, VEC) >> (col // 32)) & 1) << 4)
    elif KIND == "Q6_K":
        low = (
            run(at + CODES + part * 64 + quarter % 2 * 32 + j, mask, VEC) >> (quarter // 2 * 4)
        ) & 15
        high = (run(at + 128 + part * 32 + j, mask, VEC) >> (quarter * 2)) & 3
        code = (low | (high << 4)) - 32
    else:  # Q2_K and Q3_K
        code = (run(at + CODES + part * 32 + j, mask, VEC) >> (quarter * 2)) & 3
        if KIND == "Q3_K":
            code = (code | (((run(at + j, mask, VEC) >> (col // 32)) & 1) << 2)) - 4
    return code


@triton.jit
def six_bits(at, group, mask, OFFSET: tl.constexpr):
    """Return a 6-bit scale of Q4_K and Q5_K, or offset if OFFSET; `at`: their 12 bytes."""
    first, second = byte(at + group % 4, mask), byte(at + group % 4 + 4, mask)
    third = byte(at + group % 4 + 8, mask)
    if OFFSET:
        found = tl.where(group < 4, second & 63, (third >> 4) | ((second >> 6) << 4))
    else:
        found = tl.where(group < 4, first & 63, (third & 15) | ((first >> 6) << 4))
    return found


@triton.jit
def factors(at, group, mask, KIND: tl.constexpr):
    """Return the int32 factor of a group's scale in K types and IQ4_XS."""
    if KIND == "Q4_K" or KIND == "Q5_K":
        found = six_bits(at + 4, group, mask, False)
    elif KIND == "Q6_K":
        found = signed(byte(at + 192 + group, mask))
    elif KIND == "Q2_K":
        found = byte(at + group, mask) & 15
    elif KIND == "Q3_K":
        low = (byte(at + 96 + group % 8, mask) >> (group // 8 * 4)) & 15
        high = (byte(at + 104 + group % 4, mask) >> (group // 4 * 2)) & 3
        found = (low | (high << 4)) - 32
    else:  # IQ4_XS
        low = (byte(at + 4 + group // 2, mask) >> (group % 2 * 4)) & 15
        high = (byte(at + 2 + group // 4, mask) >> (group % 4 * 2)) & 3
        found = (low | (high << 4)) - 32
    return found


@triton.jit
def group_scales(at, group, mask, KIND: tl.constexpr, HALF: tl.constexpr, GROUPS: tl.constexpr):
    """Return the float32 scale of each group; HALF: where the block's is, GROUPS: how many."""
    if KIND == "MXFP4":  # half of 2^(b - 127), because the values are doubled
        code = byte(at, mask)
        bits = tl.where(code < 2, 0x00200000 << code, (code - 1) << 23)
        scale = bits.to(tl.float32, bitcast=True)
    else:
        scale = half(at + HALF, mask)
        if GROUPS > 1:
            scale = scale * factors(at, group, mask, KIND).to(tl.float32)
    return scale


@triton.jit
def group_offsets(at, group, mask, KIND: tl.constexpr, HALF: tl.constexpr):
    """Return the float32 that is added to each group of the types that have one."""
    found = half(at + HALF + 2, mask)
    if KIND == "Q2_K":
        found = -(found * (byte(at + group, mask) >> 4).to(tl.float32))
    elif KIND == "Q4_K" or KIND == "Q5_K":
        found = -(found * six_bits(at + 4, group, mask, True).to(tl.float32))
    return found
