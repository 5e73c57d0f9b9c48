"""MXFP8 against the formula, compressed-tensors and a real file."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.mxfp8.base import MXFP8QuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from moeconv.codecs.base import QuantScheme
from moeconv.errors import ShapeMismatch
from tests.codecs.float_oracles import (
    assert_same,
    assert_windows_are_crops,
    decode_whole,
    detect_one,
    fill,
    load_checkpoint,
    load_oracle,
    parts_of,
    refs,
    source_name,
    takers,
)

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
CT = QuantScheme(
    "compressed-tensors",
    {"format": "mxfp8-quantized", "num_bits": 8, "type": "float", "strategy": "group",
     "group_size": 32, "symmetric": True},
)  # fmt: skip
NONE = QuantScheme("", {})
ROWS32 = QuantScheme("fp8", {"block_rows": 1, "block_cols": 32})
BLOCK128 = QuantScheme("fp8", {"block_rows": 128, "block_cols": 128})


def test_a_hand_computed_block() -> None:
    weight = torch.full((2, 64), 0x40, dtype=torch.uint8)  # 2.0
    weight[1, 33] = 0xFE  # -448
    weight[1, 34] = 0x7F  # NaN
    scales = torch.tensor([[127, 129], [0, 120]], dtype=torch.uint8)
    _, got = decode_whole({"weight": weight.view(E4M3), "weight_scale": scales}, CT)
    expected = torch.tensor([[2.0, 8.0], [2.0**-126, 2.0**-6]]).repeat_interleave(32, dim=1)
    expected[1, 33] = -448 * 2.0**-7
    expected[1, 34] = torch.nan
    assert_same(got, expected)


def test_every_byte_under_every_exponent() -> None:
    scales = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 8)
    weight = torch.arange(256, dtype=torch.uint8).repeat(256, 1).view(E4M3)
    _, got = decode_whole({"weight": weight, "weight_scale_inv": scales}, NONE)
    powers = 2.0 ** (scales[:, :1].double() - 127)
    powers[255] = torch.nan
    assert_same(got, (weight.float().double() * powers).float())


@pytest.mark.parametrize("cols", [32, 160, 200])  # 200: the last group is cut off
def test_a_window_is_a_crop_of_the_whole(cols: int) -> None:
    weight, scales = fill((24, cols), 1).view(E4M3), fill((24, -(-cols // 32)), 2)
    assert_windows_are_crops({"weight": weight, "weight_scale": scales}, CT)


def test_scales_of_a_transposed_stack_lie_as_it_does() -> None:
    found = refs(weight=("F8_E4M3", (3, 160, 24)), weight_scale=("U8", (3, 5, 24)))
    assert takers(found, CT) == ["mxfp8"]


@pytest.mark.parametrize(
    ("codec", "part", "dtype", "scheme"),
    [
        ("mxfp8", "weight_scale", "U8", CT),
        ("mxfp8", "weight_scale", "F8_E8M0", CT),
        ("mxfp8", "weight_scale_inv", "U8", NONE),
        ("mxfp8", "weight_scale_inv", "U8", QuantScheme("fp8", {})),
        ("mxfp8", "weight_scale_inv", "U8", QuantScheme("mxfp8", {})),
        ("mxfp8", "weight_scale_inv", "F8_E8M0", QuantScheme("mxfp8", {})),
        ("mxfp8", "weight_scale", "U8", QuantScheme("modelopt", {"quant_algo": "MXFP8"})),
        ("mxfp8", "weight_scale_inv", "U8", ROWS32),
        ("mxfp8", "weight_scale_inv", "F8_E8M0", ROWS32),
        ("fp8-block", "weight_scale_inv", "F32", ROWS32),
    ],
)
def test_detection(codec: str, part: str, dtype: str, scheme: QuantScheme) -> None:
    found = refs(weight=("F8_E4M3", (48, 96)), **{part: (dtype, (48, 3))})
    taken, params = detect_one(found, scheme)
    assert taken.name == codec
    assert taken.shape(found, params) == (48, 96)


def test_exponents_in_blocks_are_not_mxfp8() -> None:
    found = refs(weight=("F8_E4M3", (48, 96)), weight_scale_inv=("U8", (1, 1)))
    assert takers(found, BLOCK128) == ["fp8-block"]
    with pytest.raises(ShapeMismatch, match=r"m\.weight_scale_inv.*expected \[48, 3\]"):
        takers(found, NONE)


def test_compressed_tensors_decompresses_the_same() -> None:
    # exponents whose products neither overflow nor vanish in bf16, in which it computes
    tensors = {"weight": fill((48, 160), 3).view(E4M3), "weight_scale": fill((48, 5), 4, 11, 245)}
    _, got = decode_whole(tensors, CT)
    args = QuantizationArgs(num_bits=8, type="float", strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    theirs = MXFP8QuantizationCompressor.decompress(dict(tensors), scheme)["weight"]
    assert_same(got.to(torch.bfloat16), theirs.to(torch.bfloat16))


def test_real_files() -> None:
    tensors, oracle = load_checkpoint("mixtral-mxfp8-ct"), load_oracle("mixtral-mxfp8-ct")
    assert len(oracle) >= 24
    pattern = "model.layers.{layer}.block_sparse_moe.experts.{expert}.{proj}"
    for key, expected in oracle.items():
        taken, got = decode_whole(parts_of(tensors, source_name(key, pattern, "w")), CT)
        assert taken == "mxfp8"
        assert_same(got.to(torch.bfloat16), expected)
