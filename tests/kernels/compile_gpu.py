"""Compile the GPU kernels for a Hopper GPU that is not there, and print the PTX instructions.

python -m tests.kernels.compile_gpu: a JSON list, for every codec and output how often it has each
instruction. Each codec's own `decode` is called with a driver that only names the target; nothing
is launched.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from moeconv.codecs.amx import FORMS
from moeconv.codecs.base import Window
from moeconv.kernels.gpu import KERNELS, TURNED_KERNELS, kernel_of
from moeconv.kernels.gpu.amx import encode
from moeconv.kernels.gpu.base import OUT_DTYPES, Output
from moeconv.measure.cases import Case, Tile, cases
from moeconv.torch_dtypes import torch_dtype
from moeconv.types import Params
from tests.kernels.int_variants import int_variants

Parts = dict[str, torch.Tensor]
TARGET = GPUTarget("cuda", 90, 32)
TILE = Tile(64, 512)
INSTRUCTION = re.compile(r"^\s+(?:@!?%p\d+\s+)?([a-z][\w.]*)", re.MULTILINE)
instructions: Counter[str] = Counter()  # of what was compiled last


class Driver:
    """A driver that knows the target alone."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
    """Stand in for JITFunction.run: compile for the arguments, and launch nothing."""
    assert options["enable_fp_fusion"] is False, "products would be fused into sums"
    kernel = RUN(self, *arguments, grid=grid, warmup=True, **options)
    instructions.update(INSTRUCTION.findall(kernel.asm["ptx"]))


def parts_of(case: Case) -> Parts:
    """Return the parts as tensors, 16-bit floats as what they are."""
    given = {
        part: array.view(f"i{array.itemsize}") if array.dtype == np.uint16 else array
        for part, array in case.parts.items()
    }
    parts = {part: torch.from_numpy(array) for part, array in given.items()}
    if case.kernel == "float":
        parts["weight"] = parts["weight"].view(torch_dtype(str(case.params["dtype"])))
    return parts


def variants(case: Case) -> Iterator[tuple[str, Parts, Params, bool]]:
    """Yield a case's title, parts, params and whether it is turned: itself, then others like it.

    What differs is how they are read: one output of each of the others is enough.
    """
    parts, params = parts_of(case), case.params
    yield case.title, parts, params, False
    if case.kernel.startswith("fp8"):
        yield f"{case.title}, E5M2", parts, {**params, "dtype": "F8_E5M2"}, False
        for dtype in (torch.bfloat16, torch.float16, torch.uint8):
            scale = parts["weight_scale"].to(dtype)
            yield f"{case.title}, {dtype}", {**parts, "weight_scale": scale}, params, False
    if case.kernel == "float":
        for name in ("BF16", "F64"):
            weight = parts["weight"].to(torch_dtype(name))
            yield name, {"weight": weight}, {"dtype": name}, False
    if case.kernel == "nf4":
        scale = parts["weight.absmax"].float()
        yield (
            "NF4, plain",
            {**parts, "weight.absmax": scale},
            {**params, "nested_blocksize": 0},
            False,
        )
    for title, made in int_variants(case.title, TILE):
        yield title, *made, False
    if case.kernel in TURNED_KERNELS:
        turned = {part: stored.T.contiguous() for part, stored in parts.items()}
        yield f"{case.title}, turned", turned, params, True


def outputs(tile: Tile) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Yield a dtype, an order and an output of it: every dtype in order, the first also turned."""
    for dtype, kind in OUT_DTYPES.items():
        yield dtype, "rows", torch.empty(tile, dtype=kind)
    yield "BF16", "turned", torch.empty(tile[::-1], dtype=torch.int16).T


def encoders() -> Iterator[dict[str, Any]]:
    """Yield what packing BF16 as each of kt-kernel's forms becomes."""
    values, bad = torch.zeros(tuple(TILE), dtype=torch.int16), torch.full((1,), -1)
    for form in FORMS.values():
        instructions.clear()
        out = torch.empty(form.nbytes(*TILE), dtype=torch.uint8)
        encode(values, form.name, "weight", out, bad)
        named = {"title": form.name, "codec": form.name, "dtype": "AMX", "order": "rows"}
        yield {**named, "instructions": dict(instructions)}


RUN = JITFunction.run


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    JITFunction.run = compile_only
    counts = torch.zeros(3, dtype=torch.int64)
    found = []
    for case in cases(TILE):
        if case.kernel not in KERNELS:
            continue
        for title, parts, params, turned in variants(case):
            kernel = kernel_of(case.kernel, turned=turned)
            tile = Tile(TILE.cols, TILE.rows) if turned else TILE
            wanted = None if title == case.title else 1
            for dtype, order, out in islice(outputs(tile), wanted):
                instructions.clear()
                window = Window(0, tile.rows, 0, tile.cols)
                kernel(parts, window, params, Output(dtype, out, counts))
                named = {"title": title, "codec": case.kernel, "dtype": dtype, "order": order}
                found.append({**named, "instructions": dict(instructions)})
    print(json.dumps([*found, *encoders()]))


if __name__ == "__main__":
    main()
