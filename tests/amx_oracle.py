"""kt-kernel's packed forms, written a second time: element by element, from the closed form."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
BITS = {"amxint4": 4, "amxint8": 8}
N_BLOCK = {"amxint4": 128, "amxint8": 64}
K_BLOCK = 3584


def bf16(values: Array) -> Array:
    """Return the nearest BF16 (even) of finite float32, as uint16 bits."""
    bits = np.asarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def floats(bits: Array) -> Array:
    """Return the float32 of BF16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def single(value: float) -> float:
    """Return a float64 rounded to float32."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def row(values: Sequence[float], form: str) -> tuple[float, list[int]]:
    """Return the scale and the codes of one row: plain Python numbers, rounded where float32 is.

    A product or quotient of two float32 is rounded right when it goes through float64.
    """
    largest = max(abs(value) for value in values)
    scale = single(largest * single(1 / 127)) if form == "amxint8" else single(largest * (1 / 112))
    codes = []
    for value in values:
        if scale == 0:
            codes.append(0)
            continue
        scaled = single(value * single(1 / scale))
        code = min(max(round(scaled), -128), 127)  # round() is to nearest even
        if form == "amxint4":
            code = int(math.copysign((abs(code) + 8) >> 4, code))
        codes.append(code)
    return scale, codes


def pack(codes: Sequence[Sequence[int]], form: str) -> bytes:
    """Return the bytes of codes [N][K], each put where the closed form says."""
    rows, cols = len(codes), len(codes[0])
    bits, block = BITS[form], N_BLOCK[form]
    tile_cols = 512 // bits
    out = bytearray(rows * cols * bits // 8)
    for n in range(rows):
        n0 = n // block * block
        height = min(block, rows - n0)
        for k in range(cols):
            k0 = k // K_BLOCK * K_BLOCK
            width = min(K_BLOCK, cols - k0)
            r, c = n - n0, k - k0
            tile = n0 * cols + k0 * height + r // 32 * 32 * width + c // tile_cols * tile_cols * 32
            j = c % 64
            at = tile * bits // 8 + r % 32 // 16 * 1024 + j // 4 * 64 + r % 16 * 4 + j % 4
            if bits == 8:
                out[at] = codes[n][k] & 255
            else:
                out[at] |= (codes[n][k] & 15) << (4 if c % 128 >= 64 else 0)
    return bytes(out)


def encode(bits: Array, form: str) -> tuple[bytes, Array]:
    """Return (bytes, float32 scales) of BF16 bits [N, K]."""
    made = [row(line.tolist(), form) for line in floats(bits)]
    return pack([codes for _, codes in made], form), np.array([s for s, _ in made], np.float32)


def stored(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Return name -> (dtype, shape, bytes) of a safetensors file, by no reader's dtypes."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    return {
        name: (
            entry["dtype"],
            entry["shape"],
            raw[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]],
        )
        for name, entry in json.loads(raw[8:start]).items()
        if name != "__metadata__"
    }
