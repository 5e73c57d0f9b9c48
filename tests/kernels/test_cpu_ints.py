"""The kernels of compressed-tensors integers, packed and plain, against the readable reference."""

from __future__ import annotations

import platform

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeconv.codecs import bits as b
from moeconv.codecs.base import Window
from moeconv.codecs.packed_int import run_of
from moeconv.errors import BadSource, ShapeMismatch
from moeconv.kernels.cpu import KERNELS, Counts, ints
from moeconv.types import Params
from tests.kernels.assembly import assembly_of, assert_one_run, nb
from tests.kernels.int_parts import draw, order, scales, words
from tests.kernels.oracle import check

Made = tuple[dict[str, torch.Tensor], Params]


def packed(
    size: tuple[int, int], bits: int, group_size: int, zeros: str = "absent", **other: str
) -> Made:
    """Return the parts and parameters of a packed-int weight; group_size 0: one number for all."""
    rows, cols = size
    params: Params = {
        "bits": bits,
        "strategy": "group" if group_size > 0 else "channel" if group_size else "tensor",
        "group_size": group_size or b.ONE_GROUP,
        "groups": b.group_count(cols, group_size or b.ONE_GROUP),
        "act_order": other.get("order") == "given",
        "zeros": zeros,
        "shape_len": 0,
        "rows": rows,
        "cols": cols,
        "packing": other.get("packing", "dense"),
    }
    run, groups = run_of(params), int(params["groups"])
    scale_rows = rows if group_size else 1
    parts = {
        "weight_packed": words(rows, b.words_for(cols, run)),
        "weight_scale": scales(scale_rows, groups, dtype=other.get("scale", "F32")),
    }
    if zeros == "plain":
        found = draw(5).integers(-128, 128, (scale_rows, groups)).astype(np.int8)
        parts["weight_zero_point"] = torch.from_numpy(found)
    if zeros == "packed":
        parts["weight_zero_point"] = words(b.words_for(rows, run), groups, seed=6)
    if params["act_order"]:
        parts["weight_g_idx"] = order(cols, groups)
    return parts, params


def plain(
    size: tuple[int, int], group_size: int, zeros: torch.dtype | None, given_order: bool
) -> Made:
    """Return the parts and parameters of an int-quantized weight; group_size 0: one for all."""
    rows, cols = size
    groups = b.group_count(cols, group_size or b.ONE_GROUP)
    scale_rows = rows if group_size else 1
    parts = {
        "weight": torch.from_numpy(draw(1).integers(-128, 128, size).astype(np.int8)),
        "weight_scale": scales(scale_rows, groups, dtype="BF16"),
    }
    if zeros is not None:
        bounds = torch.iinfo(zeros)  # any int32: beyond what float32 tells apart
        found = draw(2).integers(bounds.min, bounds.max + 1, (scale_rows, groups))
        found.flat[::2] //= 1 << 30 if zeros == torch.int32 else 1  # and near ones
        found.flat[-1], found.flat[0] = bounds.max, bounds.min
        parts["weight_zero_point"] = torch.from_numpy(found).to(zeros)
    if given_order:
        parts["weight_g_idx"] = order(cols, groups).long()
    params: Params = {
        "strategy": "group" if group_size > 0 else "channel" if group_size else "tensor",
        "group_size": group_size or b.ONE_GROUP,
        "groups": groups,
        "act_order": given_order,
        "zeros": zeros is not None,
    }
    return parts, params


def every_pair(bits: int) -> Made:
    """Return a weight whose row z has zero point z, and every code in its columns."""
    count = 1 << bits
    run = b.dense_run(bits)
    codes = np.arange(count, dtype=np.uint64)
    shifts = (np.arange(run.elements, dtype=np.uint64) * np.uint64(bits))[None]
    line = (codes.reshape(-1, run.elements) << shifts).sum(axis=1).astype(np.uint32)
    parts, params = packed((count, count), bits, count, "packed")
    along = torch.from_numpy(line.view(np.int32))
    parts["weight_packed"] = along.repeat(count, 1)
    parts["weight_zero_point"] = along[:, None].contiguous()
    parts["weight_scale"] = scales(count, 1, wild=0.0)
    return parts, params


@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_with_every_zero(bits: int) -> None:
    check("packed-int", *every_pair(bits))


def test_hand_computed() -> None:
    # 0x0000000F, lowest nibble first: 15 - 8 = 7, then 0 - 8; 3 * 7 = 21, 3 * -8 = -24
    parts = {
        "weight_packed": np.array([[0xF]], np.int32),
        "weight_scale": np.array([[3.0]], np.float32),
    }
    out = np.empty((1, 8), np.float32)
    params = packed((1, 8), 4, 8)[1]
    assert KERNELS["packed-int"](parts, Window(0, 1, 0, 8), params, "F32", out) == (0, 0, 0)
    assert out.tolist() == [[21.0] + [-24.0] * 7]


@pytest.mark.parametrize(
    ("scale", "dtype", "counts"),
    [
        (float("nan"), "BF16", (8, 0, 0)),
        (float("inf"), "BF16", (1, 7, 0)),  # 0 * Inf is NaN
        (8200.0, "F16", (0, 0, 7)),  # 8 * 8200 is past 65504
        (8180.0, "F16", (0, 0, 0)),
        (2.0**126, "F32", (0, 7, 0)),
    ],
)
def test_counts_by_hand(scale: float, dtype: str, counts: tuple[int, int, int]) -> None:
    parts = {
        "weight_packed": np.array([[0x8]], np.int32),  # a zero, then seven times -8
        "weight_scale": np.array([[scale]], np.float32),
    }
    out = np.empty((1, 8), np.float32 if dtype == "F32" else np.uint16)
    params = packed((1, 8), 4, 8)[1]
    found = KERNELS["packed-int"](parts, Window(0, 1, 0, 8), params, dtype, out)
    assert found == Counts(*counts)


