"""kt-kernel itself loads the quantized forms that `--dtype keep` writes, and computes rightly."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moeconv.api as api
from tests.clients.test_kt_kernel import PYTHON, SCRIPT, missing, relative

pytestmark = pytest.mark.client
CHECKPOINTS = Path(__file__).parents[1] / "fixtures" / "checkpoints"
TOKENS, TOP = 8, 2
# Their backends round activations to 8 bits; the others compute in BF16.
LIMITS = {"RAWINT4": 0.03, "GPTQ_INT4": 0.03}
LIMIT = 0.01
NAMES = {
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "w3"),
    "down": ("down_proj", "w2"),
}
CASES = [
    # fixture, parts, what the environment needs
    ("deepseekv3-fp8-block128", 1, {}),
    ("glm4moe-fp8-channel", 3, {}),
    ("kimik2-int4-packed-g32", 1, {"KT_RAWINT4_BACKEND": "avxvnni"}),
    ("qwen3moe-gptq-int4-g128", 1, {}),
    ("deepseekv4-mxfp4", 2, {}),
    ("mixtral-mxfp8-ct", 2, {}),
]


def decoded(src: Path, dst: Path, layer: int) -> dict[tuple[int, str], torch.Tensor]:
    """Return float32 experts of a layer, by moeconv's own decoding to the hf form."""
    api.convert(api.plan(src, dst, dtype="fp32", experts_only=True), dst)
    found = {}
    for path in dst.glob("*.safetensors"):
        for key, tensor in load_file(path).items():
            words = key.split(".")
            if int(words[words.index("layers") + 1]) != layer or "mtp" in words:
                continue
            (name,) = (name for name, ends in NAMES.items() if words[-2] in ends)
            found[int(words[words.index("experts") + 1]), name] = tensor
    return found


@pytest.mark.parametrize(("name", "parts", "settings"), CASES, ids=[case[0] for case in CASES])
def test_kt_kernel_computes_what_is_kept(
    tmp_path: Path, name: str, parts: int, settings: dict[str, str]
) -> None:
    reason = missing()
    if reason:
        pytest.skip(reason)
    if settings and "avx_vnni" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("groups in small sizes need kt-kernel's AVX-VNNI backend, which this CPU lacks")
    src = CHECKPOINTS / name
    plan = api.plan(src, layout="ktransformers", dtype="keep", numa=parts)
    api.convert(plan, tmp_path / "out")
    layer = max(layer for stack, layer in plan.model.expert_layers if stack == "main")
    experts = decoded(src, tmp_path / "hf", layer)
    intermediate, hidden = experts[0, "gate"].shape
    count = 1 + max(expert for expert, _ in experts)
    torch.manual_seed(5)
    x = torch.randn(TOKENS, hidden).bfloat16()
    ids = torch.stack([torch.randperm(count)[:TOP] for _ in range(TOKENS)]).contiguous()
    weights = torch.softmax(torch.randn(TOKENS, TOP), dim=1)
    sizes = torch.tensor([count, intermediate, layer])
    given = {"x": x, "ids": ids, "weights": weights, "sizes": sizes}
    save_file(given, tmp_path / "in.safetensors")
    method = str(plan.facts["method"])
    files = tmp_path / "in.safetensors", tmp_path / "y.safetensors"
    words = (PYTHON, SCRIPT, tmp_path / "out", method, parts, *files)
    command = [str(word) for word in words]
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, **settings}
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    expected = torch.zeros(TOKENS, hidden)
    for token in range(TOKENS):
        row = x[token].float()
        for expert, weight in zip(ids[token].tolist(), weights[token], strict=True):
            gate, up, down = (experts[expert, one] for one in NAMES)
            inner = torch.nn.functional.silu(gate @ row) * (up @ row)
            expected[token] += weight * (down @ inner)
    found = relative(load_file(files[1])["y"].float(), expected)
    print(f"{method}: {found:.4f}")
    assert found < LIMITS.get(method, LIMIT)
