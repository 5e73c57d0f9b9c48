"""FP8 with block, channel and tensor scales, against hand formulas and two other decoders."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.naive_quantized.base import FloatQuantizationCompressor
from compressed_tensors.entrypoints.convert import FP8BlockDequantizer
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from moeconv.codecs.base import QuantScheme
from moeconv.codecs.fp8 import fp8_table, fp8_values, scale_values
from tests.codecs.float_oracles import (
    assert_same,
    assert_windows_are_crops,
    decode_whole,
    fill,
    floats,
    load_checkpoint,
    load_oracle,
    parts_of,
    source_name,
)

E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu
BLOCK128 = QuantScheme("fp8", {"block_rows": 128, "block_cols": 128})
NONE = QuantScheme("", {})


def ct(strategy: str, **values: int) -> QuantScheme:
    fields = {"format": "float-quantized", "num_bits": 8, "type": "float", "strategy": strategy}
    return QuantScheme("compressed-tensors", {**fields, **values})


@pytest.mark.parametrize(
    ("dtype", "byte", "value"),
    [
        ("F8_E4M3", 0x00, 0.0),
        ("F8_E4M3", 0x01, 2.0**-9),
        ("F8_E4M3", 0x07, 7 * 2.0**-9),
        ("F8_E4M3", 0x08, 2.0**-6),
        ("F8_E4M3", 0x38, 1.0),
        ("F8_E4M3", 0x7E, 448.0),
        ("F8_E4M3", 0xFE, -448.0),
        ("F8_E4M3", 0xC1, -2.25),
        ("F8_E5M2", 0x01, 2.0**-16),
        ("F8_E5M2", 0x03, 3 * 2.0**-16),
        ("F8_E5M2", 0x3C, 1.0),
        ("F8_E5M2", 0x7B, 57344.0),
        ("F8_E5M2", 0x7C, float("inf")),
        ("F8_E5M2", 0xFC, float("-inf")),
    ],
)
def test_a_byte_has_the_value_of_the_standard(dtype: str, byte: int, value: float) -> None:
    assert fp8_table(dtype)[byte] == value


@pytest.mark.parametrize(("name", "dtype"), [("F8_E4M3", E4M3), ("F8_E5M2", E5M2)])
def test_all_bytes_are_those_of_torchs_dtype(name: str, dtype: torch.dtype) -> None:
    stored = torch.arange(256, dtype=torch.uint8)
    assert_same(fp8_values(stored, name), stored.view(dtype).float())
    assert_same(fp8_values(stored.view(dtype), name), stored.view(dtype).float())


def test_e4m3_has_two_nans_and_a_minus_zero() -> None:
    values = fp8_values(torch.arange(256, dtype=torch.uint8), "F8_E4M3")
    assert values.isnan().nonzero().flatten().tolist() == [0x7F, 0xFF]
    assert values[0x80] == 0
    assert values[0x80].signbit()


SCALES = {
    "F32": torch.tensor([0.0, 1.0, 0.3, -2.5, 1e-38, 3e38, torch.inf, torch.nan]),
    "BF16": torch.tensor([0.0, 1.0, 0.3, 1e-38, 3e38], dtype=torch.bfloat16),
    "F16": torch.tensor([0.0, 1.0, 0.3, 6e-8, 65504.0], dtype=torch.float16),
    "F8_E8M0": torch.tensor([0, 1, 100, 127, 128, 254, 255], dtype=torch.uint8).view(E8M0),
    "U8": torch.tensor([0, 1, 100, 127, 128, 254, 255], dtype=torch.uint8),
}


def exact(scales: torch.Tensor) -> torch.Tensor:
    """Return the scales as float64, exponents by the formula."""
    if scales.element_size() > 1:
        return scales.double()
    exponents = scales.view(torch.uint8).double()
    return torch.where(exponents == 255, torch.nan, 2.0 ** (exponents - 127))


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_every_byte_times_every_kind_of_scale(kind: str, dtype: torch.dtype) -> None:
    scales = SCALES[kind]
    stored = torch.arange(256, dtype=torch.uint8).view(dtype).repeat(len(scales), 1)
    tensors = {"weight": stored, "weight_scale": scales[:, None]}
    name, got = decode_whole(tensors, ct("channel"))
    assert name == "fp8-channel"
    # 53 bits hold the product exactly, so this rounds once
    assert_same(got, (stored.float().double() * exact(scales)[:, None]).float())


def test_a_hand_computed_block() -> None:
    weight = torch.tensor([[0x38, 0x40, 0x7E], [0x38, 0xB8, 0x01], [0x08, 0x80, 0x7F]])
    scales = torch.tensor([[2.0, 0.5], [4.0, 8.0]])
    tensors = {"weight": weight.to(torch.uint8).view(E4M3), "weight_scale_inv": scales}
    name, got = decode_whole(tensors, QuantScheme("fp8", {"block_rows": 2, "block_cols": 2}))
    assert name == "fp8-block"
    nan = float("nan")
    expected = [[2.0, 4.0, 224.0], [2.0, -2.0, 2.0**-10], [2.0**-4, -0.0, nan]]
    assert_same(got, torch.tensor(expected))


def block_tensors(rows: int, cols: int, block: int = 128) -> dict[str, torch.Tensor]:
    grid = (-(-rows // block), -(-cols // block))
    return {"weight": fill((rows, cols), 1).view(E4M3), "weight_scale_inv": floats(grid, 2)}


# 144/2 = 72 and 200/2 = 100: a block size taken from ratios would be wrong in both
@pytest.mark.parametrize(("rows", "cols"), [(144, 200), (128, 384), (129, 1), (72, 896), (7, 300)])
def test_ragged_blocks_follow_the_declared_size(rows: int, cols: int) -> None:
    tensors = block_tensors(rows, cols)
    _, got = decode_whole(tensors, BLOCK128)
    values, scales = tensors["weight"].float(), tensors["weight_scale_inv"]
    for row in range(0, rows, 31):
        for col in range(cols):
            product = values[row, col] * scales[row // 128, col // 128]
            assert_same(got[row, col], product)


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, E8M0, torch.uint8])
@pytest.mark.parametrize("part", ["weight_scale_inv", "weight_scale", "scale", "qscale_weight"])
def test_block_scales_of_every_dtype_and_name(scale_dtype: torch.dtype, part: str) -> None:
    scales = fill((2, 2), 3, 110, 140)
    scales = scales.view(scale_dtype) if scale_dtype.itemsize == 1 else floats((2, 2), 3)
    scales = scales if scale_dtype.itemsize == 1 else scales.to(scale_dtype)
    tensors = {"weight": fill((144, 200), 4).view(E4M3), part: scales}
    name, got = decode_whole(tensors, BLOCK128)
    assert name == "fp8-block"
    spread = scale_values(scales)[torch.arange(144) // 128][:, torch.arange(200) // 128]
    assert_same(got, tensors["weight"].float() * spread)
    assert_same(scale_values(scales), exact(scales).float())


CROPS = {
    "block": (block_tensors(300, 500), BLOCK128, False),
    "block, other extents": (
        {"weight": fill((50, 70), 5).view(E5M2), "weight_scale": floats((3, 7), 6)},
        QuantScheme("fp8", {"block_rows": 24, "block_cols": 10}),
        False,
    ),
    "block, transposed": (
        {"weight": fill((200, 300), 5).view(E4M3), "weight_scale_inv": floats((2, 3), 6)},
        BLOCK128,
        True,
    ),
    "channel": (
        {"weight": fill((40, 30), 5).view(E4M3), "weight_scale": floats((40, 1), 6)},
        ct("channel"),
        False,
    ),
    "channel, one axis": (
        {"weight": fill((40, 30), 5).view(E4M3), "weight_scale": floats((40,), 6)},
        NONE,
        False,
    ),
    "tensor": (
        {"weight": fill((40, 30), 5).view(E4M3), "weight_scale": floats((), 6)},
        NONE,
        False,
    ),
    "group": (
        {"weight": fill((4, 130), 5).view(E4M3), "weight_scale": floats((4, 3), 6)},
        ct("group", group_size=64),
        False,
    ),
}


@pytest.mark.parametrize("case", CROPS)
def test_a_window_is_a_crop_of_the_whole(case: str) -> None:
    tensors, scheme, transposed = CROPS[case]
    assert_windows_are_crops(tensors, scheme, transposed)


def test_transposed_blocks_are_the_blocks_of_the_transpose() -> None:
    tensors = block_tensors(200, 300)
    _, straight = decode_whole(tensors, BLOCK128)
    flipped = {part: tensor.T.contiguous() for part, tensor in tensors.items()}
    _, got = decode_whole(flipped, BLOCK128, transposed=True)
    assert_same(got, straight)


def ct_scheme(**weights: object) -> QuantizationScheme:
    args = QuantizationArgs(num_bits=8, type="float", symmetric=True, **weights)
    return QuantizationScheme(targets=["Linear"], weights=args)


CT_CASES = {
    "channel": (ct("channel"), {"strategy": "channel"}, (96, 1)),
    "tensor": (ct("tensor"), {"strategy": "tensor"}, (1,)),
    "block": (
        ct("block", block_rows=32, block_cols=64),
        {"strategy": "block", "block_structure": [32, 64]},
        (3, 3),
    ),
}


@pytest.mark.parametrize("case", CT_CASES)
def test_compressed_tensors_decompresses_the_same(case: str) -> None:
    scheme, weights, scale_shape = CT_CASES[case]
    # its block decoder needs whole blocks: 96 = 3 * 32, 192 = 3 * 64
    tensors = {
        "weight": fill((96, 192), 8).view(E4M3),
        "weight_scale": floats(scale_shape, 9),
    }
    _, got = decode_whole(tensors, scheme)
    theirs = FloatQuantizationCompressor.decompress(dict(tensors), ct_scheme(**weights))
    assert_same(got, theirs["weight"])


@pytest.mark.parametrize(("rows", "cols"), [(144, 200), (72, 896), (300, 128)])
def test_compressed_tensors_pads_ragged_blocks_alike(rows: int, cols: int) -> None:
    tensors = block_tensors(rows, cols)
    _, got = decode_whole(tensors, BLOCK128)
    tool = FP8BlockDequantizer(dtype=torch.float32)
    theirs = tool._create_dequantized_weight(tensors["weight"], tensors["weight_scale_inv"])
    assert_same(got, theirs)


PROJ = "model.layers.{layer}.mlp.experts.{expert}.{proj}"
W = "model.layers.{layer}.block_sparse_moe.experts.{expert}.{proj}"
FILES = {
    "deepseekv3-fp8-block128": ("fp8-block", BLOCK128, PROJ, "proj"),
    "glm4moe-fp8-channel": ("fp8-channel", ct("channel"), PROJ, "proj"),
}


@pytest.mark.parametrize("name", FILES)
def test_real_files(name: str) -> None:
    codec, scheme, pattern, words = FILES[name]
    tensors, oracle = load_checkpoint(name), load_oracle(name)
    assert len(oracle) >= 12
    for key, expected in oracle.items():
        parts = parts_of(tensors, source_name(key, pattern, words))
        taken, got = decode_whole(parts, scheme)
        assert taken == codec
        assert_same(got.to(torch.bfloat16), expected)


def test_block_linears_beside_mxfp4_experts() -> None:
    tensors, oracle = load_checkpoint("deepseekv4-mxfp4"), load_oracle("deepseekv4-mxfp4")
    others = {key: value for key, value in oracle.items() if key.startswith("other.")}
    assert len(others) >= 8
    for key, expected in others.items():
        taken, got = decode_whole(parts_of(tensors, source_name(key, "", "")), BLOCK128)
        assert taken == "fp8-block"
        assert_same(got.to(torch.bfloat16), expected)


def test_modelopt_rounds_its_scale_to_bf16_first() -> None:
    name, scheme = "mixtral-fp8-tensor-modelopt", QuantScheme("modelopt", {"quant_algo": "FP8"})
    tensors, oracle = load_checkpoint(name), load_oracle(name)
    assert len(oracle) >= 12
    for key, expected in oracle.items():
        parts = dict(parts_of(tensors, source_name(key, W, "w"), ("input_scale",)))
        taken, ours = decode_whole(parts, scheme)
        assert taken == "fp8-tensor"
        error = (ours - expected.float()).abs()
        assert (error <= ours.abs() * 2.0**-7).all()
        parts["weight_scale"] = parts["weight_scale"].bfloat16()
        _, emulated = decode_whole(parts, scheme)
        assert_same(emulated.to(torch.bfloat16), expected)
