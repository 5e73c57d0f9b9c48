"""ggml's blocks for tests of kernels: random bytes, halves of every kind, gguf-py's decoders."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import torch

from moeconv.kernels.cpu import Counts
from moeconv.measure.cases import HALVES  # where a block keeps its halves
from moeconv.types import Params
from tests.kernels.oracle import rounded


def params_of(kind: str) -> Params:
    cols, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return {"type": kind, "block_cols": int(cols), "block_nbytes": int(nbytes)}


def some_blocks(kind: str, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    """Return random bytes: one half in 32 is NaN or Inf, as many are subnormal."""
    nbytes = int(params_of(kind)["block_nbytes"])
    return np.random.default_rng(seed).integers(0, 256, (rows, blocks * nbytes), np.uint8)


def tamed(kind: str, rows: np.ndarray) -> np.ndarray:
    """Return the rows with halves below 2, and scale bytes of MXFP4 that overflow nothing."""
    nbytes = int(params_of(kind)["block_nbytes"])
    blocks = rows.copy().reshape(-1, nbytes)
    for at in HALVES.get(kind, ()):
        blocks[:, at + 1] &= 0xBF
    if kind == "MXFP4":
        blocks[:, 0] = 100 + blocks[:, 0] % 30
    return blocks.reshape(rows.shape)


def expected(kind: str, rows: np.ndarray, dtype: str) -> tuple[np.ndarray, Counts]:
    with np.errstate(all="ignore"):
        values = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
    return rounded(torch.from_numpy(values), dtype)


def half(value: float) -> bytes:
    return struct.pack("<e", value)
