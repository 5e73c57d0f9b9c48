"""Every way of storing experts, converted with real numbers and compared tensor by tensor.

The names and shapes are those of hub_names.json and architectures.json, the numbers are random;
what is expected is worked out here on whole tensors, without tiles, slots or windows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeconv import api
from tests.families.sources import Names, read_names

FIXTURES = Path(__file__).parent / "fixtures"
Tensors = dict[str, torch.Tensor]
Decode = Callable[[Tensors, str], torch.Tensor]

DTYPES = {
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
}
PLAIN = {
    "architectures.json": (
        *("aria", "gpt_oss", "granitemoe", "jetmoe", "llama4_text", "mixtral", "nemotron_h"),
        *("hy_v4", "kimi_linear", "jamba"),
    ),
    "hub_names.json": (
        *("dbrx", "step3p5", "gemma4", "qwen3_vl_moe-hub", "qwen3_5_moe-mixed", "lfm2_moe"),
        *("ernie4_5_vl_moe", "gpt_oss-per-expert", "llama4"),
    ),
}


def names_of(file: str, case: str) -> Names:
    entry = json.loads((FIXTURES / file).read_text())[case]
    names = read_names(entry, entry.get("experts", 4))
    # transformers made some models with vision towers of full size
    small = {name: what for name, what in names.tensors.items() if math.prod(what[1]) < 1 << 18}
    return names._replace(tensors=small)


def write(root: Path, names: Names, *, native: bool = False) -> Tensors:
    """Write a checkpoint with these names and random numbers; return its tensors."""
    root.mkdir()
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for name, (dtype, shape) in names.tensors.items():
        values = torch.randn(shape, generator=generator)
        if dtype in ("U8", "I64"):  # exponents of E8M0 scales near 1, and codes
            low, high = (120, 130) if "scale" in name else (0, 200)
            values = torch.randint(low, high, shape, generator=generator)
        tensors[name] = values.to(DTYPES[dtype])
    file = "consolidated.safetensors" if native else "model.safetensors"
    save_file(tensors, root / file, metadata={"format": "pt"})
    (root / ("params.json" if native else "config.json")).write_text(json.dumps(names.config))
    return tensors


def convert(root: Path, dst: Path, dtype: str) -> Tensors:
    api.convert(api.plan(root, dtype=dtype), dst)
    output: Tensors = {}
    for file in dst.glob("*.safetensors"):
        output |= load_file(file)
    return output


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("file", "case"), [(file, case) for file, cases in PLAIN.items() for case in cases]
)
def test_plain_tensors_come_back(file: str, case: str, dtype: str, tmp_path: Path) -> None:
    tensors = write(tmp_path / "in", names_of(file, case))
    output = convert(tmp_path / "in", tmp_path / "out", dtype)
    assert set(output) == set(tensors)
    for name, stored in tensors.items():
        wide = dtype == "fp32" and stored.dtype == torch.bfloat16
        expected = stored.float() if wide else stored
        assert output[name].dtype == expected.dtype, name
        assert torch.equal(bits(output[name]), bits(expected)), name


def blocks(scale: str, size: int, *, dims: tuple[int, ...]) -> Decode:
    """Return weight * scale, each scale held for `size` elements along these axes."""

    def decode(tensors: Tensors, name: str) -> torch.Tensor:
        weight = tensors[name].float()
        scales = tensors[name + scale if scale.startswith("_") else _beside(name, scale)]
        values = torch.exp2(scales.float() - 127) if scales.dtype == torch.uint8 else scales.float()
        for dim in dims:
            values = values.repeat_interleave(size, dim).narrow(dim, 0, weight.shape[dim])
        return weight * values

    return decode


def _beside(name: str, part: str) -> str:
    return f"{name.rpartition('.')[0]}.{part}"


def gpt_oss_blocks(tensors: Tensors, name: str) -> torch.Tensor:
    """Return MXFP4 by openai/gpt-oss' own table and order: low nibble first, rows as stored."""
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    packed, scales = tensors[f"{name}.blocks"].int(), tensors[f"{name}.scales"].int()
    pairs = torch.stack((table[packed & 15], table[packed >> 4]), -1).flatten(-2)
    return torch.ldexp(pairs, scales.unsqueeze(-1) - 127).flatten(-2)


