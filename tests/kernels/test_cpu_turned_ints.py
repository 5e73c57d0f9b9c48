"""The kernels of GPTQ and AWQ, whose words are stored [cols, rows], against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeconv.codecs import CODECS
from moeconv.codecs import bits as b
from moeconv.codecs.base import Window
from moeconv.errors import BadSource, ShapeMismatch
from moeconv.kernels.cpu import KERNELS, int_windows
from moeconv.types import Params
from tests.kernels.int_parts import order, scales, with_params, words
from tests.kernels.oracle import as_numpy, check

Made = tuple[dict[str, torch.Tensor], Params]
TILE = int_windows.TURNED_ROWS


def gptq(
    size: tuple[int, int], bits: int, group_size: int, zeros: str = "packed", scale: str = "F32"
) -> Made:
    rows, cols = size
    run, groups = b.dense_run(bits), b.group_count(cols, group_size)
    params: Params = {
        "bits": bits,
        "group_size": group_size,
        "groups": groups,
        "rows": rows,
        "sym": zeros != "packed",
        "act_order": False,
        "g_idx": False,
        "zeros": zeros,
        "zero_offset": 1,
    }
    parts = {
        "qweight": words(b.words_for(cols, run), rows),
        "scales": scales(groups, rows, dtype=scale),
    }
    if zeros == "packed":
        parts["qzeros"] = words(groups, b.words_for(rows, run), seed=7)
    if zeros == "empty":
        parts["qzeros"] = torch.empty((groups, 0), dtype=torch.int32)
    return parts, params


def ordered(made: Made) -> Made:
    """Return the weight with a random g_idx beside it."""
    parts, params = made
    cols = parts["qweight"].shape[0] * 32 // int(params["bits"])
    found = order(cols, int(params["groups"]))
    return {**parts, "g_idx": found}, with_params(params, act_order=True, g_idx=True)


def awq(size: tuple[int, int], group_size: int, zeros: str = "packed", scale: str = "F16") -> Made:
    rows, cols = size
    groups = b.group_count(cols, group_size)
    parts = {"qweight": words(cols, rows // 8), "scales": scales(groups, rows, dtype=scale)}
    if zeros == "packed":
        parts["qzeros"] = words(groups, rows // 8, seed=8)
    return parts, {"group_size": group_size, "zeros": zeros}


def every_pair(bits: int) -> Made:
    """Return a weight whose row z has zero point z, and every code in its columns."""
    count = 1 << bits
    per_word = 32 // bits
    shifts = np.arange(per_word, dtype=np.uint64) * np.uint64(bits)
    codes = np.arange(count, dtype=np.uint64).reshape(-1, per_word)
    line = torch.from_numpy((codes << shifts).sum(axis=1).astype(np.uint32).view(np.int32))
    parts, params = gptq((count, count), bits, count)
    parts["qweight"], parts["qzeros"] = line[:, None].repeat(1, count), line[None].clone()
    return parts, params


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
        ((64, 256), 4, 128),
        ((TILE + 40, 96), 4, 32),  # more rows than are turned at a time
        ((8, 2048 + 64), 4, 64),  # more columns than are decoded at a time
        ((8, 8), 4, -1),
        ((1, 40), 4, 16),
        ((72, 130 * 4), 8, 128),
        ((TILE + 4, 36), 8, 5),
        ((TILE + 32, 96), 3, 32),  # fields across words
        ((48, 64), 2, 16),
    ],
)
def test_gptq_shapes(size: tuple[int, int], bits: int, group_size: int, zeros: str) -> None:
    made = gptq(size, bits, group_size, zeros)
    check("gptq", *made)
    if group_size > 0:
        check("gptq", *ordered(made), dtypes=("BF16",))


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(1, 5), st.integers(1, 9)),
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([-1, 8, 24, 32]),
    offset=st.integers(0, 1),
    scale=st.sampled_from(["F32", "BF16", "F16"]),
)
def test_any_gptq(
    size: tuple[int, int], bits: int, group_size: int, offset: int, scale: str
) -> None:
    rows, cols = (extent * b.dense_run(bits).elements for extent in size)
    parts, params = gptq((rows, cols), bits, group_size, "packed", scale)
    check("gptq", parts, with_params(params, zero_offset=offset), dtypes=("BF16", "F32"))


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_every_code_with_every_zero(bits: int, offset: int) -> None:
    """Zero points up to 2^bits among them."""
    parts, params = every_pair(bits)
    check("gptq", parts, with_params(params, zero_offset=offset))


def test_gptq_window_in_the_middle() -> None:
    made = gptq((96, 320), 4, 32)
    check("gptq", *made, window=Window(32, 88, 64, 256))
    check("gptq", *ordered(made), window=Window(32, 88, 64, 256))


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


@pytest.mark.parametrize("zeros", ["packed", "absent"])
@pytest.mark.parametrize("scale", ["F16", "BF16", "F32"])
@pytest.mark.parametrize(
    ("size", "group_size"),
    [((64, 256), 128), ((TILE + 24, 70), 32), ((8, 2048 + 30), 16), ((8, 1), -1), ((24, 50), 7)],
)
def test_awq_shapes(size: tuple[int, int], group_size: int, scale: str, zeros: str) -> None:
    check("awq", *awq(size, group_size, zeros, scale), dtypes=("BF16", "F32"))


def test_awq_every_code_with_every_zero() -> None:
    """Each word's eight fields take every code over the columns, and every zero over the rows."""
    parts, params = awq((128, 16), 16)
    fields = (torch.arange(16)[:, None] * 0x11111111).to(torch.int64)
    signed = torch.where(fields >= 1 << 31, fields - (1 << 32), fields).to(torch.int32)
    parts["qweight"] = signed.repeat(1, 16)
    parts["qzeros"] = signed.T.contiguous()
    check("awq", parts, params)


def test_awq_window_in_the_middle() -> None:
    check("awq", *awq((96, 320), 32), window=Window(16, 88, 64, 256))


@pytest.mark.parametrize(
    ("part", "shape"),
    [("qweight", (7, 16)), ("scales", (1, 16)), ("scales", (2, 15)), ("qzeros", (2, 1))],
)
def test_wrong_shapes_are_refused(part: str, shape: tuple[int, int]) -> None:
    parts, params = gptq((16, 64), 4, 32)
    found = {name: as_numpy(tensor) for name, tensor in parts.items()}
    found[part] = np.zeros(shape, found[part].dtype)
    out = np.empty((16, 64), np.uint16)
    with pytest.raises(ShapeMismatch, match="not"):
        KERNELS["gptq"](found, Window(0, 16, 0, 64), params, "BF16", out)


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
