"""Plain floats for tests of casts: every 16-bit code, edges of the wide ones, torch's casts."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from moeconv.kernels.cpu import Counts

TORCH = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
BITS = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32, "F64": np.uint64}
NAN = {"BF16": 0x7FC0, "F16": 0x7E00, "F32": 0x7FC00000}
PAIRS = list(itertools.product(TORCH, NAN))


def as_torch(bits: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.from_numpy(bits.view(f"i{bits.itemsize}").copy()).view(TORCH[dtype])


def as_bits(values: torch.Tensor, dtype: str) -> np.ndarray:
    """Return the bits of a tensor, NaN canonical."""
    whole = {2: torch.int16, 4: torch.int32}[values.element_size()]
    bits = values.view(whole).numpy().view(BITS[dtype]).copy()
    bits[values.isnan().numpy()] = NAN[dtype]
    return bits


def expected(bits: np.ndarray, stored: str, dtype: str) -> tuple[np.ndarray, Counts]:
    wide = as_torch(bits, stored).float()
    given = wide.to(TORCH[dtype])
    overflow = wide.isfinite() & given.isinf()
    counts = Counts(*(int(kind.sum()) for kind in (wide.isnan(), wide.isinf(), overflow)))
    return (bits if stored == dtype else as_bits(given, dtype)), counts


def edges_f32() -> np.ndarray:
    """Return float32 bits: around every exponent and every halfway of BF16 and F16."""
    near = np.arange(-2, 3)
    # A bit below, at and above each of: ties of BF16 (bit 15), ties of F16 (bit 12), powers.
    steps = [0, 1 << 12, 3 << 12, 1 << 13, 1 << 15, 3 << 15, 1 << 16, 0x7F8000, 0x7FF000]
    exponents = np.arange(256, dtype=np.int64) << 23
    base = (exponents[:, None, None] + np.array(steps)[None, :, None] + near).ravel()
    base = np.concatenate([base, 1 << np.arange(31), (1 << np.arange(31)) * 3 // 2])
    base = base[(base >= 0) & (base < 1 << 31)]
    return np.concatenate([base, base | (1 << 31)]).astype(np.uint32)


def edges_f64() -> np.ndarray:
    """Return float64 bits: what surrounds each float32 edge, its halfway, and beyond its range."""
    with np.errstate(invalid="ignore"):  # signalling NaN
        wide = edges_f32().view(np.float32).astype(np.float64)
    finite = wide.view(np.uint64).astype(object)
    halves = [
        int(bits) + step for bits in finite for step in (0, 1, (1 << 28) - 1, 1 << 28, 1 << 29)
    ]
    tiny = [0, 1, 1 << 51, 1 << 52]
    # Around 2^-150, half of float32's smallest number, and the whole subnormal range.
    small = [(e << 52) + m for e in range(868, 900) for m in (0, 1, 1 << 51, (1 << 51) + 1)]
    large = [0x47EFFFFFE0000000, 0x47EFFFFFEFFFFFFF, 0x47EFFFFFF0000000, 0x7FEFFFFFFFFFFFFF]
    special = [0x7FF0000000000000, 0x7FF0000000000001, 0x7FFFFFFFFFFFFFFF]
    plain = tiny + small + large + special
    signed = [bits | 1 << 63 for bits in plain]
    wrapped = [bits & ((1 << 64) - 1) for bits in halves + plain + signed]
    return np.array(wrapped, np.uint64)


def samples(stored: str) -> np.ndarray:
    """Return [1, N] bits of a dtype: all of the 16-bit ones, edges and random bits of the rest."""
    rng = np.random.default_rng(1)
    if stored in ("BF16", "F16"):
        return np.arange(1 << 16, dtype=np.uint16)[None]
    if stored == "F32":
        noise = rng.integers(0, 1 << 32, 1 << 17, dtype=np.uint32)
        return np.concatenate([edges_f32(), noise])[None]
    noise = rng.integers(0, 1 << 64, 1 << 16, dtype=np.uint64)
    near = rng.normal(size=1 << 16) * 2.0 ** rng.integers(-160, 130, 1 << 16)
    return np.concatenate([edges_f64(), noise, near.view(np.uint64)])[None]
