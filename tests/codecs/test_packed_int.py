"""compressed-tensors integers, packed and plain, against compressed-tensors itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.naive_quantized.base import IntQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from moeconv.codecs import CODECS, bits, packed_int
from moeconv.codecs.base import QuantScheme
from moeconv.errors import BadSource, IncompleteModel, ShapeMismatch
from tests.codecs import int_oracles as oracle

# (bits, values, words): worked out by hand, lowest bits first
HAND = [
    (2, [0, 1, 2, 3] * 4, [0xE4E4E4E4]),
    (3, list(range(8)) * 4, [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),  # octal 76543210, four times
    (4, list(range(16)), [0x76543210, 0xFEDCBA98]),
    (5, list(range(8)), [0x8A418820, 0x00000039]),
    (6, list(range(8)), [0x440C2040, 0x00001C61]),
    (7, list(range(8)), [0x40608080, 0x000E1828]),
    (8, [0, 1, 128, 255], [0xFF800100]),
]


def scheme(num_bits: int, strategy: str, **values: int | str | bool) -> QuantScheme:
    common = {"format": "pack-quantized", "type": "int", "num_bits": num_bits}
    return QuantScheme("compressed-tensors", {**common, "strategy": strategy, **values})


def as_int32(words: list[int]) -> np.ndarray:
    return np.array([words], dtype=np.uint32).view(np.int32)


@pytest.mark.parametrize(("width", "values", "words"), HAND)
def test_unpack_hand_computed(width: int, values: list[int], words: list[int]) -> None:
    run, stored = bits.dense_run(width), as_int32(words)
    assert oracle.stream_words(values, width) == words
    unpacked = bits.unpack(torch.from_numpy(stored), width, run, len(values))
    assert unpacked.tolist() == [values]
    assert bits.unpack_peeked(stored, width, run, len(values)).tolist() == [values]
    assert bits.words_for(len(values), run) == len(words)


@pytest.mark.parametrize("width", range(2, 9))
@pytest.mark.parametrize("pack", [oracle.stream_words, oracle.padded_words])
def test_unpack_every_place(width: int, pack) -> None:
    run = bits.dense_run(width) if pack is oracle.stream_words else bits.padded_run(width)
    codes = np.random.default_rng(width).integers(0, 1 << width, (3, 77))
    words = oracle.pack_rows(codes, width, pack)
    assert words.shape[1] == bits.words_for(77, run)
    assert bits.unpack(words, width, run, 77).tolist() == codes.tolist()
    assert bits.unpack_peeked(words.numpy(), width, run, 77).tolist() == codes.tolist()


def test_every_pair_of_int4_code_and_zero() -> None:
    codes = np.tile(np.arange(16), (16, 1))  # row = zero point, column = code
    tensors = {
        "weight_packed": oracle.pack_rows(codes, 4),
        "weight_scale": torch.full((16, 1), 0.5),
        "weight_shape": torch.tensor([16, 16]),
        "weight_zero_point": oracle.pack_rows(np.arange(16)[None], 4).T.contiguous(),
    }
    params = oracle.parameters("packed-int", tensors, scheme(4, "channel", symmetric=False))
    expected = [[(code - zero) * 0.5 for code in range(16)] for zero in range(16)]
    assert oracle.decode("packed-int", tensors, params).tolist() == expected


CASES = [  # strategy, group_size, rows, cols, symmetric, scale dtype
    ("group", 32, 24, 96, True, torch.bfloat16),
    ("group", 32, 13, 64, False, torch.float16),
    ("group", 40, 21, 240, False, torch.float32),
    ("channel", None, 9, 333, True, torch.float32),
    ("channel", None, 37, 205, False, torch.bfloat16),
    ("tensor", None, 5, 301, True, torch.float16),
    ("tensor", None, 5, 301, False, torch.float32),
]


def quantized(width: int, case: tuple, seed: int) -> tuple[dict, QuantizationScheme, dict]:
    strategy, group_size, rows, cols, symmetric, dtype = case
    draw = torch.Generator().manual_seed(seed)
    groups = cols // group_size if strategy == "group" else 1
    shape = (1,) if strategy == "tensor" else (rows, groups)
    top = 1 << (width - 1)
    state = {
        "weight": torch.randn(rows, cols, generator=draw, dtype=torch.float32),
        "weight_scale": (torch.rand(shape, generator=draw) / top * 3 + 0.01).to(dtype),
    }
    if not symmetric:
        zero = torch.randint(-top, top, shape, generator=draw)
        state["weight_zero_point"] = zero.to(torch.int8)
    values = {"num_bits": width, "type": "int", "strategy": strategy, "symmetric": symmetric}
    if group_size:
        values["group_size"] = group_size
    args = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**values))
    return state, args, values


@pytest.mark.parametrize("width", range(2, 9))
@pytest.mark.parametrize("case", CASES)
def test_pack_quantized_equals_compressed_tensors(width: int, case: tuple) -> None:
    state, args, values = quantized(width, case, width)
    stored = PackedQuantizationCompressor.compress(state, args)
    expected = PackedQuantizationCompressor.decompress(stored, args)["weight"]
    packed = scheme(width, **{k: v for k, v in values.items() if k not in ("num_bits", "type")})
    params = oracle.parameters("packed-int", stored, packed)
    weight = oracle.decode("packed-int", stored, params)
    assert torch.equal(weight.to(expected.dtype), expected)
    assert weight.shape == state["weight"].shape
    oracle.assert_windows("packed-int", stored, params, width)


@pytest.mark.parametrize("case", CASES)
def test_int_quantized_equals_compressed_tensors(case: tuple) -> None:
    state, args, values = quantized(8, case, 1)
    stored = IntQuantizationCompressor.compress(state, args)
    expected = IntQuantizationCompressor.decompress(stored, args)["weight"]
    plain = QuantScheme("compressed-tensors", {**values, "format": "int-quantized"})
    params = oracle.parameters("int-quantized", stored, plain)
    weight = oracle.decode("int-quantized", stored, params)
    assert torch.equal(weight.to(expected.dtype), expected)
    oracle.assert_windows("int-quantized", stored, params)


@pytest.mark.parametrize("codec", ["packed-int", "int-quantized"])
def test_activation_order(codec: str) -> None:
    """Columns in quantizing order decode as usual; the stored ones follow them back."""
    state, args, values = quantized(8, ("group", 16, 7, 64, False, torch.float32), 3)
    packed = codec == "packed-int"
    compressor = PackedQuantizationCompressor if packed else IntQuantizationCompressor
    order = torch.randperm(64, generator=torch.Generator().manual_seed(5))
    in_order = compressor.compress(state, args)
    expected = torch.empty(7, 64)
    expected[:, order] = compressor.decompress(in_order, args)["weight"]
    back = torch.argsort(order)
    stored = {**in_order, "weight_g_idx": (back // 16).int()}
    if packed:
        codes = bits.unpack(in_order["weight_packed"], 8, bits.dense_run(8), 64)[:, back]
        stored["weight_packed"] = oracle.pack_rows(codes.numpy(), 8)
    else:
        stored["weight"] = in_order["weight"][:, back]
    layout = "pack-quantized" if packed else "int-quantized"
    config = QuantScheme("compressed-tensors", {**values, "format": layout, "actorder": "group"})
    params = oracle.parameters(codec, stored, config)
    assert torch.equal(oracle.decode(codec, stored, params), expected)
    oracle.assert_windows(codec, stored, params)
    stored["weight_g_idx"][9] = -1  # "not set": no group, and not the last one either
    with pytest.raises(BadSource, match=r"-1\.\.3 .* 4 groups"):
        oracle.decode(codec, stored, params)


@pytest.mark.parametrize("width", [3, 5, 6, 7])
def test_padded_words_of_older_releases(width: int) -> None:
    draw = np.random.default_rng(width)
    codes, zeros = draw.integers(0, 1 << width, (23, 96)), draw.integers(0, 1 << width, (3, 23))
    stored = {
        "weight_packed": oracle.pack_rows(codes, width, oracle.padded_words),
        "weight_scale": torch.rand(23, 3),
        "weight_shape": torch.tensor([23, 96], dtype=torch.int32),
        "weight_zero_point": oracle.pack_rows(zeros, width, oracle.padded_words).T.contiguous(),
    }
    config = scheme(width, "group", group_size=32, symmetric=False)
    params = oracle.parameters("packed-int", stored, config)
    assert params["packing"] == "padded"
    whole = torch.from_numpy(codes - zeros.T.repeat(32, axis=1)).float()
    expected = whole * stored["weight_scale"].repeat_interleave(32, dim=1)
    assert torch.equal(oracle.decode("packed-int", stored, params), expected)
    oracle.assert_windows("packed-int", stored, params)


PACKINGS = [  # words, cols, bits, packing
    (9, 96, 3, "dense"),
    (10, 96, 3, "padded"),
    (1, 10, 3, "dense"),  # one word: the two are the same
    (12, 96, 4, "dense"),
    (6, 45, 4, "dense"),
    (15, 96, 5, "dense"),
    (16, 96, 5, "padded"),
]


@pytest.mark.parametrize(("words", "cols", "width", "packing"), PACKINGS)
def test_packing_follows_from_the_stored_width(
    words: int, cols: int, width: int, packing: str
) -> None:
    assert packed_int.packing_of(words, cols, width) == packing


@pytest.mark.parametrize(
    ("words", "cols", "width", "error"),
    [(2, 11, 3, BadSource), (11, 96, 3, ShapeMismatch), (13, 96, 4, ShapeMismatch)],
)
def test_packing_refused(words: int, cols: int, width: int, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"{cols} columns"):
        packed_int.packing_of(words, cols, width)


def test_plain_zero_points_of_older_releases() -> None:
    stored = {
        "weight_packed": oracle.pack_rows(np.array([[0, 8, 15, 1] * 2] * 2), 4),
        "weight_scale": torch.tensor([[2.0], [1.0]]),
        "weight_shape": torch.tensor([2, 8]),
        "weight_zero_point": torch.tensor([[-8], [7]], dtype=torch.int8),
    }
    params = oracle.parameters("packed-int", stored, scheme(4, "channel", symmetric=False))
    expected = [[0.0, 16.0, 30.0, 2.0] * 2, [-15.0, -7.0, 0.0, -14.0] * 2]
    assert oracle.decode("packed-int", stored, params).tolist() == expected


def small(**changed: torch.Tensor | None) -> dict[str, torch.Tensor]:
    tensors = {
        "weight_packed": torch.zeros((6, 8), dtype=torch.int32),
        "weight_scale": torch.ones((6, 2)),
        "weight_shape": torch.tensor([6, 64]),
        **changed,
    }
    return {part: tensor for part, tensor in tensors.items() if tensor is not None}


G32 = scheme(4, "group", group_size=32)
REFUSED = [
    (small(), scheme(4, "block", group_size=32), BadSource, "block"),
    (small(), scheme(9, "group", group_size=32), BadSource, "9-bit"),
    (small(), scheme(4, "group", group_size=0), BadSource, "group_size 0"),
    (small(), scheme(4, "group"), BadSource, "group_size"),
    (small(), scheme(4, "group", group_size=32, type="float"), BadSource, "type float"),
    (small(), scheme(4, "group", group_size=16), ShapeMismatch, "m.weight_scale"),
    (small(), scheme(3, "group", group_size=32), ShapeMismatch, "m.weight_packed"),
    (small(), scheme(4, "group", group_size=32, symmetric=False), IncompleteModel, "symmetric"),
    (small(weight_shape=torch.tensor([5, 64])), G32, ShapeMismatch, "m.weight_shape"),
    (small(weight_shape=torch.tensor([6, 80])), G32, ShapeMismatch, "m.weight_packed"),
    (small(weight_scale=torch.ones(5, 2)), G32, ShapeMismatch, "m.weight_scale"),
    (small(weight_scale=torch.ones(6, 2).to(torch.int8)), G32, ShapeMismatch, "dtype I8"),
]


@pytest.mark.parametrize(("tensors", "config", "error", "match"), REFUSED)
def test_contradictions_are_refused(tensors, config, error, match: str) -> None:
    with pytest.raises(error, match=match):
        oracle.parameters("packed-int", tensors, config)


def test_without_weight_shape_the_groups_count_the_columns() -> None:
    tensors = small(weight_shape=None)
    params = oracle.parameters("packed-int", tensors, G32)
    assert (params["rows"], params["cols"]) == (6, 64)
    with pytest.raises(BadSource, match="weight_shape"):
        config = scheme(3, "channel")
        oracle.parameters("packed-int", small(weight_shape=None), config)


def test_shape_before_the_payload_is_read() -> None:
    found = oracle.refs(small())
    params = CODECS["packed-int"].detect(found, G32)
    assert params is not None and "cols" not in params
    assert CODECS["packed-int"].shape(found, params) == (6, 64)


def test_stacked_experts() -> None:
    tensors = {
        "weight_packed": torch.zeros((3, 6, 8), dtype=torch.int32),
        "weight_scale": torch.ones((3, 6, 2)),
        "weight_shape": torch.tensor([[6, 63]] * 3),
    }
    params = oracle.parameters("packed-int", tensors, G32)
    assert CODECS["packed-int"].shape(oracle.refs(tensors), params) == (3, 6, 63)
    tensors["weight_shape"][1, 1] = 62
    with pytest.raises(ShapeMismatch, match="weight_shape"):
        oracle.parameters("packed-int", tensors, G32)


def test_fixture_kimi_k2() -> None:
    *_, config = oracle.fixture("kimik2-int4-packed-g32")
    weights = config["config_groups"]["group_0"]["weights"]
    values = {k: weights[k] for k in ("num_bits", "type", "strategy", "group_size", "symmetric")}
    kimi = QuantScheme("compressed-tensors", {**values, "format": config["format"]})
    oracle.assert_fixture("packed-int", "kimik2-int4-packed-g32", kimi)
