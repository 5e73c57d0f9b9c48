"""ggml's block types: the compiled kernel of a type, or gguf-py's decoder where there is none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from moeconv.codecs.base import Window
from moeconv.codecs.ggml import dequantize_rows
from moeconv.kernels.cpu import ggml_k, ggml_looked_up, ggml_simple
from moeconv.kernels.cpu.base import ELEMENTS, Array, Counts, check_array, rows_of
from moeconv.kernels.cpu.cache import Compiled
from moeconv.kernels.cpu.copies import count_nonfinite
from moeconv.kernels.cpu.floats import round_to
from moeconv.types import Params

TILE = 1 << 17  # elements decoded before they are rounded: 512 KiB of float32 stay in L2
U8 = np.dtype(np.uint8)


class BlockType(NamedTuple):
    """What decodes a type's blocks of `nbytes` bytes, `cols` columns each, to BF16 and F32."""

    decode: Compiled
    cols: int
    nbytes: int


BLOCK_TYPES: Mapping[str, BlockType] = {
    "Q4_0": BlockType(ggml_simple.q4_0, 32, 18),
    "Q4_1": BlockType(ggml_simple.q4_1, 32, 20),
    "Q5_0": BlockType(ggml_simple.q5_0, 32, 22),
    "Q5_1": BlockType(ggml_simple.q5_1, 32, 24),
    "Q8_0": BlockType(ggml_simple.q8_0, 32, 34),
    "Q2_K": BlockType(ggml_k.q2_k, 256, 84),
    "Q3_K": BlockType(ggml_k.q3_k, 256, 110),
    "Q4_K": BlockType(ggml_k.q4_k, 256, 144),
    "Q5_K": BlockType(ggml_k.q5_k, 256, 176),
    "Q6_K": BlockType(ggml_k.q6_k, 256, 210),
    "IQ4_NL": BlockType(ggml_looked_up.iq4_nl, 32, 18),
    "IQ4_XS": BlockType(ggml_looked_up.iq4_xs, 256, 136),
    "MXFP4": BlockType(ggml_looked_up.mxfp4, 32, 17),
}


def _decode_blocks(kind: BlockType, stored: Array, out: Array) -> bool:
    """Fill `out` [R, C], float32 or bits of BF16; return whether it may hold NaN or Inf."""
    taken, given = rows_of(stored), rows_of(out)
    shape = (out.shape[0], out.shape[1] // kind.cols, out.itemsize)
    return bool(kind.decode(taken.memory, given.memory, (taken.pitch, given.pitch), shape))


def _decode_tile(name: str, stored: Array, out_dtype: str, out: Array) -> Counts:
    """Fill `out` [R, C] by way of float32 values; return the counts."""
    kind = BLOCK_TYPES.get(name)
    if kind is None:
        return round_to(out_dtype, dequantize_rows(np.ascontiguousarray(stored), name), out)
    values = np.empty(out.shape, np.float32)
    _decode_blocks(kind, stored, values)
    return round_to(out_dtype, values, out)


def _decode_by_tiles(name: str, stored: Array, out_dtype: str, out: Array) -> Counts:
    """Fill `out` [R, C] by rows that have TILE elements or few more; return the counts."""
    nan = inf = overflow = 0
    rows, cols = out.shape
    step = -(-TILE // cols)
    for start in range(0, rows, step):
        tile = slice(start, start + step)
        found = _decode_tile(name, stored[tile], out_dtype, out[tile])
        nan, inf, overflow = nan + found.nan, inf + found.inf, overflow + found.overflow
    return Counts(nan, inf, overflow)


def decode(
    parts: Mapping[str, Array], window: Window, params: Params, out_dtype: str, out: Array
) -> Counts:
    """Fill `out` [R, C] from the blocks [R, C / block_cols * block_nbytes] uint8.

    Equals gguf-py's float32 rounded once; tests/kernels/test_cpu_ggml.py holds it to that.
    """
    name, stored = str(params["type"]), parts["weight"]
    kind = BLOCK_TYPES.get(name)
    cols = kind.cols if kind else int(params["block_cols"])
    nbytes = kind.nbytes if kind else int(params["block_nbytes"])
    blocks = -(-window.cols // cols)
    check_array("weight", stored, U8, (window.rows, blocks * nbytes))
    check_array("out", out, ELEMENTS[out_dtype], (window.rows, blocks * cols))
    if not out.size:
        return Counts(0, 0, 0)
    if kind is None or out_dtype == "F16":
        return _decode_by_tiles(name, stored, out_dtype, out)
    # Nothing overflows on the way to BF16: see ggml_values.py, and MXFP4 is exact in it.
    wild = _decode_blocks(kind, stored, out)
    return Counts(*(count_nonfinite(out, out_dtype) if wild else (0, 0)), 0)
