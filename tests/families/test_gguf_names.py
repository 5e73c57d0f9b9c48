"""GGUF names: whole models that llama.cpp's converter wrote, name by name and value by value."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moeconv.dims import parse_dims
from moeconv.errors import BadSource, UnrecognizedTensor
from moeconv.families import gguf_names
from moeconv.families.base import Rule
from moeconv.families.gguf_names import (
    ARCHITECTURES,
    STORED,
    GgufArch,
    Translated,
    find_arch,
    translate,
)
from moeconv.naming import compile_pattern, format_name

CONVERTED = ("dots1", "ernie45moe", "glm4moe", "gptoss", "olmoe", "qwen2moe", "qwen3moe")
VERIFIED = [row.arch for row in ARCHITECTURES if row.verified]


def row_of(arch: str) -> GgufArch:
    return find_arch({"general.architecture": arch})


def read_model(path: Path) -> tuple[GgufArch, dict[str, torch.Tensor]]:
    """Return the row and every tensor as float32, by gguf-py alone."""
    reader = gguf.GGUFReader(path)
    row = row_of(reader.fields["general.architecture"].contents())
    return row, {
        tensor.name: torch.from_numpy(
            gguf.quants.dequantize(np.array(tensor.data), tensor.tensor_type)
        )
        for tensor in reader.tensors
    }


def stored_rule(what: Translated) -> tuple[Rule, str]:
    """Return the rule of STORED that an expert tensor's name fits, and its projection word."""
    _, _, _, rest = what.name.split(".", 3)
    base, _, part = rest.rpartition(".")
    for rule in STORED:
        words = compile_pattern(rule.pattern, {"proj": rule.projections}).fullmatch(base)
        if words and part in rule.parts:
            return rule, words["proj"]
    raise AssertionError(f"no rule for {what.name}")


def expert_matrices(
    found: Mapping[str, Translated], tensors: Mapping[str, torch.Tensor]
) -> dict[tuple[int, int, str], torch.Tensor]:
    """Return (layer, expert, "gate" or "gate.bias") -> [R, C] or [R]."""
    matrices = {}
    for name, what in found.items():
        if not what.is_expert:
            continue
        rule, word = stored_rule(what)
        assert what.layer is not None
        (projection,) = rule.projections[word]
        assert len(parse_dims(rule.dims).groups) == tensors[name].ndim
        for expert, matrix in enumerate(tensors[name]):
            matrices[what.layer, expert, projection + rule.suffix] = matrix
    return matrices


