"""Integer weights for tests of kernels: parts and parameters, as they are stored."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moeconv.codecs import bits as b
from moeconv.codecs.packed_int import run_of
from moeconv.types import Params
from tests.kernels.int_parts import draw, order, scales, with_params, words

Made = tuple[dict[str, torch.Tensor], Params]
PLAIN_WEIGHTS = pytest.mark.parametrize(
    ("size", "group_size"), [((7, 200), 32), ((3, 33), -1), ((5, 40), 0), ((4, 70), 9)]
)


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


def every_packed_pair(bits: int) -> Made:
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


def every_gptq_pair(bits: int) -> Made:
    """Return a weight whose row z has zero point z, and every code in its columns."""
    count = 1 << bits
    per_word = 32 // bits
    shifts = np.arange(per_word, dtype=np.uint64) * np.uint64(bits)
    codes = np.arange(count, dtype=np.uint64).reshape(-1, per_word)
    line = torch.from_numpy((codes << shifts).sum(axis=1).astype(np.uint32).view(np.int32))
    parts, params = gptq((count, count), bits, count)
    parts["qweight"], parts["qzeros"] = line[:, None].repeat(1, count), line[None].clone()
    return parts, params
