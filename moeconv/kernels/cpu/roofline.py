"""What memory allows a kernel: compiled loops that move as many bytes and do nothing else."""

from __future__ import annotations

import numpy as np

from moeconv.kernels.cpu.base import BYTES_IN, BYTES_OUT, Array
from moeconv.kernels.cpu.cache import Compiled, compiled

OUTPUT_BITS = 16  # per value, as a kernel writes BF16
u2, u4 = np.uint16, np.uint32


@compiled((BYTES_IN, BYTES_OUT))
def _expand4(source: Array, out: Array) -> None:
    """Write four bytes for every byte."""
    given = out.view(u4)
    for i in range(source.size):
        given[i] = u4(source[i]) * u4(0x01010101)


@compiled((BYTES_IN, BYTES_OUT))
def _expand8(source: Array, out: Array) -> None:
    """Write two bytes for every byte."""
    given = out.view(u2)
    for i in range(source.size):
        given[i] = u2(source[i]) << u2(8)


@compiled((BYTES_IN, BYTES_OUT))
def _copy16(source: Array, out: Array) -> None:
    """Write two bytes for every two bytes."""
    taken, given = source.view(u2), out.view(u2)
    for i in range(taken.size):
        given[i] = taken[i] ^ u2(1)


@compiled((BYTES_IN, BYTES_OUT))
def _narrow32(source: Array, out: Array) -> None:
    """Write two bytes for every four bytes."""
    taken, given = source.view(u4), out.view(u2)
    for i in range(taken.size):
        given[i] = taken[i] >> u4(16)


# Bits read per value that is written -> the loop, over uint8 memory.
ROOFS: dict[int, Compiled] = {4: _expand4, 8: _expand8, 16: _copy16, 32: _narrow32}


def roof_bits(bits: int) -> int:
    """Return the roof of a format: the next wider one, except that up to 5 bits take 4."""
    return 4 if bits <= 5 else next(wide for wide in ROOFS if bits <= wide)


def read_nbytes(bits: int, output_nbytes: int) -> int:
    """Return the bytes that a roof reads to write `output_nbytes`."""
    return output_nbytes * bits // OUTPUT_BITS
