"""Which FP8 weights are whose: kinds of scales by config and shape, and what is refused."""

from __future__ import annotations

import pytest

from moeconv.codecs.base import QuantScheme
from moeconv.errors import BadSource, ShapeMismatch
from tests.codecs.float_oracles import detect_one, refs, takers

BLOCK128 = QuantScheme("fp8", {"block_rows": 128, "block_cols": 128})
PLAIN = QuantScheme("fp8", {})
NONE = QuantScheme("", {})


def ct(strategy: str, **values: int) -> QuantScheme:
    fields = {"format": "float-quantized", "num_bits": 8, "type": "float", "strategy": strategy}
    return QuantScheme("compressed-tensors", {**fields, **values})


E4 = "F8_E4M3"
DETECTED = [
    ("fp8-block", {"weight_scale_inv": ("F32", (2, 2))}, BLOCK128, (144, 200)),
    ("fp8-block", {"scale": ("F8_E8M0", (1, 1))}, BLOCK128, (64, 64)),
    ("fp8-block", {"weight_scale_inv": ("U8", (2, 2))}, BLOCK128, (144, 200)),
    ("fp8-block", {"weight_scale_inv": ("F32", (4, 2, 3))}, BLOCK128, (4, 200, 300)),
    ("fp8-block", {"weight_scale_inv": ("F32", (4, 2, 1))},
     QuantScheme("fp8", {"block_rows": 64, "block_cols": 256}), (4, 300, 60)),
    ("fp8-block", {"weight_scale": ("BF16", (2, 2))},
     ct("block", block_rows=128, block_cols=128), (144, 200)),
    ("fp8-channel", {"weight_scale": ("BF16", (144, 1))}, ct("channel"), (144, 200)),
    ("fp8-channel", {"weight_scale": ("F32", (144,))}, NONE, (144, 200)),
    ("fp8-channel", {"weight_scale": ("F32", (144, 1))}, PLAIN, (144, 200)),
    ("fp8-channel", {"weight_scale": ("F32", (4, 144, 1))}, NONE, (4, 144, 200)),
    ("fp8-channel", {"weight_scale": ("F32", (4, 1, 200))}, NONE, (4, 144, 200)),
    ("fp8-channel", {"qscale_weight": ("F32", (144,))}, QuantScheme("mistral", {}), (144, 200)),
    ("fp8-tensor", {"qscale_weight": ("F32", ())}, QuantScheme("mistral", {}), (144, 200)),
    ("fp8-tensor", {"weight_scale": ("F32", ())},
     QuantScheme("modelopt", {"quant_algo": "FP8"}), (144, 200)),
    ("fp8-tensor", {"weight_scale": ("F32", (1,))}, ct("tensor"), (144, 200)),
    ("fp8-tensor", {"weight_scale_inv": ("F32", (1, 1))}, PLAIN, (144, 200)),
    ("fp8-tensor", {"weight_scale": ("F32", (4,))}, NONE, (4, 144, 200)),
    ("fp8-tensor", {"weight_scale": ("F32", (4, 1, 1))}, NONE, (4, 144, 200)),
]  # fmt: skip


@pytest.mark.parametrize(("codec", "scale", "scheme", "shape"), DETECTED)
@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_detection(codec: str, scale: dict, scheme: QuantScheme, shape: tuple, dtype: str) -> None:
    found = refs(weight=(dtype, shape), **scale)
    taken, params = detect_one(found, scheme)
    assert taken.name == codec
    assert taken.shape(found, params) == shape
    assert params["dtype"] == dtype


@pytest.mark.parametrize(
    "found",
    [
        refs(weight=(E4, (8, 8))),
        refs(weight=(E4, (8,)), weight_scale=("F32", (1,))),
        refs(weight=("BF16", (8, 8)), weight_scale=("F32", ())),
        refs(weight=("F8_E4M3FNUZ", (8, 8)), weight_scale=("F32", ())),
        refs(weight=(E4, (8, 8)), weight_scale=("I32", ())),
        refs(weight=(E4, (8, 8)), weight_scale=("F32", ()), weight_zero_point=("F32", ())),
    ],
)
def test_what_no_codec_takes(found: dict) -> None:
    assert takers(found, NONE) == []


@pytest.mark.parametrize(
    ("scale", "scheme"),
    [
        (("F32", (2, 2)), PLAIN),
        (("F32", (2, 2)), NONE),
        (("F32", (2, 2)), ct("block")),
        (("F8_E8M0", (144, 7)), PLAIN),
        (("F32", (1, 2)), PLAIN),
    ],
)
def test_a_grid_without_a_block_size_is_refused(scale: tuple, scheme: QuantScheme) -> None:
    found = refs(weight=(E4, (144, 200)), weight_scale_inv=scale)
    with pytest.raises(BadSource, match=r"m\.weight_scale_inv.*no block size") as caught:
        takers(found, scheme)
    assert "weight_block_size" in caught.value.hint


@pytest.mark.parametrize(
    ("scale", "scheme", "expected"),
    [
        ((144, 1), BLOCK128, r"\[2, 2\]"),
        ((2, 2), ct("channel"), r"\[144, 1\] or \[144\]"),
        ((144, 1), ct("tensor"), r"\[\] or \[1\]"),
        ((), ct("channel"), r"\[144, 1\]"),
        ((), BLOCK128, r"\[2, 2\]"),
        ((2, 3), BLOCK128, r"\[2, 2\]"),
    ],
)
def test_scales_that_contradict_the_config(
    scale: tuple, scheme: QuantScheme, expected: str
) -> None:
    found = refs(weight=(E4, (144, 200)), weight_scale=("F32", scale))
    with pytest.raises(ShapeMismatch, match=r"m\.weight_scale.*expected " + expected):
        takers(found, scheme)
