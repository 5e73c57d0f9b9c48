"""The FP8 and MXFP8 kernels: every byte under every kind of scale, every shape of block."""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeconv.codecs.base import Window
from moeconv.kernels.cpu import KERNELS, Counts, eights, fp8
from moeconv.kernels.cpu.cache import cpu_features
from tests.kernels.assembly import assembly_of, assert_one_run, nb
from tests.kernels.fp8_parts import (
    FORMATS,
    SCALES,
    check_blocks,
    check_shape,
    finite_bytes,
    grid,
    params_of,
    special_scales,
)
from tests.kernels.oracle import as_numpy, check


@pytest.mark.parametrize("form", FORMATS)
def test_every_finite_byte_under_tame_scales(form: str) -> None:
    """Scales of both signs and every mantissa's shape, as tables take them; 0 has no table."""
    rng = np.random.default_rng(5)
    by = np.concatenate([rng.uniform(-2, 2, 300), rng.uniform(-1, 1, 40) * 2.0**60, [0.0, -0.0]])
    scale = torch.from_numpy(by.astype(np.float32))[:, None]
    tensors = {"weight": finite_bytes(len(by), form), "weight_scale": scale}
    check("fp8-channel", tensors, params_of(form))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("cols", [16, 17, 31, 32, 48, 8192 + 20])
def test_ends_of_vectors(form: str, cols: int) -> None:
    """Blocks that end inside a vector, beside ones that are all vectors; all codes finite."""
    for group in (16, 19, 33, 48, 100):
        size = (9, cols)
        stored = finite_bytes(1, form)[0].view(torch.uint8)
        drawn = torch.from_numpy(np.random.default_rng(cols).integers(0, len(stored), size))
        by = np.random.default_rng(6).uniform(1e-3, 2, grid(*size, (4, group)))
        tensors = {
            "weight": stored[drawn].view(FORMATS[form]),
            "weight_scale": torch.from_numpy(by.astype(np.float32)),
        }
        check("fp8-block", tensors, params_of(form, (4, group)), dtypes=("BF16",))


@pytest.mark.parametrize("form", FORMATS)
def test_every_finite_byte_under_special_scales(form: str) -> None:
    """Without NaN and Inf among the codes, which decides the way through the kernel."""
    by = special_scales()[:, None]
    tensors = {"weight": finite_bytes(by.shape[0], form), "weight_scale": by}
    check("fp8-channel", tensors, params_of(form))


def test_subnormals_do_not_depend_on_the_threads_mode() -> None:
    """A library may have set flush-to-zero: no subnormal number may meet float arithmetic."""
    by = as_numpy(special_scales()[:, None])
    weight = as_numpy(finite_bytes(by.shape[0], "F8_E4M3"))
    window, params = Window(0, len(weight), 0, weight.shape[1]), params_of("F8_E4M3")
    parts = {"weight": weight, "weight_scale": by}
    plain, flushed = np.empty((2, *weight.shape), np.float32)
    counts = KERNELS["fp8-channel"](parts, window, params, "F32", plain)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        assert KERNELS["fp8-channel"](parts, window, params, "F32", flushed) == counts
    finally:
        torch.set_flush_denormal(False)
    np.testing.assert_array_equal(flushed.view(np.uint32), plain.view(np.uint32))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("bits", [0x7F, 0xFF, 0x7D, 0xFC])
def test_one_code_that_is_not_finite(form: str, bits: int) -> None:
    """In each row at another column: in runs of whole vectors, in half a one and behind them."""
    cols = 128 + 16 + 5
    stored = np.full((cols, cols), 0x38, np.uint8)
    np.fill_diagonal(stored, bits)
    weight = torch.from_numpy(stored).view(FORMATS[form])
    for group in (32, 40, cols):
        by = torch.full(grid(cols, cols, (1, group)), 0.75)
        tensors = {"weight": weight, "weight_scale": by}
        check("fp8-block", tensors, params_of(form, (1, group)), dtypes=("BF16",))


def test_every_pair_of_mxfp8() -> None:
    """Each row has one byte in all of its columns, each group of 32 its own exponent."""
    bytewise = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 256 * 32)
    exponents = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    tensors = {"weight": bytewise.view(FORMATS["F8_E4M3"]), "weight_scale": exponents}
    check("mxfp8", tensors, params_of("F8_E4M3"), dtypes=("BF16",))


