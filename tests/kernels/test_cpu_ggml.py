"""The kernels of ggml's block types, against gguf-py's decoders rounded once by torch."""

from __future__ import annotations

import platform
import re
import sys

import gguf
import numba
import numpy as np
import pytest
import torch

from moeconv.codecs.base import Window
from moeconv.errors import ShapeMismatch
from moeconv.kernels.cpu import KERNELS, Counts, ggml
from tests.kernels.ggml_blocks import (
    HALVES,
    expected,
    half,
    params_of,
    some_blocks,
    tamed,
)
from tests.kernels.oracle import OUTPUTS, PADDING, check

DECODE = KERNELS["ggml"]
KINDS = tuple(ggml.BLOCK_TYPES)


def decode(kind: str, rows: np.ndarray, dtype: str) -> tuple[np.ndarray, Counts]:
    params = params_of(kind)
    cols = rows.shape[1] // int(params["block_nbytes"]) * int(params["block_cols"])
    out = np.empty((rows.shape[0], cols), OUTPUTS[dtype][0])
    counts = DECODE({"weight": rows}, Window(0, *out.shape[:1], 0, cols), params, dtype, out)
    return out.view(f"u{out.itemsize}"), counts


def compare(kind: str, rows: np.ndarray, dtypes: tuple[str, ...] = tuple(OUTPUTS)) -> None:
    for dtype in dtypes:
        wanted, wanted_counts = expected(kind, rows, dtype)
        bits, counts = decode(kind, rows, dtype)
        np.testing.assert_array_equal(bits, wanted, dtype)
        assert counts == wanted_counts, dtype


def test_the_sizes_are_gguf_pys() -> None:
    found = {kind: (block.cols, block.nbytes) for kind, block in ggml.BLOCK_TYPES.items()}
    assert found == {
        kind: tuple(gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]) for kind in KINDS
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (1, 40), (33, 3), (150, 1)])
def test_random_bytes(kind: str, rows: int, blocks: int) -> None:
    compare(kind, some_blocks(kind, rows, blocks, seed=rows))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_count(kind: str) -> None:
    """The usual rows, which are not looked at again once they are decoded."""
    rows = tamed(kind, some_blocks(kind, 9, 7))
    assert decode(kind, rows, "F32")[1] == (0, 0, 0)
    compare(kind, rows)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if HALVES[kind]])
def test_kinds_of_halves(kind: str) -> None:
    """Every sign and exponent with five mantissas; two halves of a block in any combination."""
    tops = np.arange(64, dtype=np.uint16) << 10
    halves = (tops[:, None] | np.array([0, 1, 0x1FF, 0x200, 0x3FF], np.uint16)).ravel()
    nbytes = int(params_of(kind)["block_nbytes"])
    blocks = some_blocks(kind, len(halves), 1)
    random = np.random.default_rng(1)
    for index, at in enumerate(HALVES[kind]):
        chosen = random.permutation(halves) if index else halves
        blocks[:, at : at + 2] = chosen.view(np.uint8).reshape(-1, 2)
    compare(kind, blocks.reshape(-1, 8 * nbytes))


