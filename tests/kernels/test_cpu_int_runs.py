"""Tame integer weights, decoded 16 columns at a time, and what is not: against the reference."""

from __future__ import annotations

import platform
from typing import Any

import pytest
import torch

from moeconv.codecs.base import Window
from moeconv.kernels.cpu import int_runs, ints
from moeconv.types import Params
from tests.kernels.assembly import assembly_of, assert_one_run, nb
from tests.kernels.int_parts import scales, words
from tests.kernels.oracle import check
from tests.kernels.test_cpu_ints import packed
from tests.kernels.test_cpu_turned_ints import awq, gptq

Made = tuple[dict[str, torch.Tensor], Params]
TILE = int_runs.TURNED_ROWS
SCALES = ("weight_scale", "scales")


def tamed(made: Made) -> Made:
    """Return the weight with scales that are all ordinary."""
    parts, params = made
    found = {
        part: scales(*tensor.shape, wild=0.0) if part in SCALES else tensor
        for part, tensor in parts.items()
    }
    return found, params


def signed(size: tuple[int, int], group_size: int, zeros: bool) -> Made:
    """Return an int-quantized weight."""
    rows, cols = size
    groups = cols // group_size
    parts = {
        "weight": words(rows, cols // 4).view(torch.int8),
        "weight_scale": scales(rows, groups, wild=0.0),
    }
    if zeros:
        parts["weight_zero_point"] = words(rows, groups, seed=4).view(torch.int8)[:, :groups]
    params: Params = {"strategy": "group", "group_size": group_size, "groups": groups}
    return parts, {**params, "act_order": False, "zeros": zeros}


@pytest.fixture
def no_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a weight is decoded by the kernel for all scales."""

    def never(*_: Any) -> None:
        raise AssertionError("decoded the long way")

    monkeypatch.setattr(ints, "decode", never)


@pytest.mark.usefixtures("no_other_way")
@pytest.mark.parametrize("zeros", ["absent", "plain", "packed"])
@pytest.mark.parametrize("bits", [3, 4, 5, 8])
@pytest.mark.parametrize(
    ("size", "group_size"),
    [((9, 256), 32), ((5, 272), 128), ((3, 96), 48), ((2, 64), 16), ((4, 7 * 16), -1)],
)
def test_packed(size: tuple[int, int], group_size: int, bits: int, zeros: str) -> None:
    made = tamed(packed(size, bits, group_size, zeros))
    check("packed-int", *made, dtypes=("BF16",))


@pytest.mark.usefixtures("no_other_way")
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("size", "group_size"), [((7, 256), 32), ((3, 48), 16)])
def test_signed(size: tuple[int, int], group_size: int, zeros: bool) -> None:
    check("int-quantized", *signed(size, group_size, zeros), dtypes=("BF16",))


@pytest.mark.usefixtures("no_other_way")
def test_windows_inside_groups() -> None:
    made = tamed(packed((48, 640), 4, 128, "packed"))
    check("packed-int", *made, window=Window(16, 40, 80, 400), dtypes=("BF16",))
    check("packed-int", *made, window=Window(16, 40, 160, 240), dtypes=("BF16",))
    made = tamed(packed((8, 640), 4, 56))
    check("packed-int", *made, window=Window(0, 8, 56 * 3 + 8, 56 * 4 - 32), dtypes=("BF16",))


@pytest.mark.usefixtures("no_other_way")
@pytest.mark.parametrize("zeros", ["packed", "absent"])
@pytest.mark.parametrize(
    ("size", "bits", "group_size"),
    [
        ((64, 256), 4, 128),
        ((2 * TILE + 40, 96), 4, 32),  # more rows than are turned at a time
        ((TILE + 8, 16), 4, -1),
        ((TILE + 4, 48), 8, 16),
        ((TILE + 32, 96), 3, 32),  # fields across words
        ((11, 64), 3, 32),  # the last zero point, too
    ],
)
def test_gptq(size: tuple[int, int], bits: int, group_size: int, zeros: str) -> None:
    made = tamed(gptq(size, bits, group_size, zeros))
    check("gptq", *made, dtypes=("BF16",))
    if size[1] == 256:
        check("gptq", *made, window=Window(32, 56, 64, 192), dtypes=("BF16",))


@pytest.mark.usefixtures("no_other_way")
@pytest.mark.parametrize("zeros", ["packed", "absent"])
@pytest.mark.parametrize(
    ("size", "group_size"), [((64, 256), 128), ((2 * TILE + 24, 80), 16), ((8, 16), -1)]
)
def test_awq(size: tuple[int, int], group_size: int, zeros: str) -> None:
    made = tamed(awq(size, group_size, zeros))
    check("awq", *made, dtypes=("BF16",))
    if size[1] == 256:
        check("awq", *made, window=Window(16, 56, 64, 240), dtypes=("BF16",))


@pytest.mark.parametrize("row", [0, 8])
@pytest.mark.parametrize("wild", [1e-42, float("nan"), 2.0**120])
def test_one_wild_scale(row: int, wild: float) -> None:
    """It alone sends the weight the long way, even when most rows have been decoded."""
    parts, params = tamed(packed((9, 256), 4, 32))
    parts["weight_scale"][row, 5] = wild
    check("packed-int", parts, params)
    parts, params = tamed(gptq((TILE + 16, 64), 4, 32))
    parts["scales"][1, row * TILE // 8] = wild
    check("gptq", parts, params)


def test_far_zero_points() -> None:
    """-1 - zero lies past the middle between two BF16; with the zero rounded first it does not."""
    parts, params = signed((4, 64), 32, True)
    parts["weight"], parts["weight_scale"] = torch.full_like(parts["weight"], -1), torch.ones(4, 2)
    parts["weight_zero_point"] = torch.tensor([[(1 << 24) + (1 << 16) + 1, 3]] * 4).int()
    check("int-quantized", parts, params)


@pytest.mark.parametrize(
    ("size", "group_size", "bits"), [((3, 77), 7, 4), ((3, 72), 36, 4), ((2, 40), 40, 8)]
)
def test_groups_that_do_not_fit(size: tuple[int, int], group_size: int, bits: int) -> None:
    check("packed-int", *tamed(packed(size, bits, group_size)))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86-64 assembly")
def test_loops_are_vectors() -> None:
    """What runs for every 16 columns is a shuffle, or packed arithmetic, and a whole store."""
    bytes_in, bytes_out = nb.uint8[::1], nb.uint8[::1]
    runs, places = nb.UniTuple(nb.int64, 3), nb.UniTuple(nb.int64, 2)
    looked_up = assembly_of(int_runs._look_up_nibbles, bytes_in, bytes_in, runs, bytes_out, places)
    assert_one_run(
        looked_up, (r"\s(?:v?pshufb|vpermw)\s", r"\sv?punpckhbw\s|\sv?pmovzx|\sv?movdqu|\sv?movups")
    )
    floats = nb.float32[::1]
    for scale in (int_runs._scale, int_runs._scale_signed):
        found = assembly_of(scale, bytes_in, floats, floats, runs, bytes_out, places)
        assert_one_run(found, (r"\sv?cvtdq2ps\s", r"\sv?subps\s", r"\sv?mulps\s", r"\sv?psrld\s"))
    filled = assembly_of(int_runs._fill_tables, floats, floats, bytes_out)
    assert_one_run(filled, (r"\sv?subps\s", r"\sv?mulps\s", r"\sv?psrld\s"))