def test_hand_computed() -> None:
    # 0x38 is 1, 0x01 the smallest, 2^-9; 0x7E is 448; 0xFF is NaN. 448 * 1.5 = 672.
    stored = np.array([[0x38, 0x01, 0x7E, 0x80, 0xFF]], np.uint8)
    out = np.empty((1, 5), np.uint16)
    parts = {"weight": stored, "weight_scale": np.array([[1.5]], np.float32)}
    params = params_of("F8_E4M3")
    counts = KERNELS["fp8-tensor"](parts, Window(0, 1, 0, 5), params, "BF16", out)
    assert [hex(bits) for bits in out[0]] == ["0x3fc0", "0x3b40", "0x4428", "0x8000", "0x7fc0"]
    assert counts == Counts(1, 0, 0)


@pytest.mark.parametrize(
    ("scale", "dtype", "counts"),
    [
        (2.0**119, "BF16", (0, 0, 0)),  # 448 * 2^119 is below 2^128
        (2.0**120, "BF16", (0, 1, 0)),
        (146.25, "F16", (0, 0, 1)),  # 448 * 146.25 = 65520 rounds to Inf
        (146.0, "F16", (0, 0, 0)),
        (float("inf"), "F32", (1, 1, 0)),  # 0 * Inf is NaN
        (float("nan"), "F32", (2, 0, 0)),
    ],
)
def test_counts_by_hand(scale: float, dtype: str, counts: tuple[int, int, int]) -> None:
    parts = {
        "weight": np.array([[0x7E, 0x00]], np.uint8),
        "weight_scale": np.array([[scale]], np.float32),
    }
    out = np.empty((1, 2), np.float32 if dtype == "F32" else np.uint16)
    params = params_of("F8_E4M3")
    assert KERNELS["fp8-channel"](parts, Window(0, 1, 0, 2), params, dtype, out) == counts


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("size", "block"),
    [
        ((5, 8192 + 96), (2, 128)),  # more columns than are decoded at a time
        ((3, 8192 + 50), (1, 32)),
        ((9, 9000), (4, 7)),
    ],
)
def test_more_columns_than_are_decoded_at_a_time(
    size: tuple[int, int], block: tuple[int, int], transposed: bool
) -> None:
    check_shape(size, block, transposed=transposed)


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 300)),
    block=st.tuples(st.integers(1, 40), st.integers(1, 140)),
    kinds=st.tuples(st.sampled_from(list(FORMATS)), st.sampled_from(list(SCALES))),
    transposed=st.booleans(),
)
def test_any_blocks(
    size: tuple[int, int], block: tuple[int, int], kinds: tuple[str, str], transposed: bool
) -> None:
    check_blocks(size, block, kinds, transposed=transposed)


@pytest.mark.skipif("+ssse3" not in cpu_features(), reason="reads the assembly of a byte shuffle")
@pytest.mark.parametrize("loop", [eights.decode_e4m3, eights.decode_e5m2])
def test_inner_loop_is_shuffles(loop: Any) -> None:
    """One run without a jump or call takes codes by shuffles and sums to outputs."""
    bytewise, ints = nb.uint8[::1], nb.UniTuple(nb.int64, 4)
    assembly = assembly_of(loop, bytewise, bytewise, nb.int64[::1], bytewise, ints, nb.int64)
    wanted = (r"\s(?:v?pshufb|vpermw)\s", r"\sv?padd[bw]\s", r"\sv?mov[du]\w+\s+%[xyz]mm\d+, \S*\(")
    assert_one_run(assembly, wanted)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86-64 assembly")
@pytest.mark.parametrize("loop", [fp8._fast_e4m3, fp8._fast_e5m2])
def test_inner_loop_is_vectorised(loop: Any) -> None:
    """One run without a jump or call takes codes to packed products to 16 bits."""
    wanted = (r"\sv?mulps\s", r"\sv?(?:pslld|vpternlogd)\s", r"\sv?psrld\s", r"\sv?addps\s")
    assert_one_run(assembly_of(loop, nb.uint8[::1], nb.float32[::1], nb.uint16[::1]), wanted)