def written_experts(
    row: GgufArch, matrices: Mapping[tuple[int, int, str], torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the model's own expert tensors, by the row's rules."""
    layers = sorted({layer for layer, _, _ in matrices})
    count = 1 + max(expert for _, expert, _ in matrices)
    for rule in row.experts:
        for word, projections in rule.projections.items():
            keys = [projection + rule.suffix for projection in projections]
            for layer in layers:
                slots = [[matrices[layer, expert, key] for key in keys] for expert in range(count)]
                name = f"model.layers.{layer}.{rule.pattern}"
                if "{expert}" in rule.pattern:
                    for expert, (matrix,) in enumerate(slots):
                        yield format_name(f"{name}.weight", proj=word, expert=expert), matrix
                    continue
                dims = parse_dims(rule.dims)
                assert dims.interleaved or len(keys) == 1
                fused = torch.stack([torch.stack(slot, dim=1).flatten(0, 1) for slot in slots])
                packed = fused.transpose(1, 2) if dims.transposed else fused
                yield format_name(name, proj=word) + rule.suffix.replace(".", "_"), packed


@pytest.mark.parametrize("name", CONVERTED)
def test_a_converted_model_comes_back_whole(name: str, fixtures: Path) -> None:
    folder = f"gguf-llamacpp-{name}"
    row, tensors = read_model(fixtures / "checkpoints" / folder / "model.gguf")
    oracle = load_file(fixtures / "oracles" / folder / "model.safetensors")
    assert row.verified
    found = translate(row, tensors)
    made = {
        what.name: tensors[name][None]
        if what.one_row and tensors[name].ndim == 1
        else tensors[name]
        for name, what in found.items()
        if not what.is_expert
    }
    made.update(written_experts(row, expert_matrices(found, tensors)))
    assert set(made) == set(oracle)
    for key, expected in oracle.items():
        assert made[key].shape == expected.shape, key
        assert torch.equal(made[key], expected.float()), key


SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 40,
    "pad_token_id": 0,
}
NEEDED = {"dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}}
# How transformers calls a module while it runs -> how it is published.
PUBLISHED = {
    "ernie4_5-moe": (".mlp.gate.moe_statics.", ".mlp.moe_statics."),
    "minimax-m2": (".mlp.", ".block_sparse_moe."),
}


@pytest.mark.parametrize("arch", VERIFIED)
def test_the_model_that_transformers_builds_has_these_names(arch: str) -> None:
    """Every parameter outside of experts has one GGUF name that leads back to it, and its dtype."""
    from transformers import AutoConfig, AutoModelForCausalLM

    row = row_of(arch)
    config = AutoConfig.for_model(row.model_type, **SIZES, **NEEDED.get(arch, {}))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    modules = {module: base for base, module in gguf_names._modules(arch).items()}
    spelled = {own: plain for plain, own in gguf_names._SPELLINGS.items()}
    checked = {}
    for name, value in model.state_dict().items():
        if ".experts." in name or (".layers." in name and ".layers.1." not in name):
            continue
        name = name.replace(*PUBLISHED.get(arch, ("", "")))
        own = name.removeprefix("model.layers.1.")
        module, part = spelled.get(own, own).rsplit(".", 1)
        base = modules[module].replace("blk.0.", "blk.1.")
        (checked[name],) = translate(row, [f"{base}.{part}"]).values()
        assert checked[name].name == name
        kept = value.dtype == torch.float32
        assert checked[name].stays_f32 == (kept or name.endswith("e_score_correction_bias")), name
    assert len(checked) > 10


def test_experts_are_found_in_any_architecture() -> None:
    row = row_of("never-heard-of")
    names = ["blk.7.ffn_gate_up_exps.weight", "blk.7.ffn_down_exps.bias", "blk.7.attn_q.weight"]
    found = translate(row, names, experts_only=True)
    assert found == {
        names[0]: Translated("model.layers.7.mlp.experts.gate_up_proj.weight", 7, True),
        names[1]: Translated("model.layers.7.mlp.experts.down_proj.bias", 7, True),
    }
    rule, word = stored_rule(found[names[0]])
    assert (rule.dims, rule.projections[word]) == ("E (P R) C", ("gate", "up"))
    rule, word = stored_rule(found[names[1]])
    assert (rule.dims, rule.suffix) == ("E R", ".bias")


@pytest.mark.parametrize(
    ("arch", "said"),
    [
        ("llama", "rows of q and k are permuted"),
        ("deepseek2", "kv_b_proj"),
        ("qwen3next", "norms are stored plus one"),
        ("never-heard-of", "never compared"),
    ],
)
def test_an_unverified_architecture_is_refused_by_name(arch: str, said: str) -> None:
    with pytest.raises(BadSource, match=said) as caught:
        translate(row_of(arch), ["blk.0.attn_q.weight"])
    assert arch in caught.value.what
    assert "--experts-only" in caught.value.hint


@pytest.mark.parametrize(
    "name",
    [
        "blk.0.attn_q_a.weight",  # of another architecture
        "blk.0.ffn_gate.3.weight",  # of the time before stacked experts
        "blk.0.attn_q.scale",
        "blk.00.attn_q.weight",
        "blk.x.attn_q.weight",
        "rope_freqs.weight",
        "attn_q.weight",
        "blk.0.token_embd.weight",
        "",
    ],
)
def test_a_name_that_the_architecture_lacks_is_refused(name: str) -> None:
    with pytest.raises(UnrecognizedTensor) as caught:
        translate(row_of("qwen3moe"), [name])
    assert repr(name) in caught.value.what


@pytest.mark.parametrize(
    "metadata", [{}, {"general.architecture": ""}, {"general.architecture": 3}]
)
def test_metadata_without_an_architecture_is_refused(metadata: dict[str, object]) -> None:
    with pytest.raises(BadSource, match=r"general.architecture"):
        find_arch(metadata)


def test_no_two_rows_are_of_one_architecture() -> None:
    assert len({row.arch for row in ARCHITECTURES}) == len(ARCHITECTURES)
    assert all(row.verified != bool(row.fix) for row in ARCHITECTURES)


def test_minimax_m2_loads_in_transformers_under_these_names(tmp_path: Path) -> None:
    """transformers' own GGUF loader gives the model back that was written under our names."""
    from transformers import AutoModelForCausalLM, MiniMaxM2Config
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = MiniMaxM2Config(
        num_hidden_layers=2, hidden_size=32, intermediate_size=24, head_dim=16, vocab_size=40,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value.copy_(torch.randn(value.shape))
    model.save_pretrained(tmp_path / "hf")
    published = load_file(tmp_path / "hf" / "model.safetensors")
    row = row_of("minimax-m2")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", row.arch)
    writer.add_string("general.name", "tiny")
    for name, values in _as_gguf(row, published).items():
        writer.add_tensor(name, values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = load_gguf_checkpoint(tmp_path / "model.gguf", return_tensors=True, model_to_load=model)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded["tensors"][key], value), key


def _as_gguf(row: GgufArch, published: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors under the GGUF names that `translate` leads back to theirs."""
    made: dict[str, torch.Tensor] = {}
    for layer in (0, 1):
        for word, base in (("w1", "ffn_gate"), ("w3", "ffn_up"), ("w2", "ffn_down")):
            pattern = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
            stacked = [published[pattern.format(layer, expert, word)] for expert in range(4)]
            made[f"blk.{layer}.{base}_exps.weight"] = torch.stack(stacked)
    bases = gguf_names._modules(row.arch)
    candidates = [
        name.replace("blk.0.", f"blk.{layer}.")
        for base in bases
        for part in ("weight", "bias")
        for name in (f"{base}.{part}",)
        for layer in (0, 1)
    ]
    for name, what in translate(row, dict.fromkeys(candidates)).items():
        if what.name in published:
            made[name] = published[what.name]
    assert len(made) == sum(".experts." not in name for name in published) + 6
    return made


def test_the_fixtures_of_llama_quantize_translate(fixtures: Path) -> None:
    for name in ("gguf-gptoss-mxfp4", "gguf-qwen3moe-q4_k_m"):
        folder = fixtures / "checkpoints" / name
        row, tensors = read_model(folder / "model.gguf")
        config = json.loads((folder / "hf_config.json").read_text())
        assert row.model_type == config["model_type"]
        assert len({what.name for what in translate(row, tensors).values()}) == len(tensors)
