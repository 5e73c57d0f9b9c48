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
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from moeconv.codecs.amx import FORMS
from moeconv.codecs.base import Window
from moeconv.kernels.gpu import KERNELS, kernel_of
from moeconv.kernels.gpu.amx import encode
from moeconv.kernels.gpu.base import OUT_DTYPES
from moeconv.measure.cases import Tile, cases

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


def parts_of(parts: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the parts as tensors."""
    return {part: torch.from_numpy(array) for part, array in parts.items()}


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
        kernel = kernel_of(case.kernel)
        for dtype, order, out in outputs(TILE):
            instructions.clear()
            window = Window(0, TILE.rows, 0, TILE.cols)
            kernel(parts_of(case.parts), window, case.params, dtype, out, counts)
            named = {"title": case.title, "codec": case.kernel, "dtype": dtype, "order": order}
            found.append({**named, "instructions": dict(instructions)})
    print(json.dumps([*found, *encoders()]))


if __name__ == "__main__":
    main()