QUANTIZED: Mapping[str, tuple[str, Decode]] = {
    "qwen3_vl_moe-fp8": (".experts.", blocks("_scale_inv", 32, dims=(-2, -1))),
    "llama4-fp8-packed": (".experts.", blocks("_scale", 1, dims=())),
    "llama4-fp8-channel": (".experts.", blocks("weight_scale", 1, dims=())),
    "step3p5-fp8": (".moe.", blocks("weight_scale_inv", 32, dims=(-2, -1))),
    "qwen3_5_moe-fp8": ("layers.", blocks("weight_scale_inv", 32, dims=(-2, -1))),
    "minimax_m3": (".experts.", blocks("weight_scale_inv", 32, dims=(-1,))),
    "mistral_native": ("layers.", blocks("qscale_weight", 1, dims=())),
    "gpt_oss_original": (".mlp.mlp", gpt_oss_blocks),
}


@pytest.mark.parametrize("case", QUANTIZED)
def test_quantized_tensors_are_decoded_where_they_lie(case: str, tmp_path: Path) -> None:
    where, decode = QUANTIZED[case]
    native = case == "mistral_native"
    tensors = write(tmp_path / "in", names_of("hub_names.json", case), native=native)
    output = convert(tmp_path / "in", tmp_path / "out", "fp32")
    decoded = 0
    for name, found in output.items():
        stored = tensors.get(name)
        if stored is not None and stored.dtype != torch.float8_e4m3fn:
            expected = stored.float() if stored.dtype == torch.bfloat16 else stored
        else:
            assert where in name
            expected = decode(tensors, name)
            decoded += 1
        assert found.shape == expected.shape, name
        assert torch.equal(bits(found), bits(expected)), name
    carriers = [
        n for n, t in tensors.items() if t.dtype == torch.float8_e4m3fn or n.endswith(".blocks")
    ]
    assert decoded == len(carriers) > 0
    config = "params.json" if native else "config.json"
    declared = json.loads((tmp_path / "out" / config).read_text())
    assert "quantization" not in json.dumps(declared)


STATE = "quant_state.bitsandbytes__nf4"


def nf4_parts(rows: int, cols: int, seed: int) -> tuple[Tensors, torch.Tensor]:
    """Return a weight as bitsandbytes stores it, and its numbers: flat, high nibble first."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (rows * cols // 2, 1), generator=generator).to(torch.uint8)
    table = torch.sort(torch.randn(16, generator=generator)).values
    scales = torch.rand(-(-rows * cols // 64), generator=generator)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [rows, cols]}
    parts = {
        "weight": packed,
        "weight.absmax": scales,
        "weight.quant_map": table,
        f"weight.{STATE}": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    codes = torch.stack((packed >> 4, packed & 15), -1).flatten().long()
    values = table[codes] * scales.repeat_interleave(64)[: rows * cols]
    return parts, values.reshape(rows, cols)


def test_bitsandbytes_experts_are_decoded(tmp_path: Path) -> None:
    """The shape of each weight stands in a payload beside it: all of them are read to plan."""
    names = names_of("hub_names.json", "dots1")
    skipped = ["lm_head", "gate", "self_attn", "layers.0"]
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    quantization |= {"bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": skipped}
    config = {**names.config, "quantization_config": quantization}
    tensors = write(tmp_path / "in", names._replace(config=config))
    expected: Tensors = {}
    for index, name in enumerate(sorted(names.tensors)):
        if ".experts." in name:
            parts, expected[name] = nf4_parts(*tensors.pop(name).shape, index)
            tensors |= {f"{name.removesuffix('weight')}{part}": t for part, t in parts.items()}
    save_file(tensors, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    output = convert(tmp_path / "in", tmp_path / "out", "fp32")
    assert set(output) == set(names.tensors)
    for name, values in expected.items():
        assert torch.equal(bits(output[name]), bits(values)), name
