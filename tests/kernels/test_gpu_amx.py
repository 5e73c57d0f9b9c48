"""The packing kernels for GPUs give the reference's bytes, whatever the rows' strides."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moeconv.codecs import amx
from moeconv.errors import ShapeMismatch
from moeconv.kernels.cpu.amx import encode_part
from moeconv.kernels.gpu.amx import encode
from tests import amx_oracle
from tests.codecs.test_amx import random_rows
from tests.kernels.gpu_oracle import DEVICE

FORMS = sorted(amx.FORMS)
# partial blocks of rows, several blocks of columns, one tile, tiles that do not fill a program
SHAPES = [(32, 128), (96, 256), (160, 128), (64, 3584), (96, 2 * 3584 + 384), (256, 640)]


def packed(values: torch.Tensor, form: str, shift: int = 0) -> tuple[bytes, bytes, int]:
    """Return codes, scales and the row that is bad; out begins `shift` bytes off."""
    rows, cols = values.shape
    found, bad = [], torch.full((1,), -1, dtype=torch.int64, device=DEVICE)
    for part, nbytes in (("weight", amx.FORMS[form].nbytes(rows, cols)), ("scale", 4 * rows)):
        room = torch.full((nbytes + 8,), 0xAA, dtype=torch.uint8, device=DEVICE)
        encode(values, form, part, room[shift : shift + nbytes], bad)
        assert bool((room[:shift] == 0xAA).all()) and bool((room[shift + nbytes :] == 0xAA).all())
        found.append(room[shift : shift + nbytes].cpu().numpy().tobytes())
    return found[0], found[1], int(bad)


def on_device(bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(bits).view(np.int16)).to(DEVICE)


def wanted(bits: np.ndarray, form: str) -> tuple[bytes, bytes, int]:
    codes, scales = amx.encode(amx_oracle.floats(bits), amx.FORMS[form])
    return codes.tobytes(), scales.tobytes(), -1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(form: str, shape: tuple[int, int]) -> None:
    bits = random_rows(shape)
    bits[13] = amx_oracle.bf16(np.linspace(-1, 1, shape[1]) * 2.0**-126)  # 1 / scale overflows
    bits[14] = 0x8000  # zeros
    bits[15] = np.arange(shape[1]) % 3  # BF16's smallest
    assert packed(on_device(bits), form) == wanted(bits, form)


@pytest.mark.parametrize("form", FORMS)
def test_every_bf16_value_in_a_row(form: str) -> None:
    """All finite BF16, sorted by size so that each row spans few of them, ties among them."""
    finite = np.arange(0x7F80, dtype=np.uint16)
    bits = np.concatenate([finite, finite | 0x8000]).reshape(2, -1).T.reshape(-1)
    bits = np.resize(bits, (512, 128))
    assert packed(on_device(bits), form) == wanted(bits, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shift", [4, 1])
def test_values_and_bytes_anywhere(form: str, shift: int) -> None:
    bits = random_rows((128, 768))
    values = on_device(bits)
    assert packed(values[:, 256:512], form, shift) == wanted(bits[:, 256:512], form)
    assert packed(values[::2, 128:384], form, shift) == wanted(bits[::2, 128:384], form)
    turned = values[:, :256].T.contiguous().T
    assert packed(turned, form, shift) == wanted(bits[:, :256], form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [0x7F80, 0xFF80, 0x7FC0, 0xFFFF], ids=hex)
def test_names_the_first_row_that_is_not_finite(form: str, bad: int) -> None:
    bits = random_rows((64, 128))
    bits[41, 127] = bits[57, 0] = bad
    out = np.empty(amx.FORMS[form].nbytes(64, 128), np.uint8)
    assert packed(on_device(bits), form)[2] == encode_part(form, "weight", bits, out) == 41


@pytest.mark.parametrize(
    ("shape", "part", "nbytes"),
    [
        ((48, 128), "weight", 48 * 128),
        ((32, 96), "weight", 32 * 96),
        ((32, 128), "weight", 32 * 128 - 1),
        ((32, 128), "scale", 31 * 4),
    ],
)
def test_refuses_memory_that_does_not_fit(shape: tuple[int, int], part: str, nbytes: int) -> None:
    values, out = torch.zeros(shape, dtype=torch.int16), torch.empty(nbytes, dtype=torch.uint8)
    with pytest.raises(ShapeMismatch, match="cannot pack"):
        encode(values, "amxint8", part, out, torch.full((1,), -1))
