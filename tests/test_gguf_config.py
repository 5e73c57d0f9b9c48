"""Configs made from GGUF metadata, against the configs the models were converted from."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from moeconv.errors import BadSource, MoeconvError
from moeconv.families.gguf_names import ARCHITECTURES
from moeconv.gguf_config import _ROWS, config_from_metadata
from moeconv.store.gguf_header import read_header
from moeconv.types import TensorRef

MODELS = sorted((Path(__file__).parent / "fixtures" / "checkpoints").glob("gguf-*"))
# What no GGUF file says, and no loader needs: written by transformers, or of training.
UNSAID = {
    "attention_dropout",
    "initializer_range",
    "output_router_logits",
    "router_aux_loss_coef",
    "transformers_version",
    "use_cache",
}
TOKENS = {"bos_token_id", "eos_token_id", "pad_token_id"}  # a converted file without a vocabulary


def made_from(folder: Path) -> dict[str, Any]:
    header = read_header(folder / "model.gguf", "model.gguf")
    config = config_from_metadata(header.metadata, {ref.name: ref for ref in header.tensors})
    assert config is not None
    return config


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_transformers_understands_the_original_config(folder: Path) -> None:
    """Both configs through transformers' class, which fills in its defaults: nothing differs."""
    from transformers import AutoConfig

    original = json.loads((folder / "hf_config.json").read_text())
    made = made_from(folder)
    assert made["model_type"] == original["model_type"]
    expected = AutoConfig.for_model(**original).to_dict()
    found = AutoConfig.for_model(**json.loads(json.dumps(made))).to_dict()
    skipped = UNSAID | (TOKENS if "llamacpp" in folder.name else set())
    if folder.name == "gguf-llamacpp-qwen3moe":
        skipped.add("norm_topk_prob")  # llama.cpp always normalizes, this model never was for it
    differing = {
        key: (found.get(key), value)
        for key, value in expected.items()
        if key not in skipped and found.get(key) != value
    }
    assert differing == {}


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_the_config_says_what_older_loaders_read(folder: Path) -> None:
    made = made_from(folder)
    original = json.loads((folder / "hf_config.json").read_text())
    assert made["rope_theta"] == original["rope_parameters"]["rope_theta"]
    assert made["architectures"] == original["architectures"]
    assert ("rope_scaling" in made) == (original["rope_parameters"]["rope_type"] != "default")


def test_there_is_a_config_for_every_verified_architecture() -> None:
    assert set(_ROWS) == {row.arch for row in ARCHITECTURES if row.verified}


METADATA: dict[str, Any] = {
    "general.architecture": "minimax-m2",
    "minimax-m2.block_count": 62,
    "minimax-m2.context_length": 196608,
    "minimax-m2.embedding_length": 3072,
    "minimax-m2.feed_forward_length": 1536,
    "minimax-m2.attention.head_count": 48,
    "minimax-m2.attention.head_count_kv": 8,
    "minimax-m2.attention.key_length": 128,
    "minimax-m2.attention.layer_norm_rms_epsilon": 9.999999974752427e-07,
    "minimax-m2.expert_count": 256,
    "minimax-m2.expert_used_count": 8,
    "minimax-m2.rope.dimension_count": 64,
    "minimax-m2.rope.freq_base": 5000000.0,
}
TENSORS = {
    "token_embd.weight": TensorRef("token_embd.weight", "F32", (200064, 3072), "f", 0, 0),
    "output.weight": TensorRef("output.weight", "F32", (200064, 3072), "f", 0, 0),
}


def changed(**changes: Any) -> dict[str, Any]:
    keys = {f"minimax-m2.{key.replace('__', '.')}": value for key, value in changes.items()}
    return {**METADATA, **keys}


