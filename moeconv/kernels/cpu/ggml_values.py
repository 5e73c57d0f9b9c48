"""What the kernels of ggml's block types share.

Scales are halves: every product of a scale, its own factor and a code is exact in float32 and a
multiple of 2^-24. So none is ever subnormal, a fused multiply-add would change no bit, and no
finite number becomes Inf in BF16. (MXFP4, in ggml_looked_up.py, is the exception.)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moeconv.kernels.cpu.base import BYTES_IN, BYTES_OUT, PAIR, TRIPLE, Array
from moeconv.kernels.cpu.cache import jitable
from moeconv.kernels.cpu.floats import NAN, as_f32, as_u4, u4

# Of every type's kernel: stored bytes, output bytes, pitches (bytes per row of both), shape (rows,
# blocks per row, bytes per output element). It returns whether the output may hold NaN or Inf.
SIGNATURE = (BYTES_IN, BYTES_OUT, PAIR, TRIPLE)
f4, i4 = np.float32, np.int32


@jitable
def half(stored: Array, at: int) -> np.float32:
    """Return the float16 in the bytes `at` and `at` + 1, NaN canonical."""
    bits = u4(u4(stored[at]) | u4(u4(stored[at + 1]) << u4(8)))
    sign = u4((bits & u4(0x8000)) << u4(16))
    magnitude = u4(bits & u4(0x7FFF))
    # A subnormal is an integer times 2^-24: exact, and a normal float32.
    tiny = as_u4(f4(f4(i4(magnitude)) * f4(2.0**-24)))
    wider = u4(u4(magnitude << u4(13)) + u4(112 << 23))
    wider = tiny if magnitude < u4(0x400) else wider
    wider = u4(wider + u4(112 << 23)) if magnitude >= u4(0x7C00) else wider
    return as_f32(NAN if magnitude > u4(0x7C00) else u4(sign | wider))


@jitable
def number(code: np.signedinteger[Any]) -> np.float32:
    """Return a small integer as float32, by way of int32, whose conversion is vectorised."""
    return f4(i4(code))


@jitable
def bits_at(byte: np.uint8, shift: int, mask: int) -> np.int32:
    """Return the bits of a byte under `mask`, once it is shifted to the right."""
    return i4(u4(u4(u4(byte) >> u4(shift)) & u4(mask)))


@jitable
def is_narrow(out: Array) -> bool:
    """Return whether elements are 16 bits wide; of the type alone, so known when compiled."""
    kind = out.dtype.type
    return bool(kind(0x10000) == kind(0))


@jitable
def row_of(memory: Array, row: int, pitch: int, nbytes: int) -> Array:
    """Return the bytes of a row."""
    return memory[row * pitch : row * pitch + nbytes]


@jitable
def any_wild(row: Array, step: int, at: int) -> bool:
    """Return whether a half at the bytes `at`, at + step, ... of a row is NaN or Inf."""
    found = False
    for i in range(at + 1, row.size, step):
        found |= (row[i] & np.uint8(0x7C)) == np.uint8(0x7C)
    return found
