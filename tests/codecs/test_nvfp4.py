"""NVFP4 of compressed-tensors and of ModelOpt, against hand formulas and their own tools."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from moeconv.codecs import CODECS
from moeconv.codecs.base import QuantScheme
from moeconv.codecs.mxfp4 import e2m1_values
from moeconv.errors import BadSource, IncompleteModel
from tests.codecs.float_oracles import (
    Tensors,
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

E4M3 = torch.float8_e4m3fn
CT = QuantScheme(
    "compressed-tensors",
    {"format": "nvfp4-pack-quantized", "num_bits": 4, "type": "float",
     "strategy": "tensor_group", "group_size": 16, "symmetric": True},
)  # fmt: skip
MODELOPT = QuantScheme("modelopt", {"quant_algo": "NVFP4", "group_size": 16})
PATTERN = "model.layers.{layer}.mlp.experts.{expert}.{proj}"


def ct(codes: torch.Tensor, scales: torch.Tensor, whole: torch.Tensor) -> Tensors:
    return {"weight_packed": codes, "weight_scale": scales, "weight_global_scale": whole}


def modelopt(codes: torch.Tensor, scales: torch.Tensor, whole: torch.Tensor) -> Tensors:
    return {"weight": codes, "weight_scale": scales, "weight_scale_2": whole}


def e4m3(*codes: int) -> torch.Tensor:
    return torch.tensor([codes], dtype=torch.uint8).view(E4M3)


@pytest.mark.parametrize(
    ("tensors", "scheme", "factor"),
    [
        (ct, CT, 1 / 4),  # a divisor
        (modelopt, MODELOPT, 4),  # a multiplier
    ],
)
def test_a_hand_computed_row(tensors, scheme: QuantScheme, factor: float) -> None:
    codes = torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2], dtype=torch.uint8)
    scales = e4m3(0x40, 0xB8)  # 2, -1
    _, got = decode_whole(tensors(codes, scales, torch.tensor([4.0])), scheme)
    table = [0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    expected = [2 * factor * value for value in table] + [-factor * value for value in table]
    assert_same(got, torch.tensor([expected]))


def sample(seed: int, rows: int = 40, cols: int = 160) -> tuple[torch.Tensor, ...]:
    """Return codes, scales of every byte (NaN too) and a scale with a full mantissa."""
    groups = -(-cols // 16)
    whole = torch.tensor([1.1])
    return fill((rows, cols // 2), seed), fill((rows, groups), seed + 1).view(E4M3), whole


def test_the_order_of_the_operations() -> None:
    codes, scales, whole = sample(3)
    spread = scales.float()[:, torch.arange(160) // 16]
    values = e2m1_values(codes)
    _, divided = decode_whole(ct(codes, scales, whole), CT)
    _, multiplied = decode_whole(modelopt(codes, scales, whole), MODELOPT)
    assert_same(divided, values * (spread / whole))
    assert_same(multiplied, values * (spread * whole))
    # the other orders are other numbers, so the equalities above say something
    known = ~spread.isnan()
    assert (divided != values * spread / whole)[known].any()
    assert (multiplied != values * spread * whole)[known].any()
    assert (divided != values * (spread * (1 / whole)))[known].any()


def test_nan_scales_stay_nan() -> None:
    codes = fill((1, 16), 5)
    for tensors, scheme in ((ct, CT), (modelopt, MODELOPT)):
        _, got = decode_whole(tensors(codes, e4m3(0x7F, 0xFF), torch.tensor(2.0)), scheme)
        assert got.isnan().all()


@pytest.mark.parametrize("cols", [16, 160, 88])  # 88: the last group is cut off
def test_a_window_is_a_crop_of_the_whole(cols: int) -> None:
    assert_windows_are_crops(ct(*sample(1, cols=cols)), CT)
    assert_windows_are_crops(modelopt(*sample(2, cols=cols)), MODELOPT)


@pytest.mark.parametrize("whole", [(), (1,), (1, 1)])
def test_detection(whole: tuple) -> None:
    packed = refs(
        weight_packed=("U8", (8, 32)),
        weight_scale=("F8_E4M3", (8, 4)),
        weight_global_scale=("F32", whole),
    )
    plain = refs(
        weight=("U8", (8, 32)), weight_scale=("F8_E4M3", (8, 4)), weight_scale_2=("F32", whole)
    )
    for found, scheme, name in ((packed, CT, "nvfp4-ct"), (plain, MODELOPT, "nvfp4-modelopt")):
        for config in (scheme, QuantScheme("", {})):
            codec, params = detect_one(found, config)
            assert codec.name == name
            assert codec.shape(found, params) == (8, 64)


@pytest.mark.parametrize("codes", ["weight_packed", "weight"])
@pytest.mark.parametrize("scheme", [CT, MODELOPT, QuantScheme("", {})])
def test_a_missing_scale_of_the_whole_is_refused(codes: str, scheme: QuantScheme) -> None:
    found = refs(**{codes: ("U8", (8, 32))}, weight_scale=("F8_E4M3", (8, 4)))
    missing = {"weight_packed": "weight_global_scale", "weight": "weight_scale_2"}[codes]
    with pytest.raises(IncompleteModel, match=rf"m\.{codes}.*{missing}"):
        takers(found, scheme)


def test_another_group_size_is_refused() -> None:
    found = refs(
        weight=("U8", (8, 32)), weight_scale=("F8_E4M3", (8, 4)), weight_scale_2=("F32", ())
    )
    with pytest.raises(BadSource, match=r"m\.weight.*group_size 32, not 16"):
        takers(found, QuantScheme("modelopt", {"quant_algo": "NVFP4", "group_size": 32}))


@pytest.mark.parametrize(
    "found",
    [
        refs(weight_packed=("I32", (8, 8)), weight_scale=("F8_E4M3", (8, 4))),
        refs(
            weight_packed=("U8", (8, 32)),
            weight_scale=("U8", (8, 4)),
            weight_global_scale=("F32", (1,)),
        ),
    ],
)
def test_what_is_not_nvfp4(found: dict) -> None:
    for name in ("nvfp4-ct", "nvfp4-modelopt"):
        assert CODECS[name].detect(found, CT) is None


def test_compressed_tensors_decompresses_the_same() -> None:
    tensors = ct(*sample(4))
    _, got = decode_whole(tensors, CT)
    args = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    theirs = NVFP4PackedCompressor.decompress(dict(tensors), scheme)["weight"]
    assert_same(got.to(torch.bfloat16), theirs)


@pytest.mark.parametrize(
    ("name", "codec", "scheme"),
    [
        ("qwen3moe-nvfp4-ct", "nvfp4-ct", CT),
        ("qwen3moe-nvfp4-modelopt-dev", "nvfp4-modelopt", MODELOPT),
    ],
)
def test_real_files(name: str, codec: str, scheme: QuantScheme) -> None:
    tensors, oracle = load_checkpoint(name), load_oracle(name)
    assert len(oracle) >= 24
    for key, expected in oracle.items():
        parts = parts_of(tensors, source_name(key, PATTERN, "proj"), ("input_scale",))
        taken, got = decode_whole(parts, scheme)
        assert taken == codec
        rounded = got.to(torch.bfloat16)
        if name == "qwen3moe-nvfp4-modelopt-dev":
            assert not (expected.signbit() & (expected == 0)).any()  # the tool loses -0
            rounded = rounded + 0.0  # -0 + 0 is 0, all else stays
        assert_same(rounded, expected)
