"""The kernels of GPTQ and AWQ, whose words are stored [cols, rows], against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from moeconv.codecs import CODECS
from moeconv.codecs import bits as b
from moeconv.codecs.base import Window
from moeconv.errors import BadSource
from moeconv.kernels.cpu import KERNELS, int_windows
from tests.kernels.int_parts import with_params
from tests.kernels.int_weights import Made, awq, gptq, ordered
from tests.kernels.oracle import as_numpy, check

TILE = int_windows.TURNED_ROWS


def both(made: Made, codec: str = "gptq") -> list[str]:
    """Return what the kernel and the reference raise."""
    parts, params = made
    cols, rows = parts["qweight"].shape[0] * 8, parts["qweight"].shape[1]
    window = Window(0, rows, 0, cols)
    raised = []
    with pytest.raises(BadSource) as error:
        CODECS[codec].decode(parts, window, params)
    raised.append(str(error.value))
    with pytest.raises(BadSource) as error:
        out = np.empty((rows, cols), np.uint16)
        found = {part: as_numpy(tensor) for part, tensor in parts.items()}
        KERNELS[codec](found, window, params, "BF16", out)
    return [*raised, str(error.value)]


@pytest.mark.parametrize("zeros", ["packed", "empty", "absent"])
@pytest.mark.parametrize(
    ("size", "bits", "group_size"),
    [
        ((TILE + 40, 96), 4, 32),  # more rows than are turned at a time
        ((8, 2048 + 64), 4, 64),  # more columns than are decoded at a time
        ((72, 130 * 4), 8, 128),
        ((TILE + 4, 36), 8, 5),
        ((TILE + 32, 96), 3, 32),  # fields across words
    ],
)
def test_gptq_beyond_a_tile(size: tuple[int, int], bits: int, group_size: int, zeros: str) -> None:
    made = gptq(size, bits, group_size, zeros)
    check("gptq", *made)
    check("gptq", *ordered(made), dtypes=("BF16",))


@pytest.mark.parametrize("zeros", ["packed", "absent"])
@pytest.mark.parametrize("scale", ["F16", "BF16", "F32"])
@pytest.mark.parametrize(("size", "group_size"), [((TILE + 24, 70), 32), ((8, 2048 + 30), 16)])
def test_awq_beyond_a_tile(size: tuple[int, int], group_size: int, scale: str, zeros: str) -> None:
    check("awq", *awq(size, group_size, zeros, scale), dtypes=("BF16", "F32"))


@pytest.mark.parametrize("group_size", [32, -1])
def test_gptq_g_idx_in_order(group_size: int) -> None:
    """Where desc_act is false, g_idx is only looked at: its groups count from the row's start."""
    parts, params = gptq((16, 192), 4, group_size)
    columns = torch.arange(192, dtype=torch.int32)
    parts["g_idx"] = columns // 32 if group_size > 0 else torch.zeros_like(columns)
    check("gptq", parts, with_params(params, g_idx=True), window=Window(0, 16, 64, 128))


def test_gptq_g_idx_out_of_order() -> None:
    parts, params = gptq((16, 64), 4, 32)
    parts["g_idx"] = (torch.arange(64, dtype=torch.int32) // 32).flip(0)
    mine, reference = both((parts, with_params(params, g_idx=True)))
    assert mine == reference
    assert "not in order" in mine


def test_gptq_group_outside() -> None:
    parts, params = ordered(gptq((16, 64), 4, 32))
    parts["g_idx"][3] = -1
    mine, reference = both((parts, params))
    assert mine == reference
    assert "group index -1..1" in mine


@pytest.mark.parametrize(("bits", "offset"), [(4, 1), (4, 0), (8, 1), (3, 1)])
def test_gptq_symmetric_zeros(bits: int, offset: int) -> None:
    """The field that no row has may hold anything."""
    rows = 2 * b.dense_run(bits).elements - 1
    parts, params = gptq((rows, 96), bits, 32)
    stored = (1 << (bits - 1)) - offset
    line = sum(stored << bits * row for row in range(rows))  # and zeros behind
    count = parts["qzeros"].shape[1]
    found = np.array([line >> 32 * word & 0xFFFFFFFF for word in range(count)], np.uint32)
    parts["qzeros"] = torch.from_numpy(found.view(np.int32)).repeat(3, 1)
    check("gptq", parts, with_params(params, sym=True, zero_offset=offset), dtypes=("BF16",))


def test_gptq_asymmetric_zeros_of_a_symmetric_weight() -> None:
    parts, params = gptq((16, 64), 4, 32)
    parts["qzeros"] = torch.full((2, 2), 0x77777777, dtype=torch.int32)
    parts["qzeros"][1, 1] = 0x77777977
    mine, reference = both((parts, with_params(params, sym=True)))
    assert mine == reference
    assert "zero points [8, 10], not 8 alone" in mine


def test_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked of a compiled function: the last of no places would lie before them."""

    def never(*_: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(int_windows.int_runs, "decode_turned", never)
    for made, codec in ((gptq((0, 64), 4, 32), "gptq"), (awq((0, 64), 32), "awq")):
        parts, params = made
        given = {part: as_numpy(tensor) for part, tensor in parts.items() if part != "scales"}
        given["scales"] = np.empty((2, 0), np.float32)
        out = np.empty((0, 64), np.uint16)
        assert KERNELS[codec](given, Window(0, 0, 0, 64), params, "BF16", out) == (0, 0, 0)
