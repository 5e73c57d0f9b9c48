"""What the GPU kernels become: compiled for a Hopper GPU, none being there, and read."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from moeconv.codecs.amx import FORMS
from moeconv.kernels.gpu import KERNELS

ROOT = Path(__file__).parents[2]
# A fused product and sum, a division that is not rounded, subnormal numbers flushed to zero, the
# compiler's own rounding to BF16: each would change bits.
FORBIDDEN = re.compile(r"fma\.|\.ftz|\.approx|div\.full|cvt\.\w*\.?bf16")
GLOBAL = re.compile(r"(ld|st)\.global\.(?:v(\d)\.)?b(\d+)")
INTS = ("packed-int", "int-quantized", "gptq", "awq")
# A thread loads more scales and zero points, of one or two bytes, than words.
MANY_SCALES = ("INT8, zeros of 8 bits in activation order",)
MANY_SCALES += ("AWQ INT4, without zeros", "AWQ INT4, groups of 4")
linux = pytest.mark.skipif(sys.platform != "linux", reason="Triton is installed on Linux alone")


class Compiled(NamedTuple):
    """A kernel compiled for one dtype and order of its output."""

    title: str
    codec: str
    dtype: str
    order: str
    instructions: dict[str, int]

    def those(self, pattern: re.Pattern[str]) -> list[str]:
        return [one for one in self.instructions if pattern.search(one)]

    def share(self, kind: str, nbytes: int) -> float:
        """Return how many of the loads ("ld") or stores ("st") move at least `nbytes` a thread."""
        widths: Counter[int] = Counter()
        for one, count in self.instructions.items():
            found = GLOBAL.match(one)
            if found and found[1] == kind:
                widths[int(found[2] or 1) * int(found[3]) // 8] += count
        wide = sum(count for width, count in widths.items() if width >= nbytes)
        return wide / widths.total()


@cache
def compiled() -> tuple[Compiled, ...]:
    environment = {key: os.environ[key] for key in os.environ if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_gpu"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return tuple(Compiled(**one) for one in json.loads(run.stdout))


@linux
def test_every_kernel_compiles_and_nothing_changes_bits() -> None:
    assert {*KERNELS, *FORMS} <= {one.codec for one in compiled()}
    wrong = {one[:4]: one.those(FORBIDDEN) for one in compiled() if one.those(FORBIDDEN)}
    assert wrong == {}
    assert any(one.those(re.compile(r"mul\.rn\.f32")) for one in compiled())


@linux
def test_memory_is_read_and_written_in_wide_words() -> None:
    """Where parts and output are aligned; scales may be read one by one, numbers may not.

    Most of ggml's blocks have lengths that leave their rows unaligned.
    """
    halves = [one for one in compiled() if one.dtype == "BF16" and one.title not in MANY_SCALES]
    assert {one.order for one in halves} == {"rows", "turned"}
    narrow = [
        one[:4]
        for one in halves
        if (one.codec != "ggml" and one.share("ld", 4) < 0.4) or one.share("st", 8) < 1
    ]
    assert narrow == []


@linux
def test_integers_are_stored_sixteen_bytes_at_once() -> None:
    """BF16 in rows; packed codes, whose scales are stored one by one."""
    found = [one for one in compiled() if one.codec in INTS and one[2:4] == ("BF16", "rows")]
    assert {one.codec for one in found} == set(INTS)
    assert [one.title for one in found if one.share("st", 16) < 1] == []
    found = [one for one in compiled() if one.dtype == "AMX"]
    assert [one.title for one in found if one.share("st", 16) < 0.8] == []


def test_what_is_forbidden_is_found() -> None:
    for bad in ("fma.rn.f32", "mul.ftz.f32", "div.full.f32", "cvt.rn.bf16.f32", "rcp.approx.f32"):
        assert FORBIDDEN.search(bad)
    for good in ("mul.rn.f32", "cvt.rn.f16.f32", "div.rn.f32", "cvt.s64.s32"):
        assert not FORBIDDEN.search(good)
