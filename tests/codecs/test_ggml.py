"""ggml's blocks: worked by hand, by scalar formulas, and against ggml's own numbers."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from moeconv.codecs import CODECS
from moeconv.codecs.base import QuantScheme, Window, block_of, grow, header_shapes, part_slice
from moeconv.codecs.ggml import Ggml, dequantize_rows
from moeconv.errors import BadSource
from moeconv.measure.cases import HALVES  # finite in the random blocks below
from moeconv.store.gguf_header import read_header
from moeconv.types import TensorRef, Weight

SCHEME = QuantScheme("", {})
TYPES = [
    kind.name
    for kind, (cols, _) in gguf.GGML_QUANT_SIZES.items()
    if cols > 1 and kind.name not in ("Q8_1", "Q8_K", "Q1_0")
]
# The other GGUF fixtures have the original model as their oracle: test_gguf_names.py.
FIXTURES = ("gguf-gptoss-mxfp4", "gguf-qwen3moe-bf16", "gguf-qwen3moe-q4_k_m", "gguf-qwen3moe-q8_0")


def ref_of(kind: str, shape: tuple[int, ...]) -> TensorRef:
    return TensorRef("w", f"GGML:{kind}", shape, "model.gguf", 0, int(np.prod(shape)))


def decode(kind: str, rows: np.ndarray) -> np.ndarray:
    """Return what the codec makes of stored rows [R, nbytes], found as the model builder would."""
    found = {"weight": ref_of(kind, rows.shape)}
    params = Ggml().detect(found, SCHEME)
    assert params is not None
    shape = Ggml().shape(found, params)
    window = Window(0, shape[0], 0, shape[1])
    values = Ggml().decode({"weight": torch.from_numpy(rows)}, window, params)
    assert values.dtype == torch.float32
    assert tuple(values.shape) == shape
    return values.numpy()


def half(value: float) -> bytes:
    return struct.pack("<e", value)


def f16(raw: bytes) -> float:
    return float(struct.unpack("<e", raw)[0])


# One block by hand: type, bytes, some of its values.
BY_HAND: tuple[tuple[str, bytes, dict[int, float]], ...] = (
    # d = 0.5; byte 0 = 0x1f: element 0 is 15 - 8, element 16 is 1 - 8; byte 15 = 0x80
    (
        "Q4_0",
        half(0.5) + b"\x1f" + bytes([0x88] * 14) + b"\x80",
        {0: 3.5, 16: -3.5, 1: 0.0, 15: -4.0, 31: 0.0},
    ),
    # d = 2; -128, 127, 1 as signed bytes
    ("Q8_0", half(2.0) + b"\x80\x7f\x01" + bytes(29), {0: -256.0, 1: 254.0, 2: 2.0, 3: 0.0}),
    # byte 128 is 2^1 with the doubled table's half: codes 7 and 9 are 6 * 2 and -0.5 * 2
    (
        "MXFP4",
        b"\x80" + b"\x97" + b"\x21" * 15,
        {0: 12.0, 16: -1.0, 1: 1.0, 17: 2.0},
    ),
    # 255 is no NaN in ggml: 2^128 times the code's half; code 1 is 0.5
    ("MXFP4", b"\xff" + b"\x01" + bytes(15), {0: 2.0**127, 1: 0.0}),
    # 0 is 2^-127, a subnormal: code 2 is 1
    ("MXFP4", b"\x00" + b"\x02" + bytes(15), {0: 2.0**-127}),
    # d = 2, dmin = 0.5; sub-blocks 0, 1, 4: (sc, m) = (3, 5), (63, 1), (low 1 | 2 << 4, 7 | 1 << 4)
    (
        "Q4_K",
        half(2.0)
        + half(0.5)
        + bytes([3 | 0x80, 63, 0, 0, 5 | 0x40, 1, 0, 0, 0x71, 0, 0, 0])
        + bytes([0x4F] + [0] * 31 + [0] * 32 + [0x02] + [0] * 31 + [0] * 32),
        {
            0: 2 * 3 * 15 - 0.5 * 5,
            1: -0.5 * 5,
            32: 2 * 63 * 4 - 0.5 * 1,
            64: 0.0,
            128: 2 * 33 * 2 - 0.5 * 23,
            129: -0.5 * 23,
        },
    ),
    # d = 0.25; ql[0] = 0x5a, qh[0] = 0b11_01_10_11; scales -2, 3, ...
    (
        "Q6_K",
        bytes([0x5A] + [0] * 127)
        + bytes([0b11011011] + [0] * 63)
        + struct.pack("16b", -2, 1, 3, 1, -4, 1, 5, 1, *[0] * 8)
        + half(0.25),
        {
            0: 0.25 * -2 * ((0xA | 3 << 4) - 32),
            32: 0.25 * 3 * ((0 | 2 << 4) - 32),
            64: 0.25 * -4 * ((0x5 | 1 << 4) - 32),
            96: 0.25 * 5 * ((0 | 3 << 4) - 32),
            1: 0.25 * -2 * -32,
            128: 0.0,
        },
    ),
)


@pytest.mark.parametrize(("kind", "block", "expected"), BY_HAND)
def test_a_block_worked_by_hand(kind: str, block: bytes, expected: dict[int, float]) -> None:
    values = decode(kind, np.frombuffer(block, np.uint8)[None].copy())[0]
    assert {index: float(values[index]) for index in expected} == expected


def q4_0(block: bytes) -> list[float]:
    nibbles = [byte & 15 for byte in block[2:]] + [byte >> 4 for byte in block[2:]]
    return [f16(block[:2]) * (nibble - 8) for nibble in nibbles]


def q4_1(block: bytes) -> list[float]:
    nibbles = [byte & 15 for byte in block[4:]] + [byte >> 4 for byte in block[4:]]
    return [_plus(f16(block[:2]) * nibble, f16(block[2:4])) for nibble in nibbles]


def _plus(product: float, offset: float) -> float:
    return float(np.float32(product) + np.float32(offset))


def _fives(bits: bytes, packed: bytes) -> list[int]:
    nibbles = [byte & 15 for byte in packed] + [byte >> 4 for byte in packed]
    high = int.from_bytes(bits, "little")
    return [nibble | (high >> index & 1) << 4 for index, nibble in enumerate(nibbles)]


def q5_0(block: bytes) -> list[float]:
    return [f16(block[:2]) * (code - 16) for code in _fives(block[2:6], block[6:])]


def q5_1(block: bytes) -> list[float]:
    codes = _fives(block[4:8], block[8:])
    return [_plus(f16(block[:2]) * code, f16(block[2:4])) for code in codes]


def q8_0(block: bytes) -> list[float]:
    return [f16(block[:2]) * value for value in struct.unpack("32b", block[2:])]


def q4_k(block: bytes) -> list[float]:
    d, dmin, s, q = f16(block[:2]), f16(block[2:4]), block[4:16], block[16:]
    values = []
    for j in range(8):
        if j < 4:
            sc, m = s[j] & 63, s[j + 4] & 63
        else:
            sc = (s[j + 4] & 15) | ((s[j - 4] >> 6) << 4)
            m = (s[j + 4] >> 4) | ((s[j] >> 6) << 4)
        scale, offset = np.float32(d * sc), np.float32(dmin * m)
        for byte in q[32 * (j // 2) : 32 * (j // 2 + 1)]:
            nibble = byte >> 4 if j % 2 else byte & 15
            values.append(float(np.float32(scale * np.float32(nibble)) - offset))
    return values


def q6_k(block: bytes) -> list[float]:
    ql, qh, d = block[:128], block[128:192], f16(block[208:])
    scales = struct.unpack("16b", block[192:208])
    values = [0.0] * 256
    for index in range(256):
        part, within = divmod(index, 128)
        quarter, lane = divmod(within, 32)
        low = ql[64 * part + 32 * (quarter % 2) + lane] >> (4 * (quarter // 2)) & 15
        high = qh[32 * part + lane] >> (2 * quarter) & 3
        scale = float(np.float32(d * scales[index // 16]))
        values[index] = float(np.float32(scale * ((low | high << 4) - 32)))
    return values


def mxfp4(block: bytes) -> list[float]:
    codes = (0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6)
    nibbles = [byte & 15 for byte in block[1:]] + [byte >> 4 for byte in block[1:]]
    return [codes[nibble] * 2.0 ** (block[0] - 127) for nibble in nibbles]


FORMULAS: dict[str, Callable[[bytes], Sequence[float]]] = {
    "Q4_0": q4_0,
    "Q4_1": q4_1,
    "Q5_0": q5_0,
    "Q5_1": q5_1,
    "Q8_0": q8_0,
    "Q4_K": q4_k,
    "Q6_K": q6_k,
    "MXFP4": mxfp4,
}


@pytest.mark.parametrize("kind", FORMULAS)
def test_random_blocks_by_the_formula(kind: str) -> None:
    random = np.random.default_rng(11)
    nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    blocks = random.integers(0, 256, (40, nbytes), np.uint8)
    for at in HALVES[kind]:
        numbers = random.normal(size=40).astype(np.float16)
        blocks[:, at : at + 2] = numbers.view(np.uint8).reshape(40, 2)
    if kind == "MXFP4":
        blocks[:, 0] = np.arange(40) * 6
    expected = np.array([FORMULAS[kind](block.tobytes()) for block in blocks], np.float32)
    assert np.array_equal(decode(kind, blocks), expected)


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_decodes_random_rows_as_gguf_py(kind: str) -> None:
    code = gguf.GGMLQuantizationType[kind]
    cols, nbytes = gguf.GGML_QUANT_SIZES[code]
    rows = np.random.default_rng(3).integers(0, 256, (35, 3 * nbytes), np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(rows, code)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decode(kind, rows)
    assert found.shape == (35, 3 * cols)
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("kind", TYPES)
def test_a_window_is_a_crop_of_the_whole(kind: str) -> None:
    cols, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    rows = np.random.default_rng(9).integers(0, 256, (6, 4 * nbytes), np.uint8)
    found = {"weight": ref_of(kind, rows.shape)}
    params = Ggml().detect(found, SCHEME)
    assert params is not None
    weight = Weight(
        *("w", "ggml", 6, 4 * cols, None, found, False, params),
        *("main", None, None, (), (6, 4 * cols), False, False),
    )
    tile = Ggml().tiles(params)["weight"]
    assert header_shapes(tile, 6, 4 * cols) == (rows.shape,)
    block = block_of([tile], 6, 4 * cols)
    assert block == (1, cols)
    window = grow(Window(2, 5, cols + 1, 2 * cols + 3), block, 6, 4 * cols)
    part = part_slice(tile, window, weight)
    stored = rows[part.major.start : part.major.stop, part.minor.start : part.minor.stop]
    cropped = Ggml().decode({"weight": torch.from_numpy(stored)}, window, params).numpy()
    whole = dequantize_rows(rows, kind)[2:5, cols : 3 * cols]
    assert np.array_equal(cropped.view(np.uint32), whole.view(np.uint32))


@pytest.mark.parametrize("name", FIXTURES)
def test_experts_equal_ggml_bit_for_bit(name: str, fixtures: Path) -> None:
    """The oracle's values were compared with libggml's to_float when it was made."""
    oracle = load_file(fixtures / "oracles" / name / "dequantized.safetensors")
    path = fixtures / "checkpoints" / name / "model.gguf"
    compared = set()
    data = path.read_bytes()
    for ref in read_header(path, "model.gguf").tensors:
        _, layer, *rest = ref.name.split(".")
        if not rest or not rest[0].endswith("_exps"):
            continue
        projection = rest[0].removeprefix("ffn_").removesuffix("_exps")
        stored = np.frombuffer(data, np.uint8, ref.nbytes, ref.offset)
        values = _values(ref, stored)
        for expert, matrix in enumerate(values):
            key = f"layers.{layer}.experts.{expert}.{projection}.{rest[1]}"
            compared.add(key)
            assert np.array_equal(matrix.view(np.uint32), oracle[key].view(np.uint32)), key
    assert compared == {key for key in oracle if ".experts." in key}
    assert compared


def _values(ref: TensorRef, stored: np.ndarray) -> np.ndarray:
    """Return float32 [E, R, C] (or [E, R] of biases) of the bytes of one tensor."""
    if ref.dtype == "F32":
        return stored.view(np.float32).reshape(ref.shape)
    if ref.dtype == "BF16":
        return (stored.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(ref.shape)
    rows = stored.reshape(-1, ref.shape[-1])
    return decode(ref.dtype.removeprefix("GGML:"), rows.copy()).reshape(*ref.shape[:-1], -1)


def test_the_codec_is_registered_and_alone_in_detecting_its_tensors() -> None:
    found = {"weight": ref_of("Q4_K", (4, 144))}
    detecting = [name for name, codec in CODECS.items() if codec.detect(found, SCHEME) is not None]
    assert detecting == ["ggml"]


def test_the_logical_shape_is_in_elements() -> None:
    found = {"weight": ref_of("Q4_K", (8, 4, 288))}
    params = Ggml().detect(found, SCHEME)
    assert params == {"type": "Q4_K", "block_cols": 256, "block_nbytes": 144}
    assert Ggml().shape(found, params) == (8, 4, 512)


@pytest.mark.parametrize(
    "found",
    [
        {"weight": TensorRef("w", "F32", (4, 4), "f", 0, 64)},
        {"weight": TensorRef("w", "U8", (4, 144), "f", 0, 576)},
        {"blocks": ref_of("Q4_K", (4, 144))},
        {"weight": ref_of("Q4_K", (4, 144)), "scales": ref_of("Q4_K", (4, 144))},
    ],
)
def test_other_tensors_are_not_detected(found: dict[str, TensorRef]) -> None:
    assert Ggml().detect(found, SCHEME) is None


@pytest.mark.parametrize("kind", ["Q8_1", "Q8_K", "Q1_0", "Q9_Z"])
def test_a_type_without_a_decoder_is_refused_by_name(kind: str) -> None:
    with pytest.raises(BadSource, match=kind):
        Ggml().detect({"weight": ref_of(kind, (4, 4))}, SCHEME)
