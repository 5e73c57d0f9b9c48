"""All ranks put together again are the model: any split, any placement, dividing or not.

The putting together is written from vLLM's side of the contract, without the layout's own code.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

import moeconv.api as api
from moeconv.errors import Refused
from moeconv.resources import Resources
from tests.checkpoints import (
    KINDS,
    Checkpoint,
    Size,
    Tensors,
    bits,
    quick_directory,
    read_all,
    same_bits,
    write_checkpoint,
)

PREFIX = {"mixtral": "block_sparse_moe.experts", "qwen3moe": "mlp.experts"}
QUICK = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@st.composite
def splits(draw: st.DrawFn) -> tuple[str, Size, dict[str, Any], int]:
    """Return kind, sizes, options and jobs that go together."""
    kind = draw(st.sampled_from(KINDS))
    tp, dp = draw(st.sampled_from([1, 2, 3, 4, 6])), draw(st.sampled_from([1, 1, 2, 3]))
    ranks, ep = tp * dp, draw(st.booleans())
    kv = draw(st.sampled_from([n for n in (1, 2, 3, 4, 6, 12) if not (tp % n and n % tp)]))
    heads = kv * tp * draw(st.integers(1, 2))
    padded = 64 * draw(st.sampled_from([n for n in (1, 2, 3, 4, 6) if n * 64 % tp == 0]))
    grain = 32 if kind == "gptoss-mxfp4" else 1
    intermediate = grain * draw(st.integers(1, 4 if grain > 1 else 50))
    hidden = grain * draw(st.integers(1, 4 if grain > 1 else 50))
    if draw(st.booleans()):
        hidden = 2 * intermediate  # w13 is square: nothing but the table says which side is which
    experts = draw(st.integers(1, 7))
    options: dict[str, Any] = {"tp": tp, "dp": dp, "uneven": "pad", "ep": ep}
    if ep:
        experts = expert_options(draw, options, experts, ranks, even=kind.startswith("gptoss"))
    if draw(st.booleans()):
        options["pad_intermediate"] = draw(st.sampled_from([1, 7, 64]))
    if draw(st.booleans()):
        options["pad_hidden"] = draw(st.sampled_from([1, 5, 48]))
    size = Size(
        draw(st.integers(1, 2)),
        hidden,
        intermediate,
        experts,
        heads,
        kv,
        draw(st.sampled_from([1, 2, 6])),
        padded - draw(st.integers(0, 63)),
    )
    return kind, size, options, draw(st.sampled_from([1, 2, 7]))


def expert_options(
    draw: st.DrawFn, options: dict[str, Any], experts: int, ranks: int, *, even: bool
) -> int:
    """Add how experts are placed; return how many there are."""
    if even:
        experts = ranks * draw(st.integers(1, 2))
    how = draw(st.sampled_from(["linear", "round-robin", "redundant", "map"]))
    if how == "redundant":
        options["redundant_experts"] = -experts % ranks + ranks * draw(st.integers(0, 1))
    elif how == "map":
        rows = [draw(st.lists(st.integers(0, experts - 1), max_size=3)) for _ in range(ranks)]
        for expert in range(experts):
            if not any(expert in row for row in rows):
                rows[draw(st.integers(0, ranks - 1))].append(expert)
        options["expert_map"] = tuple(tuple(row) for row in rows)
    else:
        options["placement"] = how
    return experts


@QUICK
@given(splits())
def test_ranks_together_are_the_model(made: tuple[str, Size, dict[str, Any], int]) -> None:
    kind, size, options, jobs = made
    with quick_directory() as directory:
        checkpoint = write_checkpoint(directory / "src", kind, size)
        plan = api.plan(checkpoint.root, directory / "out", layout="vllm", **options)
        result = api.convert(plan, directory / "out", resources=Resources(jobs=jobs))
        ranks = options["tp"] * options["dp"]
        outputs = [
            read_all(directory / "out", f"model-rank-{rank}-part-*.safetensors")
            for rank in range(ranks)
        ]
        assert len(list((directory / "out").glob("*.safetensors"))) == ranks
    owners = owners_of(options, size.experts, ranks)
    note(f"owners {owners}")
    assert result.manifest["layout_facts"]["experts"] == owners
    for layer in range(size.layers):
        if options["ep"]:
            check_placed(kind, checkpoint, layer, outputs, (owners, options))
        else:
            check_split(kind, checkpoint, layer, outputs, options)
        check_attention(kind, checkpoint, layer, outputs, options["tp"])
    check_whole(kind, checkpoint, outputs, options["tp"])


def owners_of(options: dict[str, Any], experts: int, ranks: int) -> list[list[int]]:
    """Return the experts of each rank."""
    if not options["ep"]:
        return [list(range(experts))] * ranks
    if "expert_map" in options:
        return [list(row) for row in options["expert_map"]]
    if options.get("placement") == "round-robin":
        return [[e for e in range(experts) if e % ranks == rank] for rank in range(ranks)]
    physical = [e % experts for e in range(experts + options.get("redundant_experts", 0))]
    return [part.tolist() for part in np.array_split(np.array(physical, int), ranks)]


def routed(kind: str, layer: int, what: str) -> str:
    return f"model.layers.{layer}.{PREFIX.get(kind, 'mlp.experts')}.routed_experts.{what}"


def round_up(extent: int, multiple: int | None) -> int:
    return -(-extent // multiple) * multiple if multiple else extent


def halves(kind: str, fused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return gate and up of an expert's w13 (or its bias): gpt-oss' take turns."""
    if kind.startswith("gptoss"):
        return fused[0::2], fused[1::2]
    return fused[: fused.shape[0] // 2], fused[fused.shape[0] // 2 :]


def inner(tensor: torch.Tensor, *shape: int) -> torch.Tensor:
    """Return the first rows and columns, having checked that all others are +0."""
    rest = tensor.clone()
    kept = tensor[tuple(slice(0, extent) for extent in shape)]
    rest[tuple(slice(0, extent) for extent in shape)] = 0
    assert not bits(rest).any()
    return kept


def check_split(
    kind: str, checkpoint: Checkpoint, layer: int, outputs: list[Tensors], options: dict[str, Any]
) -> None:
    """Without --ep every rank holds a piece of every expert's intermediate axis."""
    size, ranks = checkpoint.size, len(outputs)
    per = -(-size.intermediate // ranks)
    wide = round_up(per, options.get("pad_intermediate"))
    tall = round_up(size.hidden, options.get("pad_hidden"))
    found: dict[tuple[int, str], list[torch.Tensor]] = {}
    for rank, tensors in enumerate(outputs):
        have = min(max(size.intermediate - rank * per, 0), per)
        w13, w2 = (tensors[routed(kind, layer, name)] for name in ("w13_weight", "w2_weight"))
        assert w13.shape == (size.experts, 2 * wide, tall)
        assert w2.shape == (size.experts, tall, wide)
        for expert in range(size.experts):
            for name, half in zip(("gate", "up"), halves(kind, w13[expert]), strict=True):
                found.setdefault((expert, name), []).append(inner(half, have, size.hidden))
            found.setdefault((expert, "down"), []).append(inner(w2[expert], size.hidden, have))
            if kind.startswith("gptoss"):
                bias = tensors[routed(kind, layer, "w13_bias")][expert]
                for name, half in zip(("gate.bias", "up.bias"), halves(kind, bias), strict=True):
                    found.setdefault((expert, name), []).append(inner(half, have))
                down = tensors[routed(kind, layer, "w2_bias")][expert]
                assert down.shape == (tall,)
                expected = checkpoint.experts[layer, expert, "down.bias"]
                expected = expected if rank == 0 else torch.zeros_like(expected)
                assert same_bits(inner(down, size.hidden), expected)
    for (expert, name), pieces in found.items():
        together = torch.cat(pieces, dim=1 if name == "down" else 0)
        assert same_bits(together, checkpoint.experts[layer, expert, name]), (expert, name)


def check_placed(
    kind: str,
    checkpoint: Checkpoint,
    layer: int,
    outputs: list[Tensors],
    placed: tuple[list[list[int]], dict[str, Any]],
) -> None:
    """With --ep every slot of a rank is a whole expert."""
    owners, options = placed
    size = checkpoint.size
    wide = round_up(size.intermediate, options.get("pad_intermediate"))
    tall = round_up(size.hidden, options.get("pad_hidden"))
    assert {expert for row in owners for expert in row} == set(range(size.experts))
    for tensors, row in zip(outputs, owners, strict=True):
        w13, w2 = (tensors[routed(kind, layer, name)] for name in ("w13_weight", "w2_weight"))
        assert w13.shape == (len(row), 2 * wide, tall)
        assert w2.shape == (len(row), tall, wide)
        for slot, expert in enumerate(row):
            gate, up = halves(kind, w13[slot])
            pairs = [("gate", inner(gate, size.intermediate, size.hidden))]
            pairs.append(("up", inner(up, size.intermediate, size.hidden)))
            pairs.append(("down", inner(w2[slot], size.hidden, size.intermediate)))
            if kind.startswith("gptoss"):
                bias = halves(kind, tensors[routed(kind, layer, "w13_bias")][slot])
                pairs.append(("gate.bias", inner(bias[0], size.intermediate)))
                pairs.append(("up.bias", inner(bias[1], size.intermediate)))
                down = tensors[routed(kind, layer, "w2_bias")][slot]
                pairs.append(("down.bias", inner(down, size.hidden)))
            for name, tensor in pairs:
                assert same_bits(tensor, checkpoint.experts[layer, expert, name]), (expert, name)


def check_attention(
    kind: str, checkpoint: Checkpoint, layer: int, outputs: list[Tensors], tp: int
) -> None:
    """q by heads; k and v by heads, or each head on tp / kv ranks; o by columns."""
    size, dense = checkpoint.size, checkpoint.dense
    source = f"model.layers.{layer}.self_attn"
    target = f"model.layers.{layer}.{'attn' if kind.startswith('gptoss') else 'self_attn'}"
    d, q, kv = size.head_dim, size.heads // tp * size.head_dim, max(size.kv_heads // tp, 1)
    parts = ["weight", "bias"] if kind.startswith("gptoss") else ["weight"]
    for part in parts:
        for rank, tensors in enumerate(outputs):
            fused = tensors[f"{target}.qkv_proj.{part}"]
            first = rank % tp
            whole = dense[f"{source}.q_proj.{part}"]
            pieces = [whole[first * q : (first + 1) * q]]
            head = first * kv if size.kv_heads >= tp else first // (tp // size.kv_heads)
            for name in ("k", "v"):
                whole = dense[f"{source}.{name}_proj.{part}"]
                pieces.append(whole[head * d : (head + kv) * d])
            assert same_bits(fused, torch.cat(pieces))
    for group in range(0, len(outputs), tp):
        shards = [tensors[f"{target}.o_proj.weight"] for tensors in outputs[group : group + tp]]
        assert same_bits(torch.cat(shards, dim=1), dense[f"{source}.o_proj.weight"])
        if kind.startswith("gptoss"):
            sinks = [tensors[f"{target}.sinks"] for tensors in outputs[group : group + tp]]
            assert same_bits(torch.cat(sinks), dense[f"{source}.sinks"])
    one = torch.tensor(1.0)
    for tensors in outputs:
        for name in "q", "k", "v", "prob":
            assert same_bits(tensors[f"{target}.attn._{name}_scale"], one)
        if kind.startswith("gptoss"):
            assert same_bits(tensors[f"{target}.o_proj.bias"], dense[f"{source}.o_proj.bias"])


def check_whole(kind: str, checkpoint: Checkpoint, outputs: list[Tensors], tp: int) -> None:
    """The vocabulary in rows, zeros after it; norms and routers whole; nothing else."""
    dense, size = checkpoint.dense, checkpoint.size
    embedding = "model.embedding.weight" if kind.startswith("gptoss") else ""
    names = {"lm_head.weight": "lm_head.weight"}
    names["model.embed_tokens.weight"] = embedding or "model.embed_tokens.weight"
    for group in range(0, len(outputs), tp):
        for source, target in names.items():
            shards = [tensors[target] for tensors in outputs[group : group + tp]]
            rows = torch.cat(shards)
            assert rows.shape[0] == round_up(size.vocab, 64)
            assert same_bits(inner(rows, size.vocab, size.hidden), dense[source])
    whole = [name for name in dense if "norm" in name or "router" in name or ".gate." in name]
    for name in whole:
        target = name.replace("mlp.gate", "mlp.experts.gate")
        assert all(same_bits(tensors[target], dense[name]) for tensors in outputs)
    gptoss, qwen = kind.startswith("gptoss"), kind == "qwen3moe"
    per_layer = 5 + 4 + 2 + (6 if gptoss else 0) + (2 if qwen else 0)
    assert all(len(tensors) == 3 + per_layer * size.layers for tensors in outputs)


def plan_of(kind: str = "mixtral", size: Size | None = None, **options: Any) -> Any:
    with tempfile.TemporaryDirectory() as name:
        root = write_checkpoint(Path(name) / "src", kind, size).root
        return api.plan(root, layout="vllm", **options)


REFUSED = [
    ({"tp": 3}, {"vocab": 192}, "attention heads"),
    ({"tp": 3}, {"heads": 6, "kv_heads": 3}, r"96 rows, padded to 128, .* --tp 3"),
    ({"tp": 2}, {"heads": 6, "kv_heads": 3}, "neither divides"),
    ({"tp": 4}, {"intermediate": 66}, "intermediate size 66"),
    ({"tp": 3}, {"heads": 3, "kv_heads": 1, "vocab": 192}, "size 64 is not divided by 3"),
    ({"dp": 3}, {}, "not divided by 3"),
    ({"ep": True, "dp": 3, "redundant_experts": 1}, {}, "redundant"),
    ({"ep": True, "dp": 2, "expert_map": ((0, 1, 2, 3),)}, {}, "expert-map"),
    ({"ep": True, "dp": 2, "expert_map": ((0, 1, 2), (2,))}, {}, r"leaves out experts \[3\]"),
    ({"ep": True, "dp": 2, "expert_map": ((0, 1, 2, 3), (4,))}, {}, r"unknown ones \[4\]"),
    ({"placement": "round-robin"}, {}, "needs --ep"),
    ({"redundant_experts": 4}, {}, "needs --ep"),
    ({"expert_map": ((0, 1, 2, 3),)}, {}, "needs --ep"),
    ({"ranks": (1,)}, {}, "names rank 1"),
    ({"ranks": (-1,)}, {}, "names rank -1"),
    ({"dtype": "int4"}, {}, "cannot write"),
]


@pytest.mark.parametrize(("options", "size", "message"), REFUSED)
def test_what_ranks_cannot_hold_is_refused(
    options: dict[str, Any], size: dict[str, int], message: str
) -> None:
    with pytest.raises(Refused, match=message) as caught:
        plan_of(size=Size()._replace(**size), **options)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("options", [{"tp": 2, "ep": True}, {"dp": 4, "ep": True}])
def test_gptoss_needs_ranks_that_divide_its_experts(options: dict[str, Any]) -> None:
    with pytest.raises(Refused, match="5 experts"):
        plan_of("gptoss-bf16", Size(experts=5), **options)
    plan_of("mixtral", Size(experts=5), **options)
    plan_of("gptoss-bf16", Size(experts=5), experts_only=True, **options)


def test_plain_names(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "src", "qwen3moe").root
    names = {}
    for kind in ("routed", "plain"):
        plan = api.plan(root, layout="vllm", vllm_names=kind)
        api.convert(plan, tmp_path / kind)
        names[kind] = set(read_all(tmp_path / kind))
    changed = {name for name in names["plain"] if name not in names["routed"]}
    assert changed == {
        "model.layers.0.mlp.experts.w13_weight",
        "model.layers.0.mlp.experts.w2_weight",
        "model.layers.0.mlp.gate.weight",
    }


def test_experts_only_may_be_uneven(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "src", "gptoss-mxfp4")
    plan = api.plan(checkpoint.root, layout="vllm", tp=3, experts_only=True)
    api.convert(plan, tmp_path / "out")
    outputs = [read_all(tmp_path / "out", f"model-rank-{rank}-*") for rank in range(3)]
    check_split("gptoss-mxfp4", checkpoint, 0, outputs, {})
    assert {len(tensors) for tensors in outputs} == {4}