def test_minimax_m2_by_hand() -> None:
    from transformers import AutoConfig

    made = config_from_metadata(METADATA, TENSORS)
    assert made is not None
    assert made["num_hidden_layers"] == 62
    assert made["num_local_experts"] == 256
    assert made["rms_norm_eps"] == 1e-06
    assert made["rotary_dim"] == 64
    assert made["rope_parameters"] == {
        "rope_type": "default",
        "partial_rotary_factor": 0.5,
        "rope_theta": 5000000.0,
    }
    assert made["vocab_size"] == 200064
    assert made["tie_word_embeddings"] is False
    config = AutoConfig.for_model(**made)
    assert config.rope_parameters["partial_rotary_factor"] == 0.5


def test_embeddings_are_tied_where_there_is_no_output() -> None:
    tensors = {"token_embd.weight": TENSORS["token_embd.weight"]}
    made = config_from_metadata(METADATA, tensors)
    assert made is not None
    assert made["tie_word_embeddings"] is True


@pytest.mark.parametrize(
    ("key", "value", "field", "expected"),
    [
        ("attention__head_count_kv", None, "num_key_value_heads", 48),
        ("attention__key_length", None, "head_dim", 64),
        ("attention__head_count_kv", [8] * 62, "num_key_value_heads", 8),
        ("nextn_predict_layers", 3, "num_hidden_layers", 59),
        ("rope__freq_base", 10000019.0, "rope_theta", 10000019.0),
        ("rope__freq_base", 0.1, "rope_theta", 0.1),
        ("rope__freq_base", None, "rope_theta", 10000.0),
        ("attention__layer_norm_rms_epsilon", 9.999999747378752e-06, "rms_norm_eps", 1e-05),
    ],
)
def test_values_are_taken_as_meant(key: str, value: Any, field: str, expected: Any) -> None:
    made = config_from_metadata(changed(**{key: value}), TENSORS)
    assert made is not None
    assert made[field] == expected


BROKEN: tuple[tuple[str, Any], ...] = (
    ("block_count", None),
    ("block_count", 0),
    ("block_count", "many"),
    ("nextn_predict_layers", 62),
    ("nextn_predict_layers", [1, 2]),
    ("embedding_length", None),
    ("embedding_length", "3072"),
    ("attention__head_count", None),
    ("attention__head_count", 0),
    ("attention__head_count", [48, 0]),
    ("attention__head_count", []),
    ("attention__head_count_kv", [8, 0, 8]),
    ("attention__layer_norm_rms_epsilon", math.nan),
    ("attention__layer_norm_rms_epsilon", math.inf),
    ("expert_count", None),
    ("expert_count", {"a": 1}),
    ("rope__freq_base", "10000"),
    ("rope__freq_base", -math.inf),
    ("rope__dimension_count", "64"),
)


@pytest.mark.parametrize(("key", "value"), BROKEN)
def test_metadata_that_makes_no_sense_is_refused(key: str, value: Any) -> None:
    with pytest.raises(BadSource) as caught:
        config_from_metadata(changed(**{key: value}), TENSORS)
    assert key.replace("__", ".") in caught.value.what or "block_count" in caught.value.what
    assert "--config" in caught.value.hint


def test_no_embedding_is_refused() -> None:
    with pytest.raises(BadSource, match=r"token_embd.weight"):
        config_from_metadata(METADATA, {})


@pytest.mark.parametrize("arch", ["llama", "future", "", 7, None])
def test_an_unknown_architecture_has_no_config(arch: Any) -> None:
    assert config_from_metadata({**METADATA, "general.architecture": arch}, TENSORS) is None


@pytest.mark.parametrize("value", [None, 0, -1, 2**63, 0.5, "x", "", True, [], [1], [[1]], {}])
@pytest.mark.parametrize("key", sorted(METADATA))
def test_any_value_gives_a_config_or_an_error(key: str, value: Any) -> None:
    try:
        made = config_from_metadata({**METADATA, key: value}, TENSORS)
    except MoeconvError:
        return
    assert made is None or json.dumps(made, allow_nan=False)
