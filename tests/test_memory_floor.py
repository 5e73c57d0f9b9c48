"""The memory that a run needs at least: the largest smallest piece, whatever task needs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch

from moeconv.arrange import OutFile, OutTensor
from moeconv.codecs import CODECS
from moeconv.execute import check_memory
from moeconv.layouts.base import Draft
from moeconv.rects import Rect
from moeconv.steps import Work, floor_nbytes
from moeconv.tasks import Member, Region, Task
from moeconv.types import DTYPE_BITS, Params, Span, Weight
from tests.codecs.float_oracles import weight_of
from tests.kernels import fp8_parts
from tests.kernels.ggml_blocks import params_of, some_blocks
from tests.kernels.int_weights import packed, plain
from tests.kernels.oracle import headers

SIDE = 2048
SIZE = (SIDE, SIDE)
Made = tuple[Mapping[str, torch.Tensor], Params]
FP8 = fp8_parts.params_of("F8_E4M3", (128, 16))


def weight(codec: str, made: Made, turned: bool = False) -> Weight:
    tensors, params = made
    return weight_of(CODECS[codec], params, headers(tensors), turned)


def fp8(turned: bool = False) -> Weight:
    codes = torch.zeros(SIZE, dtype=torch.float8_e4m3fn)
    scales = torch.ones(SIDE // 128, SIDE // 16)
    return weight("fp8-block", ({"weight": codes, "weight_scale": scales}, FP8), turned)


def ggml() -> Weight:
    params = params_of("Q4_K")
    blocks = some_blocks("Q4_K", SIDE, SIDE // int(params["block_cols"]))
    return weight("ggml", ({"weight": torch.from_numpy(blocks)}, params))


def int8(zeros: torch.dtype) -> Weight:
    return weight("int-quantized", plain(SIZE, 16, zeros, False))


def int4(group_size: int) -> Weight:
    return weight("packed-int", packed(SIZE, 4, group_size, "plain"))


# Two weights of one codec and size, the dtype of their outputs, and whether these lie transposed.
PAIRS = {
    "dtype of a part": ([int8(torch.int8), int8(torch.int32)], ["BF16"] * 2, [False] * 2),
    "size of groups": ([int4(512), int4(16)], ["BF16"] * 2, [False] * 2),
    "stored transposed": ([fp8(), fp8(turned=True)], ["BF16"] * 2, [False] * 2),
    "written transposed": ([fp8(), fp8()], ["BF16"] * 2, [False, True]),
    "dtype of the output": ([ggml(), ggml()], ["BF16", "F16"], [False] * 2),
}


def file_of(dtypes: Sequence[str], transposed: Sequence[bool]) -> OutFile:
    drafts = (
        Draft("w", dtype, SIZE, 1, *SIZE, transposed=across)
        for dtype, across in zip(dtypes, transposed, strict=True)
    )
    return OutFile("f", 0, tuple(OutTensor(draft, 0, 0) for draft in drafts), b"", 0)


@pytest.mark.parametrize("name", PAIRS)
def test_tasks_that_look_alike_may_need_more(name: str) -> None:
    weights, dtypes, transposed = PAIRS[name]
    files = [file_of(dtypes, transposed)]
    rect = Rect(0, Span(0, SIDE), Span(0, SIDE), 0, 1, 0, SIDE, SIDE)
    tasks = [
        Task(
            number,
            (Member(number, 0, Span(0, SIDE)),),
            (Region(0, number, 0, SIDE, 0, SIDE * SIDE * DTYPE_BITS[dtype] // 8, (rect,)),),
        )
        for number, dtype in enumerate(dtypes)
    ]
    floors = [
        floor_nbytes(Work(task, (one,), files)) for task, one in zip(tasks, weights, strict=True)
    ]
    assert floors[0] != floors[1]
    assert check_memory(tasks, weights, files) == max(floors)
    assert check_memory(tasks[::-1], weights, files) == max(floors)
