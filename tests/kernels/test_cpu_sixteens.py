"""Sixteen numbers at a time: tables and outputs against numpy, off any alignment."""

from __future__ import annotations

import itertools
import platform
from typing import Any

import numba
import numpy as np
import pytest
import torch

from moeconv.kernels.cpu import sixteens
from moeconv.kernels.cpu.base import BYTES_IN, BYTES_OUT
from moeconv.kernels.cpu.shuffles import STRIDE
from tests.kernels.assembly import assert_one_run, nb
from tests.kernels.int_parts import WILD
from tests.kernels.oracle import rounded

F32 = nb.float32
# The edges of float32, and numbers of every size: as zeros, scales and offsets.
NUMBERS = np.concatenate(
    [
        np.array(WILD, np.uint32).view(np.float32),
        np.array([0.0, -0.0, 8.0, -3.5, 0.1, 1e-3, -1e30, 3e38], np.float32),
    ]
)
PAD = 7


@numba.njit((nb.float32[::1], BYTES_OUT.made(), nb.int64, F32, F32, F32))
def table(values: Any, out: Any, at: int, zero: Any, scale: Any, offset: Any) -> None:
    sixteens.fill_table(values, out, at, (zero, scale, offset))


@numba.njit((nb.float32[::1], BYTES_OUT.made(), nb.int64, F32, F32, F32))
def wide_table(values: Any, out: Any, at: int, zero: Any, scale: Any, offset: Any) -> None:
    sixteens.fill_wide_table(values, out, at, (zero, scale, offset))


@numba.njit((BYTES_IN.made(), BYTES_OUT.made(), nb.boolean, F32, F32, F32))
def scaled(codes: Any, out: Any, signed: bool, zero: Any, scale: Any, offset: Any) -> None:
    if signed:
        sixteens.scale_signed_bytes(codes, out, (3, 5), (zero, scale, offset))
    else:
        sixteens.scale_bytes(codes, out, (3, 5), (zero, scale, offset))


def wanted(
    values: np.ndarray, zero: Any, scale: Any, offset: Any, dtype: str = "BF16"
) -> np.ndarray:
    with np.errstate(all="ignore"):
        found = (values - zero) * scale + offset
    return rounded(torch.from_numpy(found), dtype)[0]


@pytest.mark.parametrize(("fill", "dtype"), [(table, "BF16"), (wide_table, "F32")])
@pytest.mark.parametrize("offset", [np.float32(-0.0), np.float32(0.0), np.float32(-1.7)])
def test_tables(offset: np.float32, fill: Any, dtype: str) -> None:
    values = np.arange(16, dtype=np.float32)
    for zero, scale in itertools.product(NUMBERS, NUMBERS):
        right = wanted(values, zero, scale, offset, dtype)
        end = 5 + right.nbytes
        out = np.full(72, PAD, np.uint8)
        fill(values, out, 5, zero, scale, offset)
        table = right.view(np.uint8).reshape(16, -1)
        if dtype == "F32" or STRIDE == 1:
            table = table.T  # planes
        np.testing.assert_array_equal(out[5:end], table.ravel())
        assert (out[:5] == PAD).all()
        assert (out[end:] == PAD).all()


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("offset", [np.float32(-0.0), np.float32(2.5)])
def test_every_byte(signed: bool, offset: np.float32) -> None:
    for first, scale in itertools.product(range(0, 256, 16), NUMBERS):
        codes = np.arange(first, first + 16, dtype=np.uint8)
        out = np.full(40, PAD, np.uint8)
        given = np.concatenate([np.zeros(3, np.uint8), codes])
        zero = np.float32(first)
        scaled(given, out, signed, zero, scale, offset)
        values = codes.view(np.int8 if signed else np.uint8).astype(np.float32)
        found = out[5:37].copy().view(np.uint16)
        np.testing.assert_array_equal(found, wanted(values, zero, scale, offset).view(np.uint16))
        assert (out[:5] == PAD).all()
        assert (out[37:] == PAD).all()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86-64 assembly")
@pytest.mark.parametrize("loop", [table, scaled])
def test_sixteen_are_one_vector(loop: Any) -> None:
    (assembly,) = loop.inspect_asm().values()
    assert_one_run(assembly, (r"\sv?subps\s", r"\sv?mulps\s", r"\sv?addps\s", r"\sv?psrld\s"))
