"""Is what surrounds the experts whole? Routers, attention, norms, embedding and output head."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

from moeconv.errors import BadSource, IncompleteModel
from moeconv.families.config_fields import CONFIG_SECTIONS, MAIN_STACKS
from moeconv.grouping import split_layer
from moeconv.sizes import Sizes
from moeconv.types import Json, Weight

_HINT = "a file of the checkpoint is missing or damaged; download it again"
_FEW = 2  # names that a layer may lack before it counts as one of another kind
_ELSEWHERE = re.compile(r"(^|\.)(visual|vision\w*|audio\w*|mtp\w*|\w*projector|\w*tower)(\.|$)")
_EMBEDDING = re.compile(
    r"(.+\.)?(embed_tokens|embed|wte|word_embeddings|tok_embeddings|embeddings?)\.weight"
)
_NORM = re.compile(r"(.+\.)?(norm|norm_f|final_layernorm|embedding_norm|ln_f)\.(weight|scale)")
_HEAD = re.compile(r"(.+\.)?(lm_head|head|output|unembedding)\.weight")
_ROUTER = re.compile(
    r"((mlp|moe|ffn|feed_forward|block_sparse_moe|mixer)\.)?"
    r"(gate|router|gate\.wg|router\.(gate|layer|proj|classifier))\.weight"
)
# What only the layers of a multi-token prediction have.
_PREDICTS = ("eh_proj", "enorm", "hnorm", "shared_head", "embed_tokens", "e_proj", "h_proj")


class Needs(NamedTuple):
    """A module with `has` (and `where`, if given) must also have one of `needs`, beside it."""

    has: str
    needs: tuple[str, ...]
    where: str = ""


# True of every architecture among the fixtures; MLA has no k_proj, Gemma 4 layers without v_proj.
NEEDS = (
    Needs("k_proj.weight", ("q_proj.weight",)),
    Needs("k_proj.weight", ("o_proj.weight", "out_proj.weight", "dense.weight")),
    Needs("v_proj.weight", ("k_proj.weight",)),
    Needs("q_norm.weight", ("k_norm.weight",), where="k_proj.weight"),
    Needs("k_norm.weight", ("q_norm.weight",), where="k_proj.weight"),
    Needs("up_proj.weight", ("down_proj.weight",)),
)


def check_dense(
    weights: Sequence[Weight],
    expert_layers: Iterable[tuple[str, int]],
    sizes: Sizes,
    config: Mapping[str, Json],
) -> None:
    """Raise IncompleteModel for a tensor outside of the experts that must be there and is not.

    BadSource: an embedding with fewer rows than the vocabulary has."""
    _check_vocabulary(weights, sizes)
    found: dict[int, set[str]] = defaultdict(set)
    outside: list[str] = []
    for weight in weights:
        name = weight.projections[0][0]
        if weight.stack != "main" or weight.is_expert:
            continue
        if weight.layer is not None:
            found[weight.layer].add(name)
        elif not _ELSEWHERE.search(name):
            outside.append(name)
    with_experts = {layer for stack, layer in expert_layers if stack == "main"}
    _check_routers(found, with_experts)
    for layer, names in found.items():
        _check_needs(layer, names)
    _check_alike(found, with_experts, config)
    _check_outside(outside, sizes)


def _check_routers(found: Mapping[int, set[str]], with_experts: Iterable[int]) -> None:
    for layer in sorted(with_experts):
        if not any(_ROUTER.fullmatch(name) for name in found.get(layer, ())):
            raise IncompleteModel(f"layer {layer} has experts, but no router", hint=_HINT)


def _check_needs(layer: int, names: set[str]) -> None:
    for name in names:
        for has, needs, where in NEEDS:
            if name != has and not name.endswith(f".{has}"):
                continue
            parent = name[: len(name) - len(has)]
            if where and parent + where not in names:
                continue
            if not any(parent + one in names for one in needs):
                raise IncompleteModel(
                    f"layer {layer} has '{name}', but no '{parent}{needs[0]}'", hint=_HINT
                )


def _check_alike(
    found: Mapping[int, set[str]], with_experts: set[int], config: Mapping[str, Json]
) -> None:
    """Raise for the one layer that lacks a name or two of what another of its kind has."""
    kinds: dict[Hashable, dict[int, frozenset[str]]] = defaultdict(dict)
    said = _layer_lists(config, max(found, default=-1) + 1)
    for layer, names in found.items():
        kind = (layer in with_experts, *(entries[layer] for entries in said))
        # DeepSeek-V4 has a table of token ids in its first layers alone
        kinds[kind][layer] = frozenset(name for name in names if not name.endswith("tid2eid"))
    for layers in kinds.values():
        counts = Counter(layers.values())
        for layer, own in layers.items():
            for other in counts if counts[own] == 1 else ():
                if own < other and len(other - own) <= _FEW:
                    like = next(one for one, its in layers.items() if its == other)
                    raise IncompleteModel(
                        f"layer {layer} has no '{min(other - own)}', which layer {like} has",
                        hint=_HINT,
                    )


def _layer_lists(config: Mapping[str, Json], layers: int) -> list[list[Hashable]]:
    """Return the config's lists that have an entry per layer: what kind of layer each one is."""
    sections = [config.get(name) if name else config for name in CONFIG_SECTIONS]
    return [
        value
        for section in sections
        if isinstance(section, Mapping)
        for field, value in section.items()
        if isinstance(value, list) and len(value) >= layers and "token" not in field
        if all(isinstance(entry, str | int | float | None) for entry in value)
    ]


def _check_outside(names: Sequence[str], sizes: Sizes) -> None:
    wanted = [("embedding", _EMBEDDING), ("norm after the last layer", _NORM)]
    if sizes.untied:
        wanted.append(("output head, and tie_word_embeddings is false", _HEAD))
    for what, pattern in wanted:
        if not any(pattern.fullmatch(name) for name in names):
            raise IncompleteModel(f"the model has no {what}", hint=_HINT)


def check_extra_layers(weights: Iterable[Weight], sizes: Sizes) -> None:
    """Raise BadSource for layers after the last one that are not for multi-token prediction."""
    if sizes.layers is None:
        return
    extra: dict[int, list[str]] = defaultdict(list)
    for weight in weights:
        layer = weight.layer or 0
        place = split_layer(weight.name)
        if layer >= sizes.layers + sizes.mtp_layers and place.stack in MAIN_STACKS:
            extra[layer].append(place.rest)
    for layer, names in sorted(extra.items()):
        if not any(word in name.split(".") for name in names for word in _PREDICTS):
            raise BadSource(
                f"config.json says {sizes.layers} layers; the files have layer {layer}",
                where="config.json",
                hint="config.json does not belong to these files",
            )


def _check_vocabulary(weights: Iterable[Weight], sizes: Sizes) -> None:
    """Raise BadSource where the embedding has fewer rows than the vocabulary; more are padding."""
    for weight in weights:
        name = weight.projections[0][0]
        inside = weight.layer is not None or weight.stack != "main" or _ELSEWHERE.search(name)
        if inside or not _EMBEDDING.fullmatch(name):
            continue
        if sizes.vocab and weight.rows < sizes.vocab:
            raise BadSource(
                f"'{weight.name}' has {weight.rows} rows; config.json says a vocabulary of "
                f"{sizes.vocab}",
                where="config.json",
                hint="config.json does not belong to these files",
            )
