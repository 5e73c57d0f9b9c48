"""What of a payload is refused before it is decoded: the same by the checks, kernels, reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moeconv.codecs import CODECS, PAYLOAD_CHECKS
from moeconv.codecs.base import Window
from moeconv.errors import BadSource, MoeconvError, ShapeMismatch
from moeconv.kernels.cpu import KERNELS
from moeconv.types import Params

WINDOW = Window(0, 8, 32, 64)  # the second half of 64 columns in groups of 16
IN_ORDER = torch.tensor([[2] * 16 + [3] * 16], dtype=torch.int32)
BASE: Params = {
    "bits": 4,
    "strategy": "group",
    "group_size": 16,
    "groups": 4,
    "act_order": False,
    "rows": 8,
    "cols": 64,
    "packing": "dense",
    "g_idx": False,
    "sym": False,
    "zero_offset": 1,
}


def gptq(zero: int = 0x77777777, order: torch.Tensor | None = None, groups: int = 2) -> dict:
    parts = {
        "qweight": torch.zeros((4, 8), dtype=torch.int32),
        "scales": torch.ones((groups, 8)),
        "qzeros": torch.full((groups, 1), zero, dtype=torch.int32),
    }
    return parts if order is None else {**parts, "g_idx": order}


def packed(numbers: tuple[int, int] = (8, 64), order: torch.Tensor | None = None) -> dict:
    parts = {
        "weight_packed": torch.zeros((8, 4), dtype=torch.int32),
        "weight_scale": torch.ones((8, 2 if order is None else 4)),
        "weight_shape": torch.tensor([numbers]),
    }
    return parts if order is None else {**parts, "weight_g_idx": order}


def plain(order: torch.Tensor) -> dict:
    return {
        "weight": torch.zeros((8, 32), dtype=torch.int8),
        "weight_scale": torch.ones((8, 4)),
        "weight_g_idx": order.long(),
    }


def turned(group: int) -> torch.Tensor:
    """Return groups in some order, one of them `group`."""
    found = IN_ORDER.flip(1)
    found[0, 7] = group
    return found


GPTQ, PACKED, PLAIN = ({"zeros": zeros} for zeros in ("packed", "absent", False))
ORDERED: Params = {"act_order": True, "g_idx": True}
ACCEPTED = [
    ("gptq", gptq(), {**GPTQ, "sym": True}),
    ("gptq", gptq(zero=0x12345678), GPTQ),
    ("gptq", gptq(order=IN_ORDER), {**GPTQ, "g_idx": True}),
    ("gptq", gptq(order=turned(0), groups=4), {**GPTQ, **ORDERED}),
    ("packed-int", packed(), PACKED),
    ("packed-int", packed(order=turned(0)), {**PACKED, **ORDERED}),
    ("int-quantized", plain(turned(0)), {**PLAIN, **ORDERED}),
]
REFUSED = [
    ("gptq", gptq(zero=0x77777877), {**GPTQ, "sym": True}, BadSource, r"points \[8, 9\]"),
    ("gptq", gptq(order=IN_ORDER - 2), {**GPTQ, "g_idx": True}, BadSource, "not in order"),
    ("gptq", gptq(order=turned(-1), groups=4), {**GPTQ, **ORDERED}, BadSource, r"-1\.\.3"),
    ("gptq", gptq(order=turned(4), groups=4), {**GPTQ, **ORDERED}, BadSource, r"2\.\.4"),
    ("packed-int", packed((8, 63)), PACKED, ShapeMismatch, r"says \[8, 63\]"),
    ("packed-int", packed(order=turned(4)), {**PACKED, **ORDERED}, BadSource, r"2\.\.4"),
    ("int-quantized", plain(turned(-1)), {**PLAIN, **ORDERED}, BadSource, r"-1\.\.3"),
]


def ways(codec: str, parts: dict[str, torch.Tensor], params: Params):
    """Return the three functions that decode or check."""
    arrays = {part: tensor.numpy() for part, tensor in parts.items()}
    full = {**BASE, **params}
    return (
        lambda: PAYLOAD_CHECKS[codec](arrays, WINDOW, full),
        lambda: KERNELS[codec](arrays, WINDOW, full, "BF16", np.empty((8, 32), np.uint16)),
        lambda: CODECS[codec].decode(parts, WINDOW, full),
    )


@pytest.mark.parametrize(("codec", "parts", "params"), ACCEPTED)
def test_what_is_right_is_accepted(codec: str, parts: dict, params: Params) -> None:
    for way in ways(codec, parts, params):
        way()


@pytest.mark.parametrize(("codec", "parts", "params", "error", "match"), REFUSED)
def test_what_is_wrong_is_refused_in_the_same_words(
    codec: str, parts: dict, params: Params, error: type[MoeconvError], match: str
) -> None:
    said = set()
    for way in ways(codec, parts, params):
        with pytest.raises(error, match=match) as found:
            way()
        said.add(str(found.value))
    assert len(said) == 1