@pytest.mark.parametrize("zeros", ["absent", "plain", "packed"])
@pytest.mark.parametrize(
    ("size", "bits", "group_size"),
    [
        ((9, 256), 4, 32),
        ((5, 260), 4, 128),  # a last group and a last word cut short
        ((3, 77), 4, 7),
        ((17, 4096 + 40), 4, 32),  # more columns than are decoded at a time
        ((4, 48), 4, 16),
        ((1, 1), 4, -1),
        ((9, 130), 8, 32),
        ((6, 33), 8, -1),
        ((33, 1), 8, 0),
        ((35, 99), 3, 32),
        ((11, 40), 2, 8),
    ],
)
def test_shapes(size: tuple[int, int], bits: int, group_size: int, zeros: str) -> None:
    if zeros == "packed" and not group_size:
        pytest.skip("one number is never packed")
    check("packed-int", *packed(size, bits, group_size, zeros))


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 300)),
    bits=st.integers(2, 8),
    group_size=st.sampled_from([-1, 1, 5, 16, 32, 64]),
    zeros=st.sampled_from(["absent", "plain", "packed"]),
    scale=st.sampled_from(["F32", "BF16", "F16"]),
    how=st.tuples(st.sampled_from(["dense", "padded"]), st.sampled_from(["", "given"])),
)
def test_any_weight(
    size: tuple[int, int],
    bits: int,
    group_size: int,
    zeros: str,
    scale: str,
    how: tuple[str, str],
) -> None:
    made = packed(size, bits, group_size, zeros, scale=scale, packing=how[0], order=how[1])
    check("packed-int", *made, dtypes=("BF16", "F32"))


@pytest.mark.parametrize("zeros", ["absent", "packed"])
@pytest.mark.parametrize("given_order", ["", "given"])
def test_window_in_the_middle(zeros: str, given_order: str) -> None:
    parts, params = packed((48, 320), 4, 32, zeros, order=given_order)
    check("packed-int", parts, params, window=Window(16, 40, 64, 256))
    check("packed-int", parts, params, window=Window(16, 40, 72, 248))  # inside of groups


def test_group_outside() -> None:
    parts, params = packed((2, 64), 4, 32, order="given")
    parts["weight_g_idx"][5] = 2
    with pytest.raises(BadSource, match=r"group index 0\.\.2 of a column is outside"):
        check("packed-int", parts, params)
    given_parts = {part: tensor.numpy() for part, tensor in parts.items()}
    with pytest.raises(BadSource, match=r"group index 0\.\.2 of a column is outside"):
        KERNELS["packed-int"](
            given_parts, Window(0, 2, 0, 64), params, "BF16", np.empty((2, 64), np.uint16)
        )


def test_wrong_weight_shape() -> None:
    parts, params = packed((2, 64), 4, 32)
    found = {part: tensor.numpy() for part, tensor in parts.items()}
    found["weight_shape"] = np.array([[2, 63]])
    out = np.empty((2, 64), np.uint16)
    with pytest.raises(ShapeMismatch, match=r"weight_shape says \[2, 63\]"):
        KERNELS["packed-int"](found, Window(0, 2, 0, 64), params, "BF16", out)


@pytest.mark.parametrize(
    ("part", "shape"),
    [("weight_packed", (4, 7)), ("weight_scale", (4, 1)), ("weight_scale", (3, 2))],
)
def test_wrong_shapes_are_refused(part: str, shape: tuple[int, int]) -> None:
    parts, params = packed((4, 64), 4, 32)
    found = {name: tensor.numpy() for name, tensor in parts.items()}
    found[part] = np.zeros(shape, found[part].dtype)
    with pytest.raises(ShapeMismatch, match="not"):
        KERNELS["packed-int"](
            found, Window(0, 4, 0, 64), params, "BF16", np.empty((4, 64), np.uint16)
        )


@pytest.mark.parametrize("given_order", [False, True])
@pytest.mark.parametrize("zeros", [None, torch.int8, torch.int32])
@pytest.mark.parametrize(
    ("size", "group_size"), [((7, 200), 32), ((3, 33), -1), ((5, 40), 0), ((4, 70), 9)]
)
def test_int_quantized(
    size: tuple[int, int], group_size: int, zeros: torch.dtype | None, given_order: bool
) -> None:
    check("int-quantized", *plain(size, group_size, zeros, given_order and group_size > 0))


def test_every_byte_is_exact() -> None:
    codes = torch.arange(-128, 128, dtype=torch.int8).repeat(64, 1)
    parts = {"weight": codes, "weight_scale": scales(64, 1, wild=0.5)}
    params: Params = {"strategy": "channel", "group_size": -1, "groups": 1}
    check("int-quantized", parts, {**params, "act_order": False, "zeros": False})


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86-64 assembly")
def test_inner_loop_is_vectorised() -> None:
    """One run without a jump or call takes codes to packed products to 16 bits."""
    wanted = (r"\sv?cvtdq2ps\s", r"\sv?subps\s", r"\sv?mulps\s", r"\sv?psrld\s")
    assert_one_run(
        assembly_of(ints._fast, nb.uint8[::1], nb.float32[::1], nb.float32[::1], nb.uint16[::1]),
        wanted,
    )
