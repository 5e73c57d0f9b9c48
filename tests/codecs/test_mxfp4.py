"""MXFP4 under its three namings, against hand-computed blocks and two other decoders."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from moeconv.codecs import CODECS
from moeconv.codecs.base import QuantScheme
from moeconv.codecs.mxfp4 import E2M1, e2m1_values, e8m0_values
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
)

E8M0 = torch.float8_e8m0fnu
GPT_OSS = QuantScheme("mxfp4", {})
V4 = QuantScheme("fp8", {"block_rows": 128, "block_cols": 128})
CT = QuantScheme(
    "compressed-tensors",
    {"format": "mxfp4-pack-quantized", "num_bits": 4, "type": "float", "strategy": "group",
     "group_size": 32, "symmetric": True},
)  # fmt: skip
NVFP4_WORD = QuantScheme("compressed-tensors", {"format": "nvfp4-pack-quantized"})


def named(codes: torch.Tensor, scales: torch.Tensor) -> dict[str, tuple[Tensors, QuantScheme]]:
    """Return codes [R, C/2] and scales [R, C/32] under every naming."""
    rows, groups = scales.shape
    blocks = codes.reshape(rows, groups, 16)
    return {
        "gpt-oss": ({"blocks": blocks, "scales": scales}, GPT_OSS),
        "v4": ({"weight": codes.view(torch.int8), "scale": scales.view(E8M0)}, V4),
        "v4, U8": ({"weight": codes, "scale": scales}, V4),
        "ct": ({"weight_packed": codes, "weight_scale": scales}, CT),
        "ct, E8M0": ({"weight_packed": codes, "weight_scale": scales.view(E8M0)}, CT),
    }


NAMES = tuple(named(fill((1, 16), 0), fill((1, 1), 0)))


def test_exponents_are_those_of_torchs_dtype() -> None:
    stored = torch.arange(256, dtype=torch.uint8)
    assert_same(e8m0_values(stored), stored.view(E8M0).float())
    assert e8m0_values(stored)[0] == 2.0**-127
    assert e8m0_values(stored)[127] == 1
    assert e8m0_values(stored)[254] == 2.0**127
    assert e8m0_values(stored)[255].isnan()


def test_the_low_nibble_is_first() -> None:
    values = e2m1_values(torch.tensor([[0x21, 0x8F, 0x70]], dtype=torch.uint8))
    assert_same(values, torch.tensor([[0.5, 1.0, -6.0, -0.0, 0.0, 6.0]]))


@pytest.mark.parametrize("name", NAMES)
def test_a_hand_computed_block(name: str) -> None:
    codes = torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 4], dtype=torch.uint8)
    tensors, scheme = named(codes, torch.tensor([[128, 126]], dtype=torch.uint8))[name]
    _, got = decode_whole(tensors, scheme)
    table = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    expected = [2 * value for value in table] * 2 + [value / 2 for value in table] * 2
    assert_same(got, torch.tensor([expected], dtype=torch.float32))


@pytest.mark.parametrize("name", NAMES)
def test_every_code_under_every_exponent(name: str) -> None:
    scales = torch.arange(256, dtype=torch.uint8)[:, None]
    codes = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2, dtype=torch.uint8)
    tensors, scheme = named(codes.repeat(256, 1), scales)[name]
    taken, got = decode_whole(tensors, scheme)
    assert taken == "mxfp4"
    powers = 2.0 ** (scales.double() - 127)
    powers[255] = torch.nan
    assert_same(got, (torch.tensor(E2M1 * 2, dtype=torch.float64) * powers).float())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("rows", "cols"), [(40, 160), (3, 32)])
def test_a_window_is_a_crop_of_the_whole(name: str, rows: int, cols: int) -> None:
    codes, scales = fill((rows, cols // 2), 1), fill((rows, cols // 32), 2)
    assert_windows_are_crops(*named(codes, scales)[name])


def test_a_last_group_may_be_cut_off() -> None:
    codes, scales = fill((6, 40), 1), fill((6, 3), 2, 100, 150)  # 80 columns: 32 + 32 + 16
    tensors = {"weight_packed": codes, "weight_scale": scales}
    _, got = decode_whole(tensors, CT)
    spread = e8m0_values(scales)[:, torch.arange(80) // 32]
    assert_same(got, e2m1_values(codes) * spread)
    assert_windows_are_crops(tensors, CT)


def test_shapes_of_stacked_weights() -> None:
    found = refs(blocks=("U8", (4, 192, 2, 16)), scales=("U8", (4, 192, 2)))
    codec, params = detect_one(found, GPT_OSS)
    assert codec.shape(found, params) == (4, 192, 64)
    found = refs(weight_packed=("U8", (4, 192, 32)), weight_scale=("U8", (4, 192, 2)))
    codec, params = detect_one(found, CT)
    assert codec.shape(found, params) == (4, 192, 64)


@pytest.mark.parametrize(
    ("found", "scheme"),
    [
        # U8 scales beside packed codes, and a config that does not say what they are
        (refs(weight_packed=("U8", (8, 32)), weight_scale=("U8", (8, 2))), NVFP4_WORD),
        (refs(weight_packed=("U8", (8, 32)), weight_scale=("U8", (8, 2))), QuantScheme("", {})),
        (refs(weight_packed=("I32", (8, 8)), weight_scale=("U8", (8, 2))), CT),
        (refs(weight_packed=("U8", (8, 32)), weight_scale=("BF16", (8, 2))), CT),
        (refs(weight=("U8", (8, 32)), weight_scale=("U8", (8, 2))), CT),
        (refs(weight=("I8", (8, 32)), scale=("F32", (8, 1))), V4),
        (refs(weight=("I8", (8, 32)), scale=("F8_E8M0", ())), V4),
        (refs(blocks=("U8", (8, 2, 16)), scales=("U8", (8,))), GPT_OSS),
        (refs(blocks=("U8", (8, 2, 16))), GPT_OSS),
        (refs(blocks=("I32", (8, 2, 16)), scales=("U8", (8, 2))), GPT_OSS),
    ],
)
def test_what_is_not_mxfp4(found: dict, scheme: QuantScheme) -> None:
    assert CODECS["mxfp4"].detect(found, scheme) is None


def test_compressed_tensors_decompresses_the_same() -> None:
    # exponents whose products neither overflow nor vanish in bf16, in which it computes
    tensors = {"weight_packed": fill((48, 80), 3), "weight_scale": fill((48, 5), 4, 5, 250)}
    _, got = decode_whole(tensors, CT)
    args = QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    theirs = MXFP4PackedCompressor.decompress(dict(tensors), scheme)["weight"]
    assert_same(got.to(torch.bfloat16), theirs)


def test_gpt_oss_files() -> None:
    tensors, oracle = load_checkpoint("gptoss-mxfp4"), load_oracle("gptoss-mxfp4")
    for key, expected in oracle.items():
        _, layer, _, expert, projection, part = key.split(".")
        if part != "weight":
            continue
        fused = "down_proj" if projection == "down" else "gate_up_proj"
        base = f"model.layers.{layer}.mlp.experts.{fused}"
        parts = {p: tensors[f"{base}_{p}"][int(expert)] for p in ("blocks", "scales")}
        taken, got = decode_whole(parts, GPT_OSS)
        rows = {"gate": got[0::2], "up": got[1::2], "down": got}[projection]
        assert taken == "mxfp4"
        assert_same(rows.to(torch.bfloat16), expected)


def test_deepseek_v4_files() -> None:
    tensors, oracle = load_checkpoint("deepseekv4-mxfp4"), load_oracle("deepseekv4-mxfp4")
    experts = {key: value for key, value in oracle.items() if key.startswith("layers.")}
    assert len(experts) == 24
    for key, expected in experts.items():
        base = source_name(key, "layers.{layer}.ffn.experts.{expert}.{proj}", "w")
        taken, got = decode_whole(parts_of(tensors, base), V4)
        assert taken == "mxfp4"
        assert_same(got.to(torch.bfloat16), expected)
