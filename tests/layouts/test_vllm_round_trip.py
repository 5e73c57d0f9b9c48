"""hf -> vllm -> put together again is the source, for every architecture with a table.

Put together from what vLLM's modules mean, without the layout's tables: names are guessed back
from the parameters, and every tensor of the source must come out.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import moeconv.api as api
from moeconv.layouts.vllm_tables import ARCHITECTURES

STATES = Path(__file__).parents[1] / "fixtures" / "vllm"
QUANTIZED = ("qwen3_moe_fp8", "qwen3_moe_fp8_refined", "gpt_oss_mxfp4")
NAMES = sorted(
    path.parent.name for path in STATES.glob("*/hf") if path.parent.name not in QUANTIZED
)
SPLITS = [(1, False), (2, False), (2, True), (4, False), (4, True)]
Tensors = dict[str, torch.Tensor]

# Parameter -> the source's tensors that lie in it one after another, where names differ.
JOINED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
COLUMNS = re.compile(r"\.(o_proj|down_proj|out_proj)\.weight$")
VOCAB = re.compile(r"(embed_tokens|embedding|lm_head)\.weight$")
ROWS = re.compile(r"\.(q_b_proj|kv_b_proj|mla_attn\.q_proj|A_log|dt_bias|sinks)(\.|$)")


class Together:
    """All ranks' tensors of one model -> the source's tensors."""

    def __init__(self, ranks: list[Tensors], source: Tensors, config: dict[str, Any]) -> None:
        self.ranks = ranks
        self.tp = len(ranks)
        self.source = source
        self.text = config.get("text_config", config)
        self.found: Tensors = {}

    def parts(self, key: str) -> list[torch.Tensor]:
        return [tensors[key] for tensors in self.ranks]

    def keep(self, name: str, value: torch.Tensor) -> None:
        """Remember a tensor under the first spelling of its name that the source has."""
        for spelling in spellings(name):
            if spelling in self.source:
                assert spelling not in self.found
                self.found[spelling] = value
                return
        raise AssertionError(f"{name} is nothing of the source's")

    def restore(self) -> Tensors:
        for key in self.ranks[0]:
            name = key.removeprefix("language_model.")
            if "routed_experts.w" in name:
                self.experts(key, name)
            elif not name.endswith("_scale"):
                self.plain(key, name)
        return self.found

    def plain(self, key: str, name: str) -> None:
        module = name.rsplit(".", 2)[-2]
        if module in JOINED:
            self.joined(key, name, module)
        elif VOCAB.search(name):
            rows = torch.cat(self.parts(key))
            assert not rows[self.text["vocab_size"] :].any()
            self.keep(name, rows[: self.text["vocab_size"]])
        elif COLUMNS.search(name):
            self.keep(name, torch.cat(self.parts(key), dim=1))
        elif ROWS.search(name) or (self.source_is_wider(name) and module == "q_norm"):
            self.keep(name, torch.cat(self.parts(key)))
        elif self.source_is_wider(name) and module == "k_norm":
            self.keep(name, torch.cat(self.parts(key)[:: self.sharers]))
        elif module == "conv1d":
            self.keep(name, self.sections(key, self.linear[:3]))
        else:
            first, *others = self.parts(key)
            assert all(torch.equal(first, other) for other in others), key
            self.keep(name, first)

    @property
    def sharers(self) -> int:
        """Return how many ranks hold the same key/value head."""
        return max(1, self.tp // self.text["num_key_value_heads"])

    @property
    def linear(self) -> tuple[int, ...]:
        """Return the rows of queries, keys, values and gates of linear attention."""
        text = self.text
        keys = text["linear_num_key_heads"] * text["linear_key_head_dim"]
        values = text["linear_num_value_heads"] * text["linear_value_head_dim"]
        return keys, keys, values, values

    def source_is_wider(self, name: str) -> bool:
        """Return whether norms of q and k are per head of the whole model (and not OLMoE's)."""
        return "norm" in name and self.text["model_type"] == "minimax_m2"

    def sections(self, key: str, sizes: tuple[int, ...]) -> torch.Tensor:
        """Return sections of rows, each of which every rank holds a share of."""
        split = [part.split([size // self.tp for size in sizes]) for part in self.parts(key)]
        return torch.cat([piece for section in zip(*split, strict=True) for piece in section])

    def joined(self, key: str, name: str, module: str) -> None:
        names = [name.replace(f".{module}.", f".{one}.") for one in JOINED[module]]
        rows = [self.rows_of(one) for one in names]
        if module == "fused_qkv_a_proj":
            for one, value in zip(names, self.parts(key)[0].split(rows), strict=True):
                self.keep(one, value)
            assert all(torch.equal(self.parts(key)[0], part) for part in self.parts(key))
        elif module == "in_proj_qkvz":
            whole = self.sections(key, self.linear)
            for one, value in zip(names, whole.split(rows), strict=True):
                self.keep(one, value)
        else:
            shares = [
                self.tp // self.sharers if "k_proj" in n or "v_proj" in n else self.tp
                for n in names
            ]
            sizes = [size // share for size, share in zip(rows, shares, strict=True)]
            split = [part.split(sizes) for part in self.parts(key)]
            for one, share, column in zip(names, shares, zip(*split, strict=True), strict=True):
                self.keep(one, torch.cat(column[:: self.tp // share]))

    def rows_of(self, name: str) -> int:
        return next(self.source[one].shape[0] for one in spellings(name) if one in self.source)

    def experts(self, key: str, name: str) -> None:
        """Put the experts of all ranks together: slices of all, or whole ones one rank after
        another."""
        parts = self.parts(key)
        count = self.text.get("num_local_experts") or self.text.get("num_experts")
        count = count or self.text["n_routed_experts"]
        whole = self.tp > 1 and sum(len(part) for part in parts) == count
        layer, kind = name.split(".routed_experts.")
        gptoss = self.text["model_type"] == "gpt_oss"
        if kind == "w2_bias":
            value = torch.cat(parts) if whole else parts[0]
            assert whole or not any(part.any() for part in parts[1:])
            self.keep(f"{layer}.down_proj_bias", value)
            return
        if kind == "w2_weight":
            value = torch.cat(parts, dim=0 if whole else 2)
            self.write(layer, "down", value.transpose(1, 2) if gptoss else value)
            return
        if gptoss:  # gate and up in turn: a slice of rows keeps pairs together
            value = torch.cat(parts, dim=0 if whole else 1)
            ending = "gate_up_proj" + ("_bias" if kind == "w13_bias" else "")
            self.keep(f"{layer}.{ending}", value if value.dim() == 2 else value.transpose(1, 2))
            return
        halves = [
            torch.cat(half, dim=0 if whole else 1)
            for half in zip(*(part.chunk(2, dim=1) for part in parts), strict=True)
        ]
        if f"{layer}.gate_up_proj" in self.source or any(
            one in self.source for one in spellings(f"{layer}.gate_up_proj")
        ):
            self.keep(f"{layer}.gate_up_proj", torch.cat(halves, dim=1))
        else:
            self.write(layer, "gate", halves[0])
            self.write(layer, "up", halves[1])

    def write(self, layer: str, projection: str, value: torch.Tensor) -> None:
        """Remember all experts of a layer, packed or one by one as the source has them."""
        packed = f"{layer}.{projection}_proj"
        if any(one in self.source for one in spellings(packed)):
            self.keep(packed, value)
            return
        word = {"gate": "w1", "up": "w3", "down": "w2"}[projection]
        for expert, matrix in enumerate(value):
            plain = f"{layer}.{expert}.{projection}_proj.weight"
            is_plain = any(one in self.source for one in spellings(plain))
            self.keep(plain if is_plain else f"{layer}.{expert}.{word}.weight", matrix)


def spellings(name: str) -> list[str]:
    """Return the source's possible names of what vLLM calls `name`."""
    name = name.replace(".mla_attn.", ".").replace("model.embedding.", "model.embed_tokens.")
    name = name.replace(".attn.", ".self_attn.")
    name = name.replace("experts._shared_experts._layer.expert_gate", "shared_expert_gate")
    name = name.replace(".experts.gate.", ".gate.")
    name = name.replace(".experts.routed_experts.e_score", ".gate.e_score")
    shared = "experts._shared_experts._layer."
    names = [name.replace(shared, word) for word in ("shared_experts.", "shared_expert.")]
    names = list(dict.fromkeys(names))
    wrapped = [one.replace("model.", "model.language_model.", 1) for one in names]
    return names + [one for one in wrapped if one.startswith("model.language_model.")]


def expected_of(source: Tensors, config: dict[str, Any]) -> Tensors:
    """Return the tensors that vLLM's state holds: no MTP layers, no vision, no tied head."""
    text = config.get("text_config", config)
    layers = text["num_hidden_layers"]
    expected = {}
    for name, value in source.items():
        layer = re.search(r"layers\.(\d+)\.", name)
        if name.startswith("mtp.") or ".visual." in name or (layer and int(layer[1]) >= layers):
            continue
        if config.get("tie_word_embeddings") and name == "model.embed_tokens.weight":
            name = "lm_head.weight"
        expected[name] = value
    return expected


def cases() -> list[tuple[str, int, bool]]:
    """Return every model with every split that its heads allow."""
    found = []
    for name in NAMES:
        config = json.loads((STATES / name / "hf" / "config.json").read_text())
        text = config.get("text_config", config)
        heads = text.get("linear_num_key_heads", text["num_attention_heads"])
        found += [(name, tp, ep) for tp, ep in SPLITS if heads % tp == 0]
    return found


@pytest.mark.parametrize(("name", "tp", "ep"), cases())
def test_put_together_it_is_the_source(name: str, tp: int, ep: bool, tmp_path: Path) -> None:
    root = STATES / name / "hf"
    config = json.loads((root / "config.json").read_text())
    text = config.get("text_config", config)
    uneven = "pad" if text["model_type"] == "gpt_oss" and tp > 2 else "refuse"
    out = tmp_path / "out"
    api.convert(api.plan(root, out, layout="vllm", tp=tp, ep=ep, uneven=uneven), out)
    ranks = [load_file(out / f"model-rank-{rank}-part-0.safetensors") for rank in range(tp)]
    expected = expected_of(load_file(root / "model.safetensors"), config)
    found = Together(ranks, expected, config).restore()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value.to(found[key].dtype)), key


def test_every_table_is_put_together() -> None:
    families = {
        json.loads((STATES / name / "hf" / "config.json").read_text())["model_type"]
        for name in NAMES
    }
    for architecture in ARCHITECTURES:
        names = {*architecture.families, *(f"{one}_text" for one in architecture.families)}
        assert names & families, architecture.name
