"""GPTQ against hand-computed words, its published formula and GPTQModel's own output."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moeconv.codecs import CODECS, gptq
from moeconv.codecs.base import QuantScheme
from moeconv.errors import BadSource, IncompleteModel, ShapeMismatch
from tests.codecs import int_oracles as oracle


def scheme(bits: int, group_size: int, **values: int | str | bool) -> QuantScheme:
    common = {"bits": bits, "group_size": group_size, "desc_act": False, "sym": False}
    return QuantScheme("gptq", {**common, "checkpoint_format": "gptq", **values})


def stored(bits: int, group_size: int, *, rows: int = 32, cols: int = 96, act_order: bool = False):
    """Return random asymmetric tensors; g_idx is a shuffle of full groups for act_order."""
    draw = np.random.default_rng(bits * 1000 + rows)
    size = cols if group_size == -1 else group_size
    groups = -(-cols // size)
    g_idx = np.arange(cols) // size
    if act_order:
        draw.shuffle(g_idx)
    codes = draw.integers(0, 1 << bits, (rows, cols))
    zeros = draw.integers(0, (1 << bits) - 1, (groups, rows))
    return {
        "qweight": oracle.pack_rows(codes, bits).T.contiguous(),
        "qzeros": oracle.pack_rows(zeros, bits),
        "scales": torch.from_numpy(draw.random((groups, rows)) + 0.01).half(),
        "g_idx": torch.from_numpy(g_idx.astype(np.int32)),
    }


@pytest.mark.parametrize("bits", gptq.BITS)
@pytest.mark.parametrize("group_size", [32, 40, -1])  # 40: the last group is cut off
@pytest.mark.parametrize(("label", "offset"), [("gptq", 1), ("gptq_v2", 0)])
@pytest.mark.parametrize("act_order", [False, True])
def test_equals_the_published_formula(
    bits: int, group_size: int, label: str, offset: int, act_order: bool
) -> None:
    act_order = act_order and group_size > 0
    tensors = stored(bits, group_size, act_order=act_order)
    config = scheme(bits, group_size, checkpoint_format=label, desc_act=act_order)
    params = oracle.parameters("gptq", tensors, config)
    weight = oracle.decode("gptq", tensors, params)
    expected = oracle.gptq_weight(tensors, bits, offset)
    assert np.array_equal(weight.numpy(), expected)
    oracle.assert_windows("gptq", tensors, params, bits)


def test_three_bits_cross_words_as_auto_gptq_packs_them() -> None:
    """Codes 10 and 21 of a run lie in two words: 2 + 1 and 1 + 2 bits."""
    words = [1 << 30, 1 | 1 << 31, 0b11]  # code 10 = 0b101, code 21 = 0b111
    tensors = {
        "qweight": torch.from_numpy(np.array(words, dtype=np.uint32).view(np.int32))[:, None],
        "scales": torch.ones((1, 1)),
    }
    params = oracle.parameters("gptq", tensors, scheme(3, -1, sym=True))
    codes = oracle.decode("gptq", tensors, params)[0] + 4
    assert {k: v for k, v in enumerate(codes.tolist()) if v} == {10: 5.0, 21: 7.0}


@pytest.mark.parametrize(("label", "offset"), [("gptq", 1), ("gptq_v2", 0)])
def test_every_pair_of_int4_code_and_zero(label: str, offset: int) -> None:
    codes = np.tile(np.arange(16), (16, 1))  # row = stored zero point, column = code
    tensors = {
        "qweight": oracle.pack_rows(codes, 4).T.contiguous(),
        "qzeros": oracle.pack_rows(np.arange(16)[None], 4),
        "scales": torch.full((1, 16), 0.25, dtype=torch.bfloat16),
    }
    params = oracle.parameters("gptq", tensors, scheme(4, -1, checkpoint_format=label))
    expected = [[(code - zero - offset) / 4 for code in range(16)] for zero in range(16)]
    assert oracle.decode("gptq", tensors, params).tolist() == expected
    assert gptq.saturated_zeros(tensors["qzeros"].numpy(), params) == 1


@pytest.mark.parametrize("zeros", ["absent", "empty"])
@pytest.mark.parametrize("bits", gptq.BITS)
def test_symmetric_without_zero_points(zeros: str, bits: int) -> None:
    tensors = stored(bits, 32)
    full = {**tensors, "qzeros": oracle.pack_rows(np.full((3, 32), (1 << bits - 1) - 1), bits)}
    tensors["qzeros"] = torch.empty((3, 0), dtype=torch.int32)
    if zeros == "absent":
        del tensors["qzeros"]
    config = scheme(bits, 32, sym=True)
    params = oracle.parameters("gptq", tensors, config)
    same = oracle.decode("gptq", full, oracle.parameters("gptq", full, config))
    assert torch.equal(oracle.decode("gptq", tensors, params), same)
    oracle.assert_windows("gptq", tensors, params)
    with pytest.raises(IncompleteModel, match="zero points"):
        oracle.parameters("gptq", tensors, scheme(bits, 32, sym=False))


CONVENTIONS = [  # bits, label, sym, stored zero points, convention
    (4, "gptq", True, [7, 7], "v1"),
    (4, "gptq", True, [8, 8], "v2"),  # mislabelled
    (4, "gptq_v2", True, [8, 8], "v2"),
    (4, "gptq_v2", True, [7, 7], "v1"),  # mislabelled the other way round
    (8, "gptq", True, [128, 128], "v2"),
    (3, "gptq", True, [3, 3], "v1"),
    (2, "gptq", True, [2, 2], "v2"),
    (4, "gptq", False, [8, 8], "v1"),  # asymmetric: the label is all there is
    (4, "gptq_v2", False, [7, 3], "v2"),
]


@pytest.mark.parametrize(("bits", "label", "sym", "zeros", "convention"), CONVENTIONS)
def test_zero_convention(bits: int, label: str, sym: bool, zeros: list[int], convention: str):
    words = oracle.pack_rows(np.array([zeros]), bits)
    params = {"bits": bits, "rows": 2, "sym": sym, "zero_offset": gptq.ZERO_OFFSETS[label]}
    assert gptq.zero_convention(words.numpy(), params) == convention


@pytest.mark.parametrize("zeros", [[7, 8], [0, 0], [7, 9], [15, 15]])
def test_symmetric_with_other_zero_points_is_refused(zeros: list[int]) -> None:
    tensors = {**stored(4, -1, rows=8), "qzeros": oracle.pack_rows(np.array([zeros * 4]), 4)}
    with pytest.raises(BadSource, match=r"m\.qzeros.*sym is true"):
        oracle.parameters("gptq", tensors, scheme(4, -1, sym=True))


def test_mislabelled_v2_decodes_around_the_middle() -> None:
    tensors = {**stored(4, 32), "qzeros": oracle.pack_rows(np.full((3, 32), 8), 4)}
    params = oracle.parameters("gptq", tensors, scheme(4, 32, sym=True))
    expected = oracle.gptq_weight(tensors, 4, 0)
    assert np.array_equal(oracle.decode("gptq", tensors, params).numpy(), expected)


def test_saturated_zeros_ignore_the_padding() -> None:
    params = {"bits": 4, "rows": 3, "sym": False, "zero_offset": 1}
    words = np.array([[0xFFFF_F0F1]], dtype=np.uint32).view(np.int32)
    assert gptq.saturated_zeros(words, params) == 1


def test_g_idx_out_of_order_without_desc_act_is_refused() -> None:
    tensors = stored(4, 32, act_order=True)
    params = oracle.parameters("gptq", tensors, scheme(4, 32, desc_act=False))
    with pytest.raises(BadSource, match="g_idx"):
        oracle.decode("gptq", tensors, params)


@pytest.mark.parametrize("group", [-1, 3])
def test_group_index_out_of_range_is_refused(group: int) -> None:
    tensors = stored(4, 32, act_order=True)
    tensors["g_idx"][5] = group
    params = oracle.parameters("gptq", tensors, scheme(4, 32, desc_act=True))
    with pytest.raises(BadSource, match="group index"):
        oracle.decode("gptq", tensors, params)


def test_a_zero_point_unlike_the_sampled_ones_is_refused_while_decoding() -> None:
    """Planning looks at a few tensors only: any other may be of the other version, or damaged."""
    tensors = stored(4, 32)
    tensors["qzeros"][:] = 0x77777777
    params = oracle.parameters("gptq", tensors, scheme(4, 32, sym=True))
    oracle.decode("gptq", tensors, params)
    tensors["qzeros"][-1, -1] = 0x77777778
    with pytest.raises(BadSource, match=r"zero points \[8, 9\], not 8 alone"):
        oracle.decode("gptq", tensors, params)


def without(part: str) -> dict[str, torch.Tensor]:
    return {k: v for k, v in stored(4, 32).items() if k != part}


REFUSED = [
    (stored(4, 32), scheme(5, 32), BadSource, "5-bit"),
    (stored(4, 32), scheme(4, 32, checkpoint_format="marlin"), BadSource, "marlin"),
    (stored(4, 32), scheme(4, 32, pack_dtype="int16"), BadSource, "int16"),
    (stored(4, 32), QuantScheme("gptq", {"group_size": 32}), BadSource, "bits"),
    (stored(4, 32), scheme(4, 0), BadSource, "group_size 0"),
    (stored(4, 32), scheme(4, 16), ShapeMismatch, r"m\.scales"),
    (stored(4, 32), scheme(8, 32), ShapeMismatch, r"m\.qweight"),
    (without("g_idx"), scheme(4, 32, desc_act=True), IncompleteModel, "g_idx"),
    (without("g_idx"), scheme(4, 16), ShapeMismatch, r"m\.scales"),
    ({**without("g_idx"), "qweight": torch.zeros(4, 32).int()}, scheme(3, 32), ShapeMismatch, "3"),
    ({**stored(4, 32), "scales": torch.ones(3, 31)}, scheme(4, 32), ShapeMismatch, "scales"),
    (stored(4, 32), QuantScheme("", {}), BadSource, "GPTQ and AWQ"),
]


@pytest.mark.parametrize(("tensors", "config", "error", "match"), REFUSED)
def test_contradictions_are_refused(tensors, config, error, match: str) -> None:
    with pytest.raises(error, match=match):
        oracle.parameters("gptq", tensors, config)


def test_other_methods_and_parts_are_not_gptq() -> None:
    codec = CODECS["gptq"]
    found = oracle.refs(stored(4, 32))
    assert codec.detect(found, QuantScheme("awq", {"bits": 4, "group_size": 32})) is None
    assert codec.detect({"weight": found["scales"]}, scheme(4, 32)) is None


def test_rows_that_do_not_fill_the_last_word_of_zero_points() -> None:
    tensors = stored(3, 32, rows=13)
    params = oracle.parameters("gptq", tensors, scheme(3, 32))
    expected = oracle.gptq_weight(tensors, 3, 1)
    assert np.array_equal(oracle.decode("gptq", tensors, params).numpy(), expected)
    oracle.assert_windows("gptq", tensors, params)


def test_fixture_qwen3_moe() -> None:
    *_, config = oracle.fixture("qwen3moe-gptq-int4-g128")
    names = ("bits", "group_size", "desc_act", "sym", "checkpoint_format")
    values = {name: config[name] for name in names}
    oracle.assert_fixture("gptq", "qwen3moe-gptq-int4-g128", QuantScheme("gptq", values))
