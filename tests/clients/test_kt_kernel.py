"""kt-kernel itself loads what the ktransformers layout writes, and computes the right numbers.

MOECONV_KT_PYTHON names an interpreter that has kt-kernel (0.7.2), torch and safetensors; without
it, this one. Its AVX-512 builds compute AMXINT4 and AMXINT8 too: no CPU with AMX is needed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import moeconv.api as api
from moeconv.codecs import amx
from tests.checkpoints import Checkpoint, Size, write_checkpoint

pytestmark = pytest.mark.client
PYTHON = os.environ.get("MOECONV_KT_PYTHON", sys.executable)
SCRIPT = Path(__file__).with_name("kt_client.py")
SIZE = Size(hidden=512, intermediate=1024, experts=4)
TOKENS, TOP = 8, 2

# kt-kernel's own limits of mean |difference| / mean |reference|, against BF16 weights; this
# project's, where both sides have the same decoded weights and 8-bit activations.
OWN_LIMITS = {"int4": 0.35, "int8": 0.05, "bf16": 0.01}
EMULATED_LIMIT = 0.005


@cache
def missing() -> str:
    """Return why kt-kernel cannot run, "" if it can."""
    code = "import kt_kernel; print(kt_kernel.__version__, kt_kernel.__cpu_variant__)"
    ran = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=False)
    if ran.returncode:
        last = ran.stderr.strip().splitlines()[-1:] or ["no output"]
        return f"{PYTHON} cannot import kt_kernel ({last[0]}): set MOECONV_KT_PYTHON"
    if "avx2" in ran.stdout:
        return "kt-kernel needs AVX-512 for AMXINT4 and AMXINT8; this CPU has AVX2"
    return ""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    reason = missing()
    if reason:
        pytest.skip(reason)
    return write_checkpoint(tmp_path_factory.mktemp("kt") / "src", "qwen3moe", SIZE)


def inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    ids = torch.stack([torch.randperm(SIZE.experts)[:TOP] for _ in range(TOKENS)])
    return {
        "x": torch.randn(TOKENS, SIZE.hidden).bfloat16(),
        "ids": ids.contiguous(),
        "weights": torch.softmax(torch.randn(TOKENS, TOP), dim=1),
        "sizes": torch.tensor([SIZE.experts, SIZE.intermediate, 0]),
    }


def run(directory: Path, method: str, parts: int, work: Path) -> torch.Tensor:
    """Return what kt-kernel computes of the inputs, [tokens, hidden] float32."""
    save_file(inputs(), work / "in.safetensors")
    target = work / "out.safetensors"
    command = [PYTHON, SCRIPT, directory, method, str(parts), work / "in.safetensors", target]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    with safe_open(target, "pt") as file:
        found = file.get_tensor("y").float()
    assert isinstance(found, torch.Tensor)
    return found


def eight_bits(x: torch.Tensor) -> torch.Tensor:
    """Return rows rounded to 8 bits, as kt-kernel rounds activations."""
    step = x.abs().amax(dim=-1, keepdim=True) / 127
    return torch.round(x / step.clamp_min(1e-30)) * step


def to_bf16(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().float()


def same(x: torch.Tensor) -> torch.Tensor:
    return x


def mixed(
    experts: dict[tuple[int, str], list[torch.Tensor]], parts: int, *, emulate: bool
) -> torch.Tensor:
    """Return the layer's output in float32; experts: (expert, name) -> its slices, by part.

    `emulate`: products rounded to BF16, activations to 8 bits, each part's by itself.
    """
    eight, half = (eight_bits, to_bf16) if emulate else (same, same)
    given = inputs()
    out = torch.zeros(TOKENS, SIZE.hidden)
    for token in range(TOKENS):
        x = eight(given["x"][token].float())
        for expert, weight in zip(given["ids"][token], given["weights"][token], strict=True):
            for part in range(parts):
                gate, up, down = (
                    experts[int(expert), name][part] for name in ("gate", "up", "down")
                )
                hidden = torch.nn.functional.silu(half(gate @ x)) * half(up @ x)
                out[token] += weight * half(down @ eight(half(hidden)))
    return out


def slices(
    checkpoint: Checkpoint, dtype: str | None, parts: int
) -> dict[tuple[int, str], list[torch.Tensor]]:
    """Return the float32 slices of every expert: exact, or as the packed form decodes."""
    found = {}
    for (_, expert, name), tensor in checkpoint.experts.items():
        pieces = [
            piece.float().contiguous() for piece in tensor.chunk(parts, 1 if name == "down" else 0)
        ]
        if dtype is not None:
            form = amx.FORMS[f"amx{dtype}"]
            pieces = [
                torch.from_numpy(amx.decode(*amx.encode(piece.numpy(), form), piece.shape[1], form))
                for piece in pieces
            ]
        found[expert, name] = pieces
    return found


def relative(one: torch.Tensor, reference: torch.Tensor) -> float:
    return float((one - reference).abs().mean() / reference.abs().mean())


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("dtype", ["int4", "int8", "bf16"])
def test_kt_kernel_computes_the_layer(
    checkpoint: Checkpoint, tmp_path: Path, dtype: str, parts: int
) -> None:
    plan = api.plan(checkpoint.root, layout="ktransformers", dtype=dtype, numa=parts)
    api.convert(plan, tmp_path / "out")
    got = run(tmp_path / "out", str(plan.facts["method"]), parts, tmp_path)
    exact = relative(got, mixed(slices(checkpoint, None, parts), parts, emulate=False))
    print(f"{dtype}, {parts} parts: {exact:.4f} of BF16", end="")
    assert exact < OWN_LIMITS[dtype]
    if dtype != "bf16":
        decoded = relative(got, mixed(slices(checkpoint, dtype, parts), parts, emulate=True))
        print(f", {decoded:.5f} of the decoded weights and 8-bit activations", end="")
        assert decoded < EMULATED_LIMIT
    print()