@pytest.mark.parametrize(
    ("kind", "at", "number"),
    [
        *((kind, at, number) for kind in KINDS for at in HALVES[kind] for number in ("inf", "nan")),
        ("MXFP4", None, "253"),
    ],
)
def test_one_block_that_is_not_finite(kind: str, at: int | None, number: str) -> None:
    """The last block of the last row alone gives something to count."""
    rows = tamed(kind, some_blocks(kind, 3, 4))
    block = rows[2, -rows.shape[1] // 4 :]
    if at is None:
        block[0] = int(number)
    else:
        block[at : at + 2] = np.frombuffer(half(float(number)), np.uint8)
    assert sum(decode(kind, rows, "BF16")[1]) > 0
    compare(kind, rows, ("BF16", "F32"))


def test_every_half() -> None:
    blocks = some_blocks("Q8_0", 1 << 16, 1)
    blocks[:, :2] = np.arange(1 << 16, dtype=np.uint16)[:, None].view(np.uint8)
    compare("Q8_0", blocks.reshape(-1, 64 * 34))


def test_every_scale_byte_and_code_of_mxfp4() -> None:
    blocks = np.empty((256, 17), np.uint8)
    blocks[:, 0] = np.arange(256)
    blocks[:, 1:] = np.arange(16) * 0x11
    compare("MXFP4", blocks)


@pytest.mark.parametrize("kind", KINDS)
def test_every_scale_in_the_block(kind: str) -> None:
    """Each byte of the block takes every value, one block after another."""
    nbytes = int(params_of(kind)["block_nbytes"])
    first, last = some_blocks(kind, 1, 1), np.arange(256, dtype=np.uint8)
    blocks = (np.repeat(first, 256, 0) + last[:, None] * 37).astype(np.uint8)
    for at in HALVES[kind]:
        blocks[:, at : at + 2] = np.frombuffer(half(0.37), np.uint8)
    compare(kind, blocks.reshape(-1, 4 * nbytes), ("F32",))


# Type, a block, some of its values as BF16 bits.
BY_HAND: tuple[tuple[str, bytes, dict[int, int]], ...] = (
    # -2 * (1, 0, -128, 127); 254 = 0x437E
    ("Q8_0", half(-2.0) + b"\x01\x00\x80\x7f" + bytes(28), {0: 0xC000, 1: 0x8000, 2: 0x4380}),
    ("Q8_0", half(-2.0) + b"\x01\x00\x80\x7f" + bytes(28), {3: 0xC37E}),
    # 2^-24, the smallest half, is 0x33800000
    ("Q8_0", b"\x01\x00" + b"\x01\xff" + bytes(30), {0: 0x3380, 1: 0xB380, 2: 0}),
    # NaN keeps neither sign nor payload; Inf times 0 is NaN
    ("Q8_0", b"\x01\xfe" + b"\x01" + bytes(31), {0: 0x7FC0, 1: 0x7FC0}),
    ("Q8_0", half(float("inf")) + b"\x01\xff" + bytes(30), {0: 0x7F80, 1: 0xFF80, 2: 0x7FC0}),
    # 257 and 259 lie halfway: 256 and 260 are even
    ("Q4_1", half(1.0) + half(256.0) + b"\x31" + bytes(15), {0: 0x4380, 16: 0x4382, 1: 0x4380}),
    # the code of -0 is +0 in ggml, code 9 is -0.5; 255 is a number, 6 * 2^128 is Inf
    ("MXFP4", b"\x7f" + b"\x98" + bytes(15), {0: 0, 16: 0xBF00}),
    ("MXFP4", b"\xff" + b"\x71" + bytes(15), {0: 0x7F00, 16: 0x7F80}),
    # 0.5 * 2^-127 and 6 * 2^-127: a subnormal and a normal number
    ("MXFP4", b"\x00" + b"\x71" + bytes(15), {0: 0x0020, 16: 0x0140}),
    # -127, 113, 1 times 1
    ("IQ4_NL", half(1.0) + b"\xf0\x08" + bytes(14), {0: 0xC2FE, 16: 0x42E2, 1: 0x3F80}),
    # scale 0 is -32: 2^-5 * -32 * 1 and * -127
    (
        "IQ4_XS",
        half(2.0**-5) + bytes(6) + b"\x08" + bytes(127),
        {0: 0xBF80, 1: 0x42FE},
    ),
    # 0 * 1 - -0 and -0 * 1 - 0
    ("Q4_K", half(0.0) + half(-0.0) + bytes(12) + bytes(128), {0: 0}),
    ("Q4_K", half(-0.0) + half(0.0) + bytes(12) + bytes(128), {0: 0x8000, 255: 0x8000}),
)


@pytest.mark.parametrize(("kind", "block", "wanted"), BY_HAND)
def test_hand_computed(kind: str, block: bytes, wanted: dict[int, int]) -> None:
    bits, _ = decode(kind, np.frombuffer(block, np.uint8)[None], "BF16")
    assert {at: hex(bits[0, at]) for at in wanted} == {at: hex(wanted[at]) for at in wanted}


@pytest.mark.parametrize(
    ("kind", "block", "dtype", "counts"),
    [
        ("Q8_0", half(float("inf")) + b"\x01" * 30 + bytes(2), "BF16", (2, 30, 0)),
        ("Q8_0", half(float("nan")) + bytes(32), "F32", (32, 0, 0)),
        ("Q8_0", half(520.0) + b"\x7f\x80\x7e" + bytes(29), "F16", (0, 0, 3)),  # 126 * 520 = 65520
        ("Q8_0", half(519.5) + b"\x7e" + bytes(31), "F16", (0, 0, 0)),
        ("Q8_0", half(65504.0) + b"\x7f" * 32, "BF16", (0, 0, 0)),
        ("MXFP4", b"\xfc" + b"\x77" * 16, "F32", (0, 0, 0)),  # 6 * 2^125
        ("MXFP4", b"\xfd" + b"\x77" * 15 + b"\x17", "BF16", (0, 31, 0)),  # 6 * 2^126
    ],
)
def test_counts_by_hand(kind: str, block: bytes, dtype: str, counts: tuple[int, int, int]) -> None:
    assert decode(kind, np.frombuffer(block, np.uint8)[None], dtype)[1] == counts


@pytest.mark.parametrize("dtype", OUTPUTS)
@pytest.mark.parametrize("kind", [*KINDS, "TQ2_0"])
def test_rows_apart(kind: str, dtype: str) -> None:
    """Rows of the input and the output lie apart, unaligned; what lies between stays."""
    rows = some_blocks(kind, 5, 2)
    spaced = np.zeros((5, rows.shape[1] + 3), np.uint8)
    spaced[:, 1:-2] = rows
    spaced.flags.writeable = False
    wanted, counts = expected(kind, rows, dtype)
    cols = wanted.shape[1]
    wide = np.full((5, cols + 8), PADDING, OUTPUTS[dtype][0])
    out = wide[:, 3 : 3 + cols]
    given = {"weight": spaced[:, 1:-2]}
    assert DECODE(given, Window(0, 5, 0, cols), params_of(kind), dtype, out) == counts
    np.testing.assert_array_equal(out.view(f"u{out.itemsize}"), wanted)
    assert (wide[:, :3] == PADDING).all()
    assert (wide[:, 3 + cols :] == PADDING).all()


@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K", "MXFP4", "IQ2_XS"])
def test_a_window_of_a_weight(kind: str) -> None:
    cols = int(params_of(kind)["block_cols"])
    tensors = {"weight": torch.from_numpy(some_blocks(kind, 12, 5))}
    check("ggml", tensors, params_of(kind), window=Window(3, 11, cols, 4 * cols))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "TQ1_0", "NVFP4", "IQ3_XXS"])
