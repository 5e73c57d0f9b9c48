"""The packing kernel gives the reference's bytes, whatever the rows' strides."""

from __future__ import annotations

import platform
import re
from typing import Any

import numpy as np
import pytest

from moeconv.codecs import amx
from moeconv.errors import ShapeMismatch
from moeconv.kernels.cpu import amx as kernel
from moeconv.kernels.cpu import tiles
from moeconv.kernels.cpu.cache import cpu_features, jitable
from tests import amx_oracle
from tests.codecs.test_amx import random_rows
from tests.kernels.assembly import assembly_of, assert_one_run, nb

FORMS = sorted(amx.FORMS)
# partial blocks of rows, several blocks of columns, one tile
SHAPES = [(32, 128), (96, 256), (160, 128), (64, 3584), (96, 2 * 3584 + 256), (256, 384)]


def encode(bits: np.ndarray, form: str) -> tuple[np.ndarray, np.ndarray]:
    rows, cols = bits.shape
    out = np.full(amx.FORMS[form].nbytes(rows, cols), 0xAA, np.uint8)
    scales = np.full(rows, np.nan, np.float32)
    assert kernel.encode(bits, amx.FORMS[form], scales, out) == -1
    return out, scales


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(form: str, shape: tuple[int, int]) -> None:
    bits = random_rows(shape)
    bits[13] = amx_oracle.bf16(np.linspace(-1, 1, shape[1]) * 2.0**-126)  # 1 / scale overflows
    bits[15] = np.arange(shape[1]) % 3  # BF16's smallest
    packed, scales = amx.encode(amx_oracle.floats(bits), amx.FORMS[form])
    got, got_scales = encode(bits, form)
    assert got_scales.tobytes() == scales.tobytes()
    assert got.tobytes() == packed.tobytes()


@pytest.mark.parametrize("form", FORMS)
def test_every_bf16_value_in_a_row(form: str) -> None:
    """All finite BF16, sorted by size so that each row spans few of them, ties among them."""
    finite = np.arange(0x7F80, dtype=np.uint16)
    bits = np.concatenate([finite, finite | 0x8000]).reshape(2, -1).T.reshape(-1)
    bits = np.ascontiguousarray(np.resize(bits, (512, 128)))
    packed, scales = amx.encode(amx_oracle.floats(bits), amx.FORMS[form])
    got, got_scales = encode(bits, form)
    assert got_scales.tobytes() == scales.tobytes()
    assert got.tobytes() == packed.tobytes()


@pytest.mark.parametrize("form", FORMS)
def test_slices_of_a_larger_matrix(form: str) -> None:
    """Columns of a wide matrix (down over NUMA parts) and every other row (interleaved)."""
    bits = random_rows((128, 768))
    for window in (bits[:, 256:512], bits[::2, 128:384], bits[32:96]):
        expected = encode(np.ascontiguousarray(window), form)
        got = encode(window, form)
        assert got[0].tobytes() == expected[0].tobytes()
        assert got[1].tobytes() == expected[1].tobytes()


@pytest.mark.parametrize("form", FORMS)
def test_blocks_of_rows_are_the_bytes_of_the_whole(form: str) -> None:
    """What bounded memory relies on: cuts at multiples of N_BLOCK."""
    bits = random_rows((320, 256))
    whole, whole_scales = encode(bits, form)
    step = amx.FORMS[form].block_rows
    pieces = [encode(bits[at : at + step], form) for at in range(0, 320, step)]
    assert b"".join(piece.tobytes() for piece, _ in pieces) == whole.tobytes()
    assert b"".join(scales.tobytes() for _, scales in pieces) == whole_scales.tobytes()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [0x7F80, 0xFF80, 0x7FC0, 0xFFFF], ids=hex)
def test_names_the_row_that_is_not_finite(form: str, bad: int) -> None:
    bits = random_rows((64, 128))
    bits[41, 127] = bad
    out = np.empty(amx.FORMS[form].nbytes(64, 128), np.uint8)
    assert kernel.encode(bits, amx.FORMS[form], np.empty(64, np.float32), out) == 41


@pytest.mark.parametrize("form", FORMS)
def test_scales_alone(form: str) -> None:
    bits = random_rows((64, 128))
    scales = np.empty(64, np.float32)
    assert kernel.encode(bits, amx.FORMS[form], scales, None) == -1
    assert scales.tobytes() == encode(bits, form)[1].tobytes()


@pytest.mark.parametrize(
    ("shape", "scales", "nbytes"),
    [
        ((48, 128), 48, 48 * 128),
        ((32, 96), 32, 32 * 96),
        ((32, 128), 31, 32 * 128),
        ((32, 128), 32, 32 * 128 - 1),
    ],
)
def test_refuses_memory_that_does_not_fit(shape: tuple[int, int], scales: int, nbytes: int) -> None:
    with pytest.raises(ShapeMismatch, match="cannot pack"):
        kernel.encode(
            np.zeros(shape, np.uint16),
            amx.FORMS["amxint8"],
            np.empty(scales, np.float32),
            np.empty(nbytes, np.uint8),
        )


def caller_of(fill: Any) -> Any:
    @jitable
    def call(memory: Any, factors: Any, out: Any, place: Any) -> None:
        fill(memory, factors, out, place)

    return call


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", [4, 16])
def test_half_a_tile_by_squares_of_either_size(form: str, side: int) -> None:
    """What suits another CPU than this one gives the same bytes; nothing beside them is touched."""
    chosen = amx.FORMS[form]
    bits = random_rows((32, 4 * chosen.tile_cols))
    values = amx_oracle.floats(bits)
    packed, scales = amx.encode(values, chosen)
    factors = np.ones((32, 2), np.float32)
    factors[:, 1] = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    call = caller_of(tiles.half_tile_of(chosen.bits, side))
    out = np.full(7 + packed.size // 8 + 7, 0xAA, np.uint8)
    # the third tile of the second half
    begin = 16 * bits.strides[0] + 2 * chosen.tile_cols * 2
    call(bits.view(np.uint8).reshape(-1), factors.reshape(-1), out, (begin, bits.strides[0], 32, 7))
    assert out[7:-7].tobytes() == packed.reshape(-1, 1024)[5].tobytes()
    assert set(out[:7]) == set(out[-7:]) == {0xAA}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86-64 assembly")
@pytest.mark.parametrize("fill", [tiles.fill_8, tiles.fill_4])
def test_half_a_tile_is_one_run_of_vectors(fill: Any) -> None:
    """Values become words, bytes, a square that is turned, without a jump or a scalar step."""
    kinds = (nb.uint8[::1], nb.float32[::1], nb.uint8[::1], nb.UniTuple(nb.int64, 4))
    assembly = assembly_of(caller_of(fill), *kinds)
    assert_one_run(assembly, (r"\sv?mulps\s", r"\sv?addps\s", r"\sv?(?:perm[it]2d|p?unpck)"))
    assert not re.search(r"\s(?:v?mulss|v?addss|v?cvt\w+|v?pextrb|v?pinsrb)\s", assembly)
    if "+avx512f" in cpu_features():
        stores = re.findall(r"\sv?mov\w+\s+%([xyz])mm\d+, \S*\((?!%rsp|%rbp)", assembly)
        assert stores == ["z"] * 16
