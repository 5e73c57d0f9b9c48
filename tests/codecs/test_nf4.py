"""NF4 against hand-computed values and bitsandbytes itself."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from moeconv.codecs.base import QuantScheme
from moeconv.codecs.nf4 import STATE
from moeconv.errors import BadSource, ShapeMismatch
from tests.codecs.float_oracles import (
    FIXTURES,
    Tensors,
    assert_same,
    assert_windows_are_crops,
    decode_whole,
    detect_one,
    parts_of,
    refs_of,
    takers,
)

CASES = ("plain", "nested", "ragged", "large")


def scheme_of(tensors: Tensors) -> QuantScheme:
    """Return the scheme as whoever reads the quant_state makes it."""
    return QuantScheme("bitsandbytes", {"quant_state": bytes(tensors[STATE].tolist()).decode()})


def load(case: str) -> tuple[Tensors, torch.Tensor]:
    tensors = load_file(FIXTURES / "bitsandbytes" / "nf4.safetensors")
    return parts_of(tensors, case, ("dequantized", "source")), tensors[f"{case}.dequantized"]


def small(**changes: object) -> dict[str, torch.Tensor]:
    """Return a [2, 3] weight in blocks of 4: codes 0..5, the table 0, 10, 20, ..."""
    state = {"quant_type": "nf4", "blocksize": 4, "dtype": "bfloat16", "shape": [2, 3], **changes}
    return {
        "weight": torch.tensor([[0x01], [0x23], [0x45]], dtype=torch.uint8),
        "weight.absmax": torch.tensor([2.0, 0.5]),
        "weight.quant_map": torch.arange(16.0) * 10,
        STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def test_a_hand_computed_matrix() -> None:
    tensors = small()
    taken, got = decode_whole(tensors, scheme_of(tensors))
    assert taken == "nf4"
    # the block of four ends in the middle of the second row
    assert_same(got, torch.tensor([[0.0, 20.0, 40.0], [60.0, 20.0, 25.0]]))


def test_hand_computed_nested_scales() -> None:
    tensors = small(nested_blocksize=1, nested_dtype="float32", nested_offset=0.25)
    tensors["weight.absmax"] = torch.tensor([3, 200], dtype=torch.uint8)
    tensors["weight.nested_absmax"] = torch.tensor([2.0, 0.5])
    tensors["weight.nested_quant_map"] = torch.arange(256.0) / 4
    _, got = decode_whole(tensors, scheme_of(tensors))
    first, second = 0.75 * 2 + 0.25, 50 * 0.5 + 0.25
    expected = [[0.0, 10 * first, 20 * first], [30 * first, 40 * second, 50 * second]]
    assert_same(got, torch.tensor(expected))


@pytest.mark.parametrize("case", CASES)
def test_bitsandbytes_dequantizes_the_same(case: str) -> None:
    tensors, expected = load(case)
    taken, got = decode_whole(tensors, scheme_of(tensors))
    assert taken == "nf4"
    assert_same(got, expected)


@pytest.mark.parametrize("case", ["plain", "ragged", "large"])  # nested scales are rounded too
def test_values_are_those_that_were_quantized(case: str) -> None:
    tensors, _ = load(case)
    _, got = decode_whole(tensors, scheme_of(tensors))
    source = load_file(FIXTURES / "bitsandbytes" / "nf4.safetensors")[f"{case}.source"]
    table = tensors["weight.quant_map"]
    half_step = (table[1:] - table[:-1]).max() / 2
    blocksize = json.loads(bytes(tensors[STATE].tolist()))["blocksize"]
    error, peak = (
        torch.stack([run.abs().max() for run in matrix.flatten().split(blocksize)])
        for matrix in (got - source, source)
    )
    assert (error <= peak * half_step + 1e-6).all()


@pytest.mark.parametrize("case", CASES)
def test_a_window_is_a_crop_of_the_whole(case: str) -> None:
    tensors, _ = load(case)
    assert_windows_are_crops(tensors, scheme_of(tensors))


@pytest.mark.parametrize(
    "state",
    [
        None,
        "{",
        "[]",
        '{"shape": [2, 3]}',
        '{"shape": [6], "blocksize": 4}',
        '{"shape": [2, 3], "blocksize": 0}',
        '{"shape": [2, 3], "blocksize": 4, "nested_blocksize": 256}',
    ],
)
def test_a_state_that_says_nothing_is_refused(state: str | None) -> None:
    found = refs_of(small())
    values = {} if state is None else {"quant_state": state}
    with pytest.raises(BadSource, match=r"m\.weight\.quant_state"):
        takers(found, QuantScheme("bitsandbytes", values))


def test_another_number_of_codes_is_refused() -> None:
    tensors = small(shape=[2, 4])
    with pytest.raises(ShapeMismatch, match=r"'m\.weight' has shape \[3, 1\], expected \[4, 1\]"):
        takers(refs_of(tensors), scheme_of(tensors))


def test_other_parts_are_not_nf4() -> None:
    tensors = small()
    scheme = scheme_of(tensors)
    found = refs_of(tensors)
    assert detect_one(found, scheme)[0].name == "nf4"
    for part in ("weight.absmax", "weight.quant_map", STATE):
        assert "nf4" not in takers({p: r for p, r in found.items() if p != part}, scheme)
    other = {**found, "weight": found["weight"]._replace(dtype="BF16")}
    assert "nf4" not in takers(other, scheme)
