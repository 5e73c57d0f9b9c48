"""GGUF tensor names -> the names of the model's Hugging Face form, through gguf-py's own name map.

A converter to GGUF maps each module's name to one of ggml's (`self_attn.q_proj` -> `attn_q`); the
map is not one to one, so a row lists the modules that its model has, and the map turned around
over those is exact. Value changes that a converter makes (rotated rows, norms plus one) are in no
map: an architecture is `verified` only where the converter was seen to change none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import NamedTuple

from moeconv.errors import BadSource, UnrecognizedTensor
from moeconv.families.base import GATE_UP_DOWN, PACKED, W123, Rule
from moeconv.types import Json

_TOP = ("model.embed_tokens", "model.norm", "lm_head")
_ATTENTION = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
)
_QK_NORM = ("self_attn.q_norm", "self_attn.k_norm")
_DENSE_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_ROUTER = ("mlp.gate",)
_ROUTER_BIAS = ("mlp.gate.e_score_correction",)
_SHARED = (
    "mlp.shared_experts.gate_proj",
    "mlp.shared_experts.up_proj",
    "mlp.shared_experts.down_proj",
)
_SHARED_ONE = (
    "mlp.shared_expert.gate_proj",
    "mlp.shared_expert.up_proj",
    "mlp.shared_expert.down_proj",
    "mlp.shared_expert_gate",
)
_SINKS = ("self_attn.sinks",)
_MTP = (
    "eh_proj",
    "enorm",
    "hnorm",
    "embed_tokens",
    "shared_head.head",
    "shared_head.norm",
)

_PER_EXPERT = (Rule("mlp.experts.{expert}.{proj}", "R C", GATE_UP_DOWN),)
_PER_EXPERT_W123 = (Rule("block_sparse_moe.experts.{expert}.{proj}", "R C", W123),)
_PACKED_GPT_OSS = (
    Rule("mlp.experts.{proj}", "E C (R P)", PACKED, parts=("weight",)),
    Rule("mlp.experts.{proj}", "E (R P)", PACKED, suffix=".bias", parts=("bias",)),
)

# How a GGUF file stores experts, under the translated names: stacked, one projection each.
STORED: tuple[Rule, ...] = (
    Rule("mlp.experts.{proj}", "E R C", GATE_UP_DOWN, parts=("weight",)),
    Rule("mlp.experts.{proj}", "E (P R) C", {"gate_up_proj": ("gate", "up")}, parts=("weight",)),
    Rule("mlp.experts.{proj}", "E R", GATE_UP_DOWN, suffix=".bias", parts=("bias",)),
    Rule(
        "mlp.experts.{proj}",
        "E (P R)",
        {"gate_up_proj": ("gate", "up")},
        suffix=".bias",
        parts=("bias",),
    ),
)
_EXPERTS: Mapping[str, str] = {
    "ffn_gate_exps": "gate_proj",
    "ffn_up_exps": "up_proj",
    "ffn_down_exps": "down_proj",
    "ffn_gate_up_exps": "gate_up_proj",
}


class GgufArch(NamedTuple):
    """One row per `general.architecture`: the model's modules, and its experts' written form."""

    arch: str
    model_type: str
    modules: tuple[str, ...]  # in a layer
    experts: tuple[Rule, ...]
    verified: bool = False
    fix: str = ""  # why its other tensors cannot be taken as they are
    one_row: tuple[str, ...] = ()  # [1, N] in the model; GGUF drops the axis of length 1
    stays_f32: tuple[str, ...] = ()


class Translated(NamedTuple):
    """What one GGUF tensor is.

    `name`: its Hugging Face name; of experts that of the stacked tensor, `mlp.experts.gate_proj`
    and the like whatever the model calls them (STORED has the rules). `one_row`: a vector [N] is
    [1, N] in the model. `stays_f32`: kept in F32 whatever the other dtypes; so is every
    correction bias, since rounding one may change which experts are chosen.
    """

    name: str
    layer: int | None
    is_expert: bool
    one_row: bool = False
    stays_f32: bool = False


# Sorted by model age. `verified`: names and values compared with what llama.cpp's converter makes
# of a model that transformers wrote; minimax-m2 with transformers' own GGUF loader.
ARCHITECTURES: tuple[GgufArch, ...] = (
    GgufArch("llama", "mixtral", (), _PER_EXPERT_W123, fix="rows of q and k are permuted"),
    GgufArch(
        "qwen2moe",
        "qwen2_moe",
        (*_ATTENTION, *_ROUTER, *_SHARED_ONE),
        _PER_EXPERT,
        verified=True,
        one_row=("mlp.shared_expert_gate.weight",),
    ),  # Qwen/Qwen1.5-MoE-A2.7B
    GgufArch("deepseek2", "deepseek_v3", (), _PER_EXPERT, fix="kv_b_proj is split and transposed"),
    GgufArch(
        "olmoe", "olmoe", (*_ATTENTION, *_QK_NORM, *_ROUTER), _PER_EXPERT, verified=True
    ),  # allenai/OLMoE-1B-7B-0924
    GgufArch("granitemoe", "granitemoe", (), (), fix="rows of q and k are permuted"),
    GgufArch("jamba", "jamba", (), (), fix="mamba.A_log is stored as -exp(A_log)"),
    GgufArch(
        "qwen3moe",
        "qwen3_moe",
        (*_ATTENTION, *_QK_NORM, *_ROUTER),
        _PER_EXPERT,
        verified=True,
    ),  # Qwen/Qwen3-30B-A3B
    GgufArch(
        "dots1",
        "dots1",
        (*_ATTENTION, *_QK_NORM, *_DENSE_MLP, *_ROUTER, *_ROUTER_BIAS, *_SHARED),
        _PER_EXPERT,
        verified=True,
        stays_f32=("mlp.gate.e_score_correction_bias",),
    ),  # rednote-hilab/dots.llm1.inst
    GgufArch(
        "ernie4_5-moe",
        "ernie4_5_moe",
        (*_ATTENTION, *_DENSE_MLP, *_ROUTER, "mlp.moe_statics.e_score_correction", *_SHARED),
        _PER_EXPERT,
        verified=True,
        one_row=("mlp.moe_statics.e_score_correction_bias",),
        stays_f32=("mlp.moe_statics.e_score_correction_bias", "mlp.gate.weight"),
    ),  # baidu/ERNIE-4.5-21B-A3B-PT
    GgufArch(
        "glm4moe",
        "glm4_moe",
        (*_ATTENTION, *_QK_NORM, *_DENSE_MLP, *_ROUTER, *_ROUTER_BIAS, *_SHARED, *_MTP),
        _PER_EXPERT,
        verified=True,
        stays_f32=("mlp.gate.e_score_correction_bias",),
    ),  # zai-org/GLM-4.5-Air
    GgufArch(
        "gpt-oss",
        "gpt_oss",
        (*_ATTENTION, *_SINKS, "mlp.router"),
        _PACKED_GPT_OSS,
        verified=True,
    ),  # openai/gpt-oss-20b
    GgufArch("qwen3next", "qwen3_next", (), _PER_EXPERT, fix="norms are stored plus one"),
    GgufArch(
        "minimax-m2",
        "minimax_m2",
        (*_ATTENTION, *_QK_NORM, "block_sparse_moe.gate", "block_sparse_moe.e_score_correction"),
        _PER_EXPERT_W123,
        verified=True,
        stays_f32=("block_sparse_moe.e_score_correction_bias",),
    ),  # MiniMaxAI/MiniMax-M2
)

_BY_NAME: Mapping[str, GgufArch] = {row.arch: row for row in ARCHITECTURES}
_IN_LAYER = re.compile(r"blk\.(?P<layer>0|[1-9][0-9]{0,5})\.(?P<base>.+)\.(?P<part>weight|bias)")
_OUTSIDE = re.compile(r"(?P<base>[a-z_]+)\.(?P<part>weight|bias)")
# Parameters whose Hugging Face names do not end in the part of the GGUF tensor.
_SPELLINGS: Mapping[str, str] = {
    "self_attn.sinks.weight": "self_attn.sinks",
    "mlp.gate.e_score_correction.bias": "mlp.gate.e_score_correction_bias",
    "mlp.moe_statics.e_score_correction.bias": "mlp.moe_statics.e_score_correction_bias",
    "block_sparse_moe.e_score_correction.bias": "block_sparse_moe.e_score_correction_bias",
}


def find_arch(metadata: Mapping[str, Json]) -> GgufArch:
    """Return the row of a file's architecture; one without modules where it is not known."""
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or not name:
        raise BadSource("the GGUF metadata has no general.architecture")
    return _BY_NAME.get(name) or GgufArch(name, "", (), _PER_EXPERT, fix="it was never compared")


