"""The MXFP4 kernel: every scale with every byte, against exact arithmetic and the reference."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from moeconv.codecs.base import Window
from moeconv.codecs.mxfp4 import Mxfp4
from moeconv.errors import ShapeMismatch
from moeconv.kernels.cpu import KERNELS, Counts, fours
from moeconv.kernels.cpu.cache import cpu_features
from tests.kernels.assembly import assembly_of, assert_one_run, nb

DECODE = KERNELS["mxfp4"]
PARAMS = {"codes": "blocks", "scales": "scales"}
NUMPY = {"BF16": np.uint16, "F16": np.uint16, "F32": np.float32}
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# dtype: mantissa bits, lowest normal exponent, highest exponent
FORMATS = {"BF16": (7, -126, 127), "F16": (10, -14, 15), "F32": (23, -126, 127)}
MAGNITUDES = [Fraction(n, 2) for n in (0, 1, 2, 3, 4, 6, 8, 12)]  # OCP MX v1.0, table 5


def round_half_even(value: Fraction) -> int:
    return round(value)  # Python rounds a Fraction half to even, exactly


def encode(value: Fraction, dtype: str) -> int:
    """Return the bits of a non-negative number: exact rational arithmetic, no floats."""
    mantissa_bits, lowest, highest = FORMATS[dtype]
    exponent = lowest
    while value >= Fraction(2) ** (exponent + 1):
        exponent += 1
    steps = round_half_even(value / Fraction(2) ** (exponent - mantissa_bits))
    bits = ((exponent - lowest) << mantissa_bits) + steps  # a carry moves into the exponent
    return min(bits, (highest - lowest + 2) << mantissa_bits)


def oracle(scale: int, code: int, dtype: str) -> int:
    mantissa_bits, lowest, highest = FORMATS[dtype]
    if scale == 255:
        return ((highest - lowest + 2) << mantissa_bits) | (1 << (mantissa_bits - 1))
    sign = (code >> 3) << (31 if dtype == "F32" else 15)
    return sign | encode(MAGNITUDES[code & 7] * Fraction(2) ** (scale - 127), dtype)


def every_pair() -> dict[str, np.ndarray]:
    """Return parts with [256 scales, 512 columns]: every byte under every scale."""
    blocks = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    scales = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 16, axis=1)
    return {"blocks": blocks, "scales": scales}


def some_parts(rows: int, cols: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "blocks": rng.integers(0, 256, (rows, cols // 2), dtype=np.uint8),
        "scales": rng.integers(0, 256, (rows, -(-cols // 32)), dtype=np.uint8),
    }


def decode(parts: dict[str, np.ndarray], dtype: str) -> tuple[np.ndarray, Counts]:
    rows, half = parts["blocks"].shape
    out = np.empty((rows, 2 * half), NUMPY[dtype])
    counts = DECODE(parts, Window(0, rows, 0, 2 * half), PARAMS, dtype, out)
    return out.view(f"u{out.itemsize}"), counts


def reference(parts: dict[str, np.ndarray], dtype: str) -> np.ndarray:
    """Return the torch reference rounded by torch, as bits, NaN canonical."""
    rows, half = parts["blocks"].shape
    tensors = {name: torch.from_numpy(part) for name, part in parts.items()}
    values = Mxfp4().decode(tensors, Window(0, rows, 0, 2 * half), PARAMS).to(TORCH[dtype])
    bits = values.view(torch.int32 if dtype == "F32" else torch.int16).numpy()
    bits = bits.view(f"u{bits.itemsize}").copy()
    bits[values.isnan().numpy()] = oracle(255, 0, dtype)
    return bits


def expected_counts(parts: dict[str, np.ndarray], dtype: str) -> Counts:
    tensors = {name: torch.from_numpy(part) for name, part in parts.items()}
    cols = 2 * parts["blocks"].shape[1]
    values = Mxfp4().decode(tensors, Window(0, 1, 0, cols), PARAMS)
    given = values.to(TORCH[dtype])
    return Counts(
        int(values.isnan().sum()),
        int(values.isinf().sum()),
        int((values.isfinite() & given.isinf()).sum()),
    )


@pytest.mark.parametrize("dtype", NUMPY)
def test_every_scale_and_byte_is_exact(dtype: str) -> None:
    table = np.array([[oracle(s, c, dtype) for c in range(16)] for s in range(256)])
    codes = np.arange(256)
    expected = np.stack((table[:, codes & 15], table[:, codes >> 4]), axis=-1).reshape(256, 512)
    bits, _ = decode(every_pair(), dtype)
    np.testing.assert_array_equal(bits, expected)


@pytest.mark.parametrize("dtype", NUMPY)
def test_every_scale_and_byte_equals_the_reference(dtype: str) -> None:
    parts = every_pair()
    bits, counts = decode(parts, dtype)
    np.testing.assert_array_equal(bits, reference(parts, dtype))
    assert counts == expected_counts(parts, dtype)


def test_hand_computed() -> None:
    # 0x72: low nibble 2 (1.0) first, then 7 (6.0); scale 128 doubles; scale 0 is 2^-127.
    parts = {
        "blocks": np.full((1, 32), 0x72, np.uint8),
        "scales": np.array([[128, 0]], np.uint8),
    }
    bits, counts = decode(parts, "BF16")
    assert [hex(b) for b in bits[0, [0, 1, 32, 33]]] == ["0x4000", "0x4140", "0x40", "0x140"]
    assert counts == (0, 0, 0)


@pytest.mark.parametrize(
    ("scale", "dtype", "counts"),
    [
        (252, "BF16", (0, 0, 0)),  # 6 * 2^125 is finite
        (253, "BF16", (0, 4, 0)),  # 4 and 6 reach 2^128
        (254, "F32", (0, 8, 0)),  # 2 and 3 too
        (255, "F16", (32, 0, 0)),
        (140, "F16", (0, 0, 0)),  # 6 * 2^13 = 49152
        (141, "F16", (0, 0, 4)),  # 4 and 6 times 2^14 reach 65520
        (253, "F16", (0, 4, 10)),
    ],
)
def test_counts_by_hand(scale: int, dtype: str, counts: tuple[int, int, int]) -> None:
    blocks = np.zeros((1, 16), np.uint8)  # 18 zeros, then each code but the zeros once
    blocks[0, :7] = [0x21, 0x43, 0x65, 0x97, 0xBA, 0xDC, 0xFE]
    parts = {"blocks": blocks, "scales": np.array([[scale]], np.uint8)}
    assert decode(parts, dtype)[1] == counts


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize(
    ("rows", "cols"),
    [(1, 32), (3, 96), (7, 2880), (33, 64), (3, 34), (2, 94), (5, 2), (4, 30), (4, 48), (4, 16)],
)
def test_shapes(rows: int, cols: int, dtype: str) -> None:
    parts = some_parts(rows, cols)
    bits, counts = decode(parts, dtype)
    np.testing.assert_array_equal(bits, reference(parts, dtype))
    assert counts == expected_counts(parts, dtype)


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize(("pad_left", "pad_right"), [(0, 32), (1, 2), (3, 0), (5, 4)])
def test_rows_apart(pad_left: int, pad_right: int, dtype: str) -> None:
    """An odd element offset leaves the output off the alignment of a pair; padding stays."""
    parts = some_parts(5, 64)
    wide = np.full((5, pad_left + 64 + pad_right), 7, NUMPY[dtype])
    out = wide[:, pad_left : pad_left + 64]
    DECODE(parts, Window(0, 5, 0, 64), PARAMS, dtype, out)
    np.testing.assert_array_equal(out.view(f"u{out.itemsize}"), reference(parts, dtype))
    assert (wide[:, :pad_left] == 7).all()
    assert (wide[:, pad_left + 64 :] == 7).all()


def test_no_rows() -> None:
    assert decode(some_parts(0, 64), "BF16")[1] == (0, 0, 0)


def test_parts_are_named_by_params() -> None:
    parts = some_parts(2, 64)
    renamed = {"weight": parts["blocks"], "scale": parts["scales"]}
    out = np.empty((2, 64), np.uint16)
    DECODE(renamed, Window(0, 2, 0, 64), {"codes": "weight", "scales": "scale"}, "BF16", out)
    np.testing.assert_array_equal(out, reference(parts, "BF16"))


def test_read_only_parts() -> None:
    parts = some_parts(4, 64)
    expected = reference(parts, "BF16")
    for part in parts.values():
        part.flags.writeable = False
    np.testing.assert_array_equal(decode(parts, "BF16")[0], expected)


@pytest.mark.parametrize(
    ("blocks", "scales", "out"),
    [((4, 31), (4, 2), (4, 64)), ((4, 32), (4, 1), (4, 64)), ((4, 32), (4, 2), (3, 64))],
)
def test_wrong_shapes_are_refused(
    blocks: tuple[int, int], scales: tuple[int, int], out: tuple[int, int]
) -> None:
    parts = {"blocks": np.zeros(blocks, np.uint8), "scales": np.zeros(scales, np.uint8)}
    with pytest.raises(ShapeMismatch, match="not"):
        DECODE(parts, Window(0, 4, 0, 64), PARAMS, "BF16", np.zeros(out, np.uint16))


@pytest.mark.skipif("+ssse3" not in cpu_features(), reason="reads the assembly of a byte shuffle")
@pytest.mark.parametrize(
    "loop", [fours._one_to_16, fours._two_to_16, fours._one_to_32, fours._two_to_32]
)
def test_inner_loop_is_shuffles(loop: Any) -> None:
    """One run without a jump or call takes codes by shuffles to the outputs of a vector."""
    stored = nb.UniTuple(nb.uint8[::1], 2)
    pitches = nb.UniTuple(nb.int64, 3)
    assembly = assembly_of(loop, stored, nb.uint8[::1], nb.uint8[::1], pitches, fours.JOB.made())
    assert_one_run(assembly, (r"\s(?:v?pshufb|vpermw)\s", r"\sv?mov[du]\w+\s+%[xyz]mm\d+, \d*\("))
