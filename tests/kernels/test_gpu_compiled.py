"""What the GPU kernels become: compiled for a Hopper GPU, none being there, and read."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from moeconv.kernels.gpu import KERNELS

ROOT = Path(__file__).parents[2]
# A fused product and sum, a division that is not rounded, subnormal numbers flushed to zero, the
# compiler's own rounding to BF16: each would change bits.
FORBIDDEN = re.compile(r"fma\.|\.ftz|\.approx|div\.full|cvt\.\w*\.?bf16")


@cache
def instructions() -> dict[str, list[str]]:
    environment = {key: os.environ[key] for key in os.environ if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_gpu"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, list[str]] = json.loads(run.stdout)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is installed on Linux alone")
def test_every_kernel_compiles_and_nothing_changes_bits() -> None:
    found = instructions()
    assert {home.split(".")[0] for home in KERNELS.values()} <= {n.split(".")[0] for n in found}
    wrong = {
        name: [one for one in used if FORBIDDEN.search(one)]
        for name, used in found.items()
        if any(FORBIDDEN.search(one) for one in used)
    }
    assert wrong == {}
    assert any("mul" in one and "f32" in one for used in found.values() for one in used)


def test_what_is_forbidden_is_found() -> None:
    for bad in ("fma.rn.f32", "mul.ftz.f32", "div.full.f32", "cvt.rn.bf16.f32", "rcp.approx.f32"):
        assert FORBIDDEN.search(bad)
    for good in ("mul.rn.f32", "cvt.rn.f16.f32", "div.rn.f32", "cvt.s64.s32"):
        assert not FORBIDDEN.search(good)
