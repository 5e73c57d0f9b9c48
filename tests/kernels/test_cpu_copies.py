"""Copies of every stride case, and counts of NaN and Inf, against numpy."""

from __future__ import annotations

import platform
from collections.abc import Callable

import numpy as np
import pytest

from moeconv.errors import ShapeMismatch
from moeconv.kernels.cpu import copies, copy_into, count_nonfinite
from tests.kernels.assembly import assembly_of, assert_one_run, nb

DTYPES = (np.uint8, np.int16, np.float32)
SHAPES = (
    (1, 1),
    (3, 5),
    (64, 64),
    (65, 127),
    (128, 192),
    (200, 63),
    (260, 150),
    (0, 4),
    (1, 70),
    (70, 1),
)
# Each gives a [rows, cols] view with other strides.
VIEWS: dict[str, Callable[[int, int, np.dtype], np.ndarray]] = {
    "rows": lambda r, c, t: np.zeros((r, c), t),
    "rows with gaps": lambda r, c, t: np.zeros((r, c + 3), t)[:, 2 : c + 2],
    "every second row": lambda r, c, t: np.zeros((2 * r, c), t)[1::2],
    "backward rows": lambda r, c, t: np.zeros((r, c), t)[::-1],
    "columns": lambda r, c, t: np.zeros((c, r), t).T,
    "columns with gaps": lambda r, c, t: np.zeros((c, r + 5), t)[:, 1 : r + 1].T,
    "every second column": lambda r, c, t: np.zeros((r, 2 * c), t)[:, ::2],
    "backward columns": lambda r, c, t: np.zeros((r, c), t)[:, ::-1],
    "one row again": lambda r, c, t: np.broadcast_to(np.zeros((1, c), t), (r, c)).copy("K"),
    "off alignment": lambda r, c, t: np.zeros((r, c * np.dtype(t).itemsize + 1), np.uint8)[
        :, 1:
    ].view(t),
}


def random_bits(shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    """Return random bits as `dtype`, NaN payloads among them."""
    width = np.dtype(dtype).itemsize
    noise = np.random.default_rng(3).integers(0, 256, (*shape, width), dtype=np.uint8)
    return noise.view(dtype)[..., 0]


def bits_of(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(f"u{array.itemsize}")


@pytest.mark.parametrize("target", VIEWS)
@pytest.mark.parametrize("origin", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_copy(dtype: np.dtype, origin: str, target: str) -> None:
    for rows, cols in SHAPES:
        values = random_bits((rows, cols), dtype)
        src, dst = VIEWS[origin](rows, cols, dtype), VIEWS[target](rows, cols, dtype)
        src.view(f"u{src.itemsize}")[...] = values.view(f"u{src.itemsize}")
        copy_into(dst, src)
        np.testing.assert_array_equal(bits_of(dst), bits_of(values))


@pytest.mark.parametrize("dtype", DTYPES)
def test_transpose_leaves_the_gaps(dtype: np.dtype) -> None:
    wide = np.full((130, 140), 7, dtype)
    src = np.zeros((70, 128), dtype)
    copy_into(wide[1:129, 3:73], src.T)
    assert (wide[1:129, 3:73] == 0).all()
    wide[1:129, 3:73] = 7
    assert (wide == 7).all()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86-64 assembly")
@pytest.mark.parametrize(("dtype", "letters"), [(nb.uint8, "bw"), (nb.uint16, "wd")])
def test_squares_are_turned_in_registers(dtype: object, letters: str) -> None:
    elements, pair = nb.Array(dtype, 1, "C"), nb.UniTuple(nb.int64, 2)
    found = assembly_of(copies._transpose_block, elements, elements, pair, pair)
    assert_one_run(found, tuple(rf"\sv?punpck{half}{letters}\s" for half in "lh"))


def test_bits_move_between_dtypes_of_one_width() -> None:
    dst = np.zeros((2, 3), np.uint16)
    copy_into(dst, np.ones((3, 2), np.float16).T)
    assert (dst == 0x3C00).all()


def test_broadcast_and_read_only_source() -> None:
    src = np.broadcast_to(np.arange(4, dtype=np.uint16), (3, 4))
    dst = np.zeros((3, 4), np.uint16)
    copy_into(dst, src)
    np.testing.assert_array_equal(dst, src)
    copy_into(dst.T, np.broadcast_to(np.arange(4, dtype=np.uint16)[:, None], (4, 3)))
    np.testing.assert_array_equal(dst, src)


@pytest.mark.parametrize(
    "src", [np.zeros((3, 2), np.uint16), np.zeros((2, 3), np.uint8), np.zeros(6, np.uint16)]
)
def test_what_does_not_fit_is_refused(src: np.ndarray) -> None:
    with pytest.raises(ShapeMismatch):
        copy_into(np.zeros((2, 3), np.uint16), src)


def floats_of(bits: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float16) if dtype == "F16" else bits


def nonfinite_samples(dtype: str) -> np.ndarray:
    if dtype != "F32":
        return np.arange(1 << 16, dtype=np.uint16)
    top = np.arange(1 << 16, dtype=np.uint32) << 16
    return np.concatenate([top, top + 1]).view(np.float32)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_counts(dtype: str) -> None:
    bits = nonfinite_samples(dtype)
    values = floats_of(bits, dtype)
    wanted = (int(np.isnan(values).sum()), int(np.isinf(values).sum()))
    assert wanted[0] > 0
    assert wanted[1] >= 2
    assert count_nonfinite(bits, dtype) == wanted
    assert count_nonfinite(bits.reshape(256, -1), dtype) == wanted
    assert count_nonfinite(bits.reshape(256, -1).T, dtype) == wanted


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("rows", [slice(None), slice(1, None, 3), slice(None, None, -1)])
@pytest.mark.parametrize("cols", [slice(None), slice(5, 200), slice(None, None, 2)])
def test_counts_of_strided(dtype: str, rows: slice, cols: slice) -> None:
    rng = np.random.default_rng(4)
    every = nonfinite_samples(dtype)
    view = every[rng.integers(0, every.size, (19, 9001))][rows, cols]
    values = floats_of(np.ascontiguousarray(view), dtype)
    assert count_nonfinite(view, dtype) == (np.isnan(values).sum(), np.isinf(values).sum())


def test_counts_of_nothing_and_of_strangers() -> None:
    assert count_nonfinite(np.empty(0, np.uint16), "BF16") == (0, 0)
    assert count_nonfinite(np.empty((3, 0), np.float32), "F32") == (0, 0)
    assert count_nonfinite(np.full(5, 0x7C00, np.uint16)[::2], "F16") == (0, 3)
    with pytest.raises(ShapeMismatch):
        count_nonfinite(np.empty(3, np.float32), "BF16")
    with pytest.raises(ShapeMismatch):
        count_nonfinite(np.empty((1, 2, 3), np.uint16), "BF16")
