"""Casts between plain floats: every 16-bit code and the edges of the wide ones, against torch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from moeconv.codecs.base import Window
from moeconv.errors import ShapeMismatch
from moeconv.kernels.cpu import KERNELS, Counts, round_to

CAST = KERNELS["float"]
TORCH = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
BITS = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32, "F64": np.uint64}
GIVEN = {"BF16": np.uint16, "F16": np.uint16, "F32": np.float32, "F64": np.float64}
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


def cast(bits: np.ndarray, stored: str, dtype: str) -> tuple[np.ndarray, Counts]:
    rows, cols = bits.shape
    out = np.full((rows, cols), 3, GIVEN[dtype])
    source = bits.view(GIVEN[stored])
    counts = CAST({"weight": source}, Window(0, rows, 0, cols), {"dtype": stored}, dtype, out)
    return out.view(BITS[dtype]), counts


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


@pytest.mark.parametrize(("stored", "dtype"), PAIRS)
def test_equals_torch(stored: str, dtype: str) -> None:
    bits = samples(stored)
    found, counts = cast(bits, stored, dtype)
    wanted, wanted_counts = expected(bits, stored, dtype)
    wrong = np.flatnonzero(found != wanted)
    assert [hex(b) for b in bits.ravel()[wrong[:5]]] == []
    assert counts == wanted_counts


@pytest.mark.parametrize(
    ("bits", "stored", "dtype", "wanted"),
    [
        (0x3F808000, "F32", "BF16", 0x3F80),  # a tie goes to the even one, down
        (0x3F818000, "F32", "BF16", 0x3F82),  # and up
        (0x7F7F8000, "F32", "BF16", 0x7F80),  # halfway past the largest
        (0x7F7F7FFF, "F32", "BF16", 0x7F7F),
        (0x80000000, "F32", "BF16", 0x8000),  # -0
        (0x00400000, "F32", "BF16", 0x0040),  # 2^-127 is subnormal in both
        (0xFF800001, "F32", "BF16", 0x7FC0),  # NaN would round to -Inf
        (0x477FEFFF, "F32", "F16", 0x7BFF),
        (0x477FF000, "F32", "F16", 0x7C00),  # 65520
        (0x33000000, "F32", "F16", 0x0000),  # 2^-25, half of the smallest
        (0x33000001, "F32", "F16", 0x0001),
        (0x0001, "F16", "F32", 0x33800000),  # 2^-24
        (0x8000, "F16", "BF16", 0x8000),
        (0x0001, "BF16", "F32", 0x00010000),
        (0x3690000000000000, "F64", "F32", 0),  # 2^-150
        (0x3690000000000001, "F64", "F32", 1),
        (0x3FF0000010000000, "F64", "F32", 0x3F800000),
        (0x47EFFFFFF0000000, "F64", "F32", 0x7F800000),
        # Above the tie of BF16, but a tie once in float32: the way goes through float32.
        (0x3FF0100000000001, "F64", "BF16", 0x3F80),
        (0x7FA1, "BF16", "BF16", 0x7FA1),  # a copy keeps the payload
    ],
)
def test_by_hand(bits: int, stored: str, dtype: str, wanted: int) -> None:
    found, _ = cast(np.array([[bits]], BITS[stored]), stored, dtype)
    assert hex(int(found[0, 0])) == hex(wanted)


@pytest.mark.parametrize("dtype", NAN)
def test_round_to(dtype: str) -> None:
    bits = samples("F32")
    out = np.zeros(bits.shape, GIVEN[dtype])
    counts = round_to(dtype, bits.view(np.float32), out)
    wide = as_torch(bits, "F32")
    np.testing.assert_array_equal(out.view(BITS[dtype]), as_bits(wide.to(TORCH[dtype]), dtype))
    assert counts == expected(bits, "F32", dtype)[1]


@pytest.mark.parametrize(("stored", "dtype"), PAIRS)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (7, 1), (1, 2049), (3, 4097), (5, 33)])
def test_rows_apart(rows: int, cols: int, stored: str, dtype: str) -> None:
    """Rows with gaps on either side, odd shapes and chunk edges; the gaps stay."""
    rng = np.random.default_rng(2)
    every = samples(stored).ravel()
    bits = every[rng.integers(0, every.size, (rows, cols + 3))]
    source = bits.view(GIVEN[stored])[:, 1 : cols + 1]
    wide = np.full((rows, cols + 3), 5, GIVEN[dtype])
    out = wide[:, 3:]
    counts = CAST({"weight": source}, Window(0, rows, 0, cols), {"dtype": stored}, dtype, out)
    wanted, wanted_counts = expected(np.ascontiguousarray(bits[:, 1 : cols + 1]), stored, dtype)
    np.testing.assert_array_equal(out.view(BITS[dtype]), wanted)
    assert counts == wanted_counts
    assert (wide[:, :3] == 5).all()


def test_read_only_source_and_no_rows() -> None:
    source = np.ones((2, 3), np.float32)
    source.flags.writeable = False
    out = np.zeros((2, 3), np.uint16)
    assert round_to("BF16", source, out) == (0, 0, 0)
    assert (out == 0x3F80).all()
    assert round_to("BF16", source[:0], out[:0]) == (0, 0, 0)
    assert round_to("BF16", source[:, :0], out[:, :0]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("source", "out"),
    [
        (np.zeros((2, 3), np.float32), np.zeros((2, 4), np.uint16)),
        (np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32)),
        (np.zeros((2, 3), np.float64), np.zeros((2, 3), np.uint16)),
        (np.zeros((3, 2), np.float32).T, np.zeros((2, 3), np.uint16)),
        (np.zeros((2, 3), np.float32)[::-1], np.zeros((2, 3), np.uint16)),
    ],
)
def test_what_does_not_fit_is_refused(source: np.ndarray, out: np.ndarray) -> None:
    with pytest.raises(ShapeMismatch):
        round_to("BF16", source, out)