@pytest.mark.parametrize("tile", [1, 700, 1 << 20])
def test_tiles(kind: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is decoded tile by tile (F16, types without a kernel) does not depend on the tile."""
    monkeypatch.setattr(ggml, "TILE", tile)
    compare(kind, some_blocks(kind, 23, 3), ("BF16", "F16"))


@pytest.mark.parametrize("kind", ["Q5_K", "IQ2_S"])
def test_torch_is_not_needed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = some_blocks(kind, 4, 2)
    wanted, counts = expected(kind, rows, "BF16")
    monkeypatch.setitem(sys.modules, "torch", None)
    bits, found = decode(kind, rows, "BF16")
    np.testing.assert_array_equal(bits, wanted)
    assert found == counts


@pytest.mark.parametrize("kind", KINDS)
def test_flushing_subnormals_changes_nothing(kind: str) -> None:
    rows = some_blocks(kind, 40, 1)
    nbytes = int(params_of(kind)["block_nbytes"])
    blocks = rows.reshape(-1, nbytes)
    for at in HALVES[kind]:
        blocks[:, at + 1] &= 0x83  # subnormal halves
    if kind == "MXFP4":
        blocks[:, 0] %= 4
    plain = [decode(kind, rows, dtype) for dtype in OUTPUTS]
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        flushed = [decode(kind, rows, dtype) for dtype in OUTPUTS]
    finally:
        torch.set_flush_denormal(False)
    for (bits, counts), (wanted, wanted_counts) in zip(flushed, plain, strict=True):
        np.testing.assert_array_equal(bits, wanted)
        assert counts == wanted_counts


@pytest.mark.parametrize("kind", ["Q8_0", "IQ1_S"])
@pytest.mark.parametrize(("rows", "blocks"), [(0, 2), (3, 0)])
def test_nothing(kind: str, rows: int, blocks: int) -> None:
    assert decode(kind, some_blocks(kind, rows, blocks), "BF16")[1] == (0, 0, 0)


@pytest.mark.parametrize(
    ("stored", "out"),
    [((4, 67), (4, 64)), ((4, 68), (3, 64)), ((4, 68), (4, 63)), ((4, 34), (4, 64))],
)
@pytest.mark.parametrize("dtype", OUTPUTS)
def test_wrong_shapes_are_refused(
    stored: tuple[int, int], out: tuple[int, int], dtype: str
) -> None:
    parts = {"weight": np.zeros(stored, np.uint8)}
    given = np.zeros(out, OUTPUTS[dtype][0])
    with pytest.raises(ShapeMismatch, match="not"):
        DECODE(parts, Window(0, 4, 0, out[1]), params_of("Q8_0"), dtype, given)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86-64 assembly")
@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
def test_inner_loops_are_vectorised(kind: str) -> None:
    """A run without a jump or call takes bytes to packed products; one goes on to 16 bits.

    (Compiled afresh, because numba shows no assembly of what it loads from its cache.)
    """
    kernel = ggml.BLOCK_TYPES[kind].decode
    fresh = numba.njit(kernel.signature, nogil=True)(kernel.__wrapped__)
    (assembly,) = fresh.inspect_asm().values()
    straight = re.split(r"^\s+(?:j\w+|call\w*)\s.*$|^\S+:.*$", assembly, flags=re.MULTILINE)
    products = (r"\sv?cvtdq2ps\s", r"\sv?mulps\s")
    packed = [run for run in straight if all(re.search(one, run) for one in products)]
    narrowed = [run for run in packed if re.search(r"\sv?psrld\s+\$16,", run)]
    assert len(packed) > len(narrowed) >= 1  # F32 and BF16
