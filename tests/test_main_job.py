"""The main job from end to end: what real tools made of a checkpoint is what the hf output holds.

The oracles under tests/fixtures were computed by transformers and ModelOpt, not by this project.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import moeconv.api as api
from moeconv.convert import Result
from moeconv.errors import NonFiniteValue
from tests.checkpoints import (
    Size,
    config_of,
    decode_mxfp4,
    files_of,
    quick_directory,
    read_all,
    same_bits,
    save,
    write_checkpoint,
)

NAMES = ("gptoss-mxfp4", "gptoss-bf16", "mixtral-bf16", "qwen3moe-bf16")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
EXPERTS = "model.layers.{layer}.mlp.experts"


def convert(src: Path, dst: Path, **options: Any) -> Result:
    """Plan and convert."""
    return api.convert(api.plan(src, dst, **options), dst)


def expert(tensors: dict[str, torch.Tensor], layer: int, index: int, name: str) -> torch.Tensor:
    """Return an expert's weight [out, in] (or bias) from an hf output of any of the families."""
    kind, _, bias = name.partition(".")
    prefix = f"model.layers.{layer}"
    packed = tensors.get(f"{prefix}.mlp.experts.{'down' if kind == 'down' else 'gate_up'}_proj")
    if packed is None:
        mixtral = {"gate": "w1", "up": "w3", "down": "w2"}
        for base in (f"mlp.experts.{index}.{kind}_proj", f"block_sparse_moe.experts.{index}."):
            ending = mixtral[kind] if base.endswith(".") else ""
            if (full := f"{prefix}.{base}{ending}.weight") in tensors:
                return tensors[full]
        raise KeyError(name)
    if bias:
        fused = "down_proj_bias" if kind == "down" else "gate_up_proj_bias"
        vector = tensors[f"{prefix}.mlp.experts.{fused}"][index]
        return vector if kind == "down" else vector[("gate", "up").index(kind) :: 2]
    matrix = packed[index].T
    return matrix if kind == "down" else matrix[("gate", "up").index(kind) :: 2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_hf_output_is_the_oracle_bit_for_bit(
    name: str, dtype: str, fixtures: Path, tmp_path: Path
) -> None:
    result = convert(fixtures / "checkpoints" / name, tmp_path / "out", dtype=dtype)
    assert result.state == "converted"
    tensors = read_all(tmp_path / "out")
    oracle = load_file(fixtures / "oracles" / name / "dequantized.safetensors")
    assert len(oracle) >= 24
    for key, expected in oracle.items():
        _, layer, _, index, what, ending = key.split(".")
        found = expert(tensors, int(layer), int(index), what + (".bias" * (ending == "bias")))
        assert same_bits(found, expected.to(DTYPES[dtype])), key
    source = read_all(fixtures / "checkpoints" / name)
    for key, stored in source.items():
        if "experts" not in key:
            assert same_bits(tensors[key], stored.to(DTYPES[dtype])), key
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == str(DTYPES[dtype]).removeprefix("torch.")


@pytest.mark.parametrize("name", NAMES)
def test_each_expert_computes_what_transformers_computed(
    name: str, fixtures: Path, tmp_path: Path
) -> None:
    convert(fixtures / "checkpoints" / name, tmp_path / "out")
    tensors = {key: value.double() for key, value in read_all(tmp_path / "out").items()}
    known = load_file(fixtures / "oracles" / name / "expert_io.safetensors")
    for layer in range(2):
        x, expected = known[f"layers.{layer}.x"].double(), known[f"layers.{layer}.y"].double()
        for index in range(expected.shape[0]):
            found, bound = forward(tensors, layer, index, x, clamped="gptoss" in name)
            assert (found - expected[index]).abs().le(bound).all()
            wrong, _ = forward(tensors, layer, index, x, clamped="gptoss" in name, swap=True)
            assert (wrong - expected[index]).abs().gt(bound).any()  # the bound can tell


def forward(
    tensors: dict[str, torch.Tensor],
    layer: int,
    index: int,
    x: torch.Tensor,
    *,
    clamped: bool,
    swap: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an expert's output in float64, and how far float32 sums of it may lie from it.

    A float32 sum of n products is off by at most n * 2^-24 of the sum of their magnitudes, in any
    order; the activation's slope is below 2 times the other factor's size, with a few roundings.
    """

    def weight(what: str) -> torch.Tensor:
        return expert(tensors, layer, index, what)

    def linear(values: torch.Tensor, what: str) -> tuple[torch.Tensor, torch.Tensor]:
        bias = weight(f"{what}.bias") if clamped else torch.zeros(1, dtype=torch.float64)
        matrix = weight(what)
        return values @ matrix.T + bias, values.abs() @ matrix.abs().T + bias.abs()

    (gate, gate_size), (up, up_size) = linear(x, "gate"), linear(x, "up")
    if swap:
        gate, up = up, gate
    if clamped:  # gpt-oss: alpha 1.702, limit 7, and one more of up
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        hidden = (up + 1) * gate * torch.sigmoid(gate * 1.702)
    else:
        hidden = torch.nn.functional.silu(gate) * up
    y, _ = linear(hidden, "down")
    unit = 2.0**-24 * (x.shape[1] + 8)
    hidden_off = unit * 2 * (gate_size * (up.abs() + 2) + up_size * (gate.abs() + 1))
    down = weight("down").abs()
    longer = 2.0**-24 * (hidden.shape[1] + 8)
    return y, (hidden_off + longer * hidden.abs()) @ down.T + 2.0**-22 * y.abs() + 1e-30


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_it_and_computes_the_same(
    name: str, dtype: str, fixtures: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    source = fixtures / "checkpoints" / name
    convert(source, tmp_path / "out", dtype=dtype)
    quantized = {}
    if "mxfp4" in name:
        quantized["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
    load = transformers.AutoModelForCausalLM.from_pretrained
    expected = load(source, dtype=DTYPES[dtype], **quantized).eval()
    model, info = load(tmp_path / "out", output_loading_info=True)
    assert model.dtype == DTYPES[dtype]
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info[kind], kind
    tokens = torch.arange(1, 33)[None]
    with torch.no_grad():
        logits = model.eval()(tokens).logits
        assert same_bits(logits, expected(tokens).logits)
    assert logits.isfinite().all()
    assert logits.std() > 0


def test_index_modes_and_files_beside(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "src", "gptoss-mxfp4", files=3)
    beside = {
        "tokenizer.json": b'{"a": 1}',
        "chat_template.jinja": b"{{ x }}",
        "LICENSE": b"as it is\n",
        "modeling_own.py": b"raise SystemExit(1)\n",
        "generation_config.json": b'{"temperature": 1}',
    }
    for name, data in beside.items():
        (checkpoint.root / name).write_bytes(data)
        (checkpoint.root / name).chmod(0o600)
    mask = os.umask(0o027)
    try:
        convert(checkpoint.root, tmp_path / "out", max_file_size=20_000)
    finally:
        os.umask(mask)
    out = tmp_path / "out"
    for name, data in beside.items():
        assert (out / name).read_bytes() == data
    for path in out.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o640, path.name
    index = json.loads((out / "model.safetensors.index.json").read_text())
    tensors = read_all(out)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert set(index["weight_map"]) == set(tensors) == set(checkpoint.form)
    for path in out.glob("*.safetensors"):
        held = {name for name, file in index["weight_map"].items() if file == path.name}
        assert set(load_file(path)) == held
    for key, tensor in checkpoint.form.items():
        assert same_bits(tensors[key], tensor), key


def test_the_source_is_not_touched(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "src", "mixtral").root
    before = {path: (path.stat(), path.read_bytes()) for path in source.iterdir()}
    for path in source.iterdir():
        path.chmod(0o444)
    source.chmod(0o555)
    try:
        convert(source, tmp_path / "out")
    finally:
        source.chmod(0o755)
    assert {path: path.read_bytes() for path in source.iterdir()} == {
        path: data for path, (_, data) in before.items()
    }
    assert all(path.stat().st_mtime_ns == found.st_mtime_ns for path, (found, _) in before.items())


def all_pairs(root: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Write gpt-oss whose blocks hold each of 256 scales with each of 256 bytes; return the parts.

    [E 4, 2I 64, groups 16, 16]: 65536 bytes; every group has one scale.
    """
    size = Size(hidden=512, intermediate=32, experts=4)
    checkpoint = write_checkpoint(root, "gptoss-mxfp4", size)
    tensors = load_file(root / "model.safetensors")
    prefix = EXPERTS.format(layer=0)
    blocks = torch.arange(256, dtype=torch.uint8).repeat(256).reshape(4, 64, 16, 16)
    scales = torch.arange(256, dtype=torch.uint8).repeat_interleave(16).reshape(4, 64, 16)
    tensors[f"{prefix}.gate_up_proj_blocks"] = blocks
    tensors[f"{prefix}.gate_up_proj_scales"] = scales
    save(root, config_of("gptoss-mxfp4", checkpoint.size), tensors)
    return blocks, scales


# 255 is NaN for every code: 256 bytes of two codes. 2^(254 - 127) * 4 and * 6 are infinite: they
# overflow at scales 253 (the 4 and 6 of 2^126: 4 is 2^128) and 254 (from 2 on).
PAIR_NAN, PAIR_INF = 512, (2 * 2 + 2 * 4) * 32


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("layout", ["hf", "vllm"])
def test_all_scales_with_all_bytes(layout: str, dtype: str, tmp_path: Path) -> None:
    blocks, scales = all_pairs(tmp_path / "src")
    result = convert(tmp_path / "src", tmp_path / "out", layout=layout, dtype=dtype)
    expected = decode_mxfp4(blocks, scales)
    tensors = read_all(tmp_path / "out")
    if layout == "hf":
        found = tensors[f"{EXPERTS.format(layer=0)}.gate_up_proj"].transpose(1, 2)
    else:
        found = tensors[f"{EXPERTS.format(layer=0)}.routed_experts.w13_weight"]
    if dtype == "fp32":
        nan = expected.isnan()
        expected = expected.float()
        expected.view(torch.int32)[nan] = 0x7FC00000
    assert same_bits(found, expected)
    assert (expected[~expected.isnan()].abs().float() == 2.0**-128).any()  # 0.5 * 2^-127
    assert result.manifest["experts"] == {"nan": PAIR_NAN, "inf": PAIR_INF}
    held = expected.float()
    assert (int(held.isnan().sum()), int(held.isinf().sum())) == (PAIR_NAN, PAIR_INF)
    written = json.loads((tmp_path / "out" / "moeconv.json").read_text())
    assert written["experts"] == result.manifest["experts"]


def test_overflow_of_fp16_names_the_weight(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "src", "mixtral")
    tensors = dict(checkpoint.form)
    name = "model.layers.0.block_sparse_moe.experts.2.w3.weight"
    tensors[name] = tensors[name].clone()
    tensors[name][5, 7] = 70000.0
    tensors[name][6, 7] = torch.inf
    save(checkpoint.root, config_of("mixtral", checkpoint.size), tensors)
    out = tmp_path / "out"
    with pytest.raises(NonFiniteValue) as caught:
        convert(checkpoint.root, out, dtype="fp16")
    assert caught.value.exit_code == 4
    assert name in str(caught.value)
    assert not (out / "config.json").exists()
    with quick_directory() as other:
        result = convert(checkpoint.root, other / "out", dtype="fp16", nonfinite="keep")
        found = read_all(other / "out")[name]
        assert found[5, 7] == torch.inf
        assert found[6, 7] == torch.inf
        assert int(found.isinf().sum()) == 2
        assert result.manifest["experts"] == {"nan": 0, "inf": 1}  # of the source
        assert result.manifest["overflow"] == 1  # became Inf


def test_a_dense_overflow_is_refused_too(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "src", "mixtral")
    tensors = {key: value.clone() for key, value in checkpoint.form.items()}
    tensors["model.norm.weight"][3] = -1e38
    save(checkpoint.root, config_of("mixtral", checkpoint.size), tensors)
    with pytest.raises(NonFiniteValue, match=r"model\.norm\.weight"):
        convert(checkpoint.root, tmp_path / "out", dtype="fp16")
    convert(checkpoint.root, tmp_path / "dense", dtype="fp16", dense_dtype="bf16")
    found = read_all(tmp_path / "dense")
    assert found["model.norm.weight"].dtype == torch.bfloat16
    assert found["model.layers.0.block_sparse_moe.experts.2.w3.weight"].dtype == torch.float16
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


def test_nan_bits_of_copied_experts_stay(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "src", "gptoss-bf16")
    tensors = {key: value.clone().contiguous() for key, value in checkpoint.form.items()}
    name = f"{EXPERTS.format(layer=0)}.down_proj"
    bits = tensors[name].view(torch.int16)
    bits[0, 1, 2], bits[1, 2, 3], bits[2, 0, 0] = 0x7FA5, -1, 0x7F80
    save(checkpoint.root, config_of("gptoss-bf16", checkpoint.size), tensors)
    result = convert(checkpoint.root, tmp_path / "out")
    assert same_bits(read_all(tmp_path / "out")[name], tensors[name])
    assert result.manifest["experts"] == {"nan": 2, "inf": 1}
    convert(checkpoint.root, tmp_path / "wide", dtype="fp32")
    wide = read_all(tmp_path / "wide")[name].view(torch.int32)
    assert {int(wide[0, 1, 2]), int(wide[1, 2, 3])} == {0x7FC00000}


@pytest.mark.parametrize("layout", ["hf", "vllm"])
def test_two_runs_give_the_same_files(layout: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "src", "gptoss-mxfp4", Size(layers=2)).root
    ranks = {"tp": 2} if layout == "vllm" else {}
    for name in ("one", "two"):
        convert(source, tmp_path / name, layout=layout, **ranks)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