def translate(
    row: GgufArch, names: Iterable[str], *, experts_only: bool = False
) -> Mapping[str, Translated]:
    """Return what each tensor is; with `experts_only` the experts' alone.

    BadSource where the architecture is not verified and other tensors than experts are wanted;
    UnrecognizedTensor for a name that the architecture does not have.
    """
    if experts_only:
        found = ((name, _expert(name)) for name in names)
        return {name: what for name, what in found if what is not None}
    if not row.verified:
        verified = ", ".join(each.arch for each in ARCHITECTURES if each.verified)
        raise BadSource(
            f"tensors of the GGUF architecture {row.arch!r} cannot be taken as they are: {row.fix}",
            hint=f"--experts-only converts its experts; whole models: {verified}",
        )
    return {name: _expert(name) or _dense(row, name) for name in names}


def _expert(name: str) -> Translated | None:
    match = _IN_LAYER.fullmatch(name)
    if match is None or match["base"] not in _EXPERTS:
        return None
    stacked = f"mlp.experts.{_EXPERTS[match['base']]}.{match['part']}"
    return Translated(f"model.layers.{match['layer']}.{stacked}", int(match["layer"]), True)


def _dense(row: GgufArch, name: str) -> Translated:
    match = _IN_LAYER.fullmatch(name) or _OUTSIDE.fullmatch(name)
    base = match["base"] if match else ""
    in_layer = match is not None and match.re is _IN_LAYER
    module = _modules(row.arch).get(f"blk.0.{base}" if in_layer else base)
    if match is None or module is None:
        raise UnrecognizedTensor(
            f"the GGUF architecture {row.arch!r} has no tensor {name!r}",
            hint="the file was made by a newer or another converter; moeconv would guess",
        )
    plain = f"{module}.{match['part']}"
    own = _SPELLINGS.get(plain, plain)
    return Translated(
        name=f"model.layers.{match['layer']}.{own}" if in_layer else own,
        layer=int(match["layer"]) if in_layer else None,
        is_expert=False,
        one_row=own in row.one_row,
        stays_f32=own in row.stays_f32,
    )


@cache
def _modules(arch: str) -> Mapping[str, str]:
    """Return GGUF base name (of layer 0) -> module, gguf-py's name map turned around."""
    from gguf.constants import MODEL_ARCH_NAMES
    from gguf.tensor_mapping import get_tensor_name_map

    kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
    if arch not in kinds:
        raise BadSource(f"the gguf package does not know the architecture {arch!r}: update it")
    name_map = get_tensor_name_map(kinds[arch], 1)
    found: dict[str, str] = {}
    modules = [(module, f"model.layers.0.{module}") for module in _BY_NAME[arch].modules]
    for module, full in (*((name, name) for name in _TOP), *modules):
        base = name_map.get_name(full)
        if base is None or base in found:
            raise BadSource(f"the gguf package names {module} of {arch!r} {base!r}: update moeconv")
        found[base] = module
    return found
