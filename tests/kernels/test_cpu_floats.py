"""Casts between plain floats: every 16-bit code and the edges of the wide ones, against torch."""

from __future__ import annotations

import numpy as np
import pytest

from moeconv.codecs.base import Window
from moeconv.errors import ShapeMismatch
from moeconv.kernels.cpu import KERNELS, Counts, round_to
from tests.kernels.float_parts import BITS, NAN, PAIRS, TORCH, as_bits, as_torch, expected, samples

CAST = KERNELS["float"]
GIVEN = {"BF16": np.uint16, "F16": np.uint16, "F32": np.float32, "F64": np.float64}


def cast(bits: np.ndarray, stored: str, dtype: str) -> tuple[np.ndarray, Counts]:
    rows, cols = bits.shape
    out = np.full((rows, cols), 3, GIVEN[dtype])
    source = bits.view(GIVEN[stored])
    counts = CAST({"weight": source}, Window(0, rows, 0, cols), {"dtype": stored}, dtype, out)
    return out.view(BITS[dtype]), counts


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
