"""AWQ against hand-computed words, AutoAWQ's packing order and GPTQModel's own output."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moeconv.codecs import CODECS, awq
from moeconv.codecs.base import QuantScheme
from moeconv.errors import BadSource, IncompleteModel, ShapeMismatch
from tests.codecs import int_oracles as oracle

PACK_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # AutoAWQ: nibble i of a word is column PACK_ORDER[i]


def scheme(group_size: int, **values: int | str | bool) -> QuantScheme:
    common = {"bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}
    return QuantScheme("awq", {**common, **values})


def packed(fields: np.ndarray) -> torch.Tensor:
    """Return int32 words [A, N/8] of fields [A, N], in AutoAWQ's order."""
    octets = fields.reshape(len(fields), -1, 8)[:, :, PACK_ORDER]
    return oracle.pack_rows(octets.reshape(fields.shape), 4)


def stored(group_size: int, rows: int = 24, cols: int = 96):
    """Return tensors, and the weight they were made from."""
    draw = np.random.default_rng(rows + cols)
    size = cols if group_size == -1 else group_size
    codes = draw.integers(0, 16, (cols, rows))
    zeros = draw.integers(0, 16, (cols // size, rows))
    scales = torch.from_numpy(draw.random(zeros.shape)).half()
    tensors = {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scales}
    whole = (codes - zeros.repeat(size, 0)).astype(np.float32)
    return tensors, (whole * scales.float().numpy().repeat(size, 0)).T


def test_hand_computed_order() -> None:
    words = torch.from_numpy(np.array([[0x76543210, 0xFEDCBA98]], dtype=np.uint32).view(np.int32))
    expected = [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert awq.awq_fields(words).tolist() == [expected]


def test_every_pair_of_code_and_zero() -> None:
    tensors = {
        "qweight": packed(np.tile(np.arange(16)[:, None], (1, 16))),  # [code, zero point]
        "qzeros": packed(np.arange(16)[None]),
        "scales": torch.full((1, 16), 0.5, dtype=torch.bfloat16),
    }
    params = oracle.parameters("awq", tensors, scheme(16))
    expected = [[(code - zero) / 2 for code in range(16)] for zero in range(16)]
    assert oracle.decode("awq", tensors, params).tolist() == expected


@pytest.mark.parametrize("group_size", [16, 32, -1])
def test_weight_and_windows(group_size: int) -> None:
    tensors, expected = stored(group_size)
    params = oracle.parameters("awq", tensors, scheme(group_size))
    assert np.array_equal(oracle.decode("awq", tensors, params).numpy(), expected)
    oracle.assert_windows("awq", tensors, params)


def test_without_zero_points() -> None:
    tensors, _ = stored(32)
    expected = oracle.decode(
        "awq",
        {**tensors, "qzeros": packed(np.full((3, 24), 8))},
        oracle.parameters("awq", tensors, scheme(32)),
    )
    del tensors["qzeros"]
    params = oracle.parameters("awq", tensors, scheme(32, zero_point=False))
    assert torch.equal(oracle.decode("awq", tensors, params), expected)
    with pytest.raises(IncompleteModel, match="qzeros"):
        oracle.parameters("awq", tensors, scheme(32))


REFUSED = [
    (scheme(32, version="gemv"), BadSource, "gemv"),
    (scheme(32, version="marlin"), BadSource, "marlin"),
    (scheme(32, bits=3), BadSource, "3-bit"),
    (scheme(16), ShapeMismatch, r"m\.scales"),
]


@pytest.mark.parametrize(("config", "error", "match"), REFUSED)
def test_contradictions_are_refused(config: QuantScheme, error, match: str) -> None:
    with pytest.raises(error, match=match):
        oracle.parameters("awq", stored(32)[0], config)


def test_other_methods_are_not_awq() -> None:
    found = oracle.refs(stored(32)[0])
    assert CODECS["awq"].detect(found, QuantScheme("gptq", {})) is None


def test_fixture_qwen3_moe() -> None:
    *_, config = oracle.fixture("qwen3moe-awq-int4-g32")
    values = {name: config[name] for name in ("bits", "group_size", "zero_point", "version")}
    oracle.assert_fixture("awq", "qwen3moe-awq-int4-g32", QuantScheme("awq", values))
