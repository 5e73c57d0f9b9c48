"""GGUF tensors under the names of the model's Hugging Face form, and where each lands in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from moeconv.dims import parse_dims
from moeconv.errors import BadSource, IncompleteModel
from moeconv.families.base import Family, Rule
from moeconv.families.gguf_names import STORED, GgufArch, Translated, find_arch, translate
from moeconv.store.gguf import METADATA
from moeconv.store.source import Source
from moeconv.types import Form, Json, Span, TensorRef, Weight

_PACKED_BIAS = "_bias"  # of a tensor with several experts: gate_up_proj_bias


_ROUTER = "ffn_gate_inp.weight"


class Names(NamedTuple):
    """A GGUF source translated: its tensors under Hugging Face names, which ones are left out.

    `family`, `config`: of an architecture of which only the experts are known; else None, {}.
    """

    arch: GgufArch
    family: Family | None
    config: Mapping[str, Json]
    tensors: Mapping[str, TensorRef]  # each by its new name, and called so
    originals: Mapping[str, TensorRef]  # new name -> as the file has it
    translated: Mapping[str, Translated]  # by new name
    left_out: tuple[TensorRef, ...]


def translate_names(source: Source, *, experts_only: bool) -> Names:
    """Return a GGUF source's tensors under the names of its model.

    BadSource where the architecture's other tensors are not known and are wanted.
    """
    metadata = source.extra_configs[METADATA]
    arch = find_arch(metadata)
    apart = experts_only and not arch.verified
    found = translate(arch, source.tensors, experts_only=apart)
    if apart:
        _check_routers(source, {what.layer for what in found.values()})
    originals: dict[str, TensorRef] = {}
    for name, what in found.items():
        if what.name in originals:
            raise BadSource(
                f"'{originals[what.name].name}' and '{name}' are both '{what.name}'",
                where=source.tensors[name].file,
            )
        originals[what.name] = source.tensors[name]
    return Names(
        arch,
        Family(arch.arch, (), STORED, "", dense=()) if apart else None,
        _experts_config(metadata, arch.arch) if apart else {},
        {name: ref._replace(name=name) for name, ref in originals.items()},
        originals,
        {what.name: what for what in found.values()},
        tuple(ref for name, ref in source.tensors.items() if name not in found),
    )


def _check_routers(source: Source, layers: set[int | None]) -> None:
    """Raise for a layer that routes to experts and has none: nothing else says which layers do."""
    for name, ref in source.tensors.items():
        start, _, rest = name.removeprefix("blk.").partition(".")
        if rest == _ROUTER and start.isdecimal() and int(start) not in layers:
            raise IncompleteModel(
                f"layer {start} has a router, '{name}', and no experts",
                where=ref.file,
                hint="a file of the model is missing or damaged; download it again",
            )


def _experts_config(metadata: Mapping[str, Json], arch: str) -> Mapping[str, Json]:
    inner = metadata.get(f"{arch}.expert_feed_forward_length")
    return {
        "hidden_size": metadata.get(f"{arch}.embedding_length"),
        "num_experts": metadata.get(f"{arch}.expert_count"),
        "moe_intermediate_size": inner or metadata.get(f"{arch}.feed_forward_length"),
    }


def stored_family(family: Family) -> Family:
    """Return a family whose experts lie as GGUF stores them."""
    return family._replace(rules=STORED)


def in_model_form(weight: Weight, names: Names) -> Weight:
    """Return a weight that says what it is in the Hugging Face model, with the file's own parts."""
    what = names.translated[next(iter(weight.parts.values())).name]
    parts = {part: names.originals[ref.name] for part, ref in weight.parts.items()}
    if not weight.is_expert:
        plain = replace(weight, parts=parts, model_dtype="F32" if what.stays_f32 else "BF16")
        return _one_row(plain) if what.one_row else plain
    forms = [_form(names.arch, weight, index) for index in range(len(weight.projections))]
    shape, transposed = forms[0][1:]
    return replace(
        weight,
        parts=parts,
        forms=tuple(form for form, _, _ in forms),
        shape=shape,
        form_transposed=transposed,
    )


def _one_row(weight: Weight) -> Weight:
    """Return a vector [N] as the matrix [1, N] that it is in the model."""
    ((name, _),) = weight.projections
    cols = weight.rows * weight.cols
    return replace(
        weight,
        shape=(1, cols),
        rows=1,
        cols=cols,
        projections=((name, Span(0, 1)),),
    )


def _form(arch: GgufArch, weight: Weight, index: int) -> tuple[Form, tuple[int, ...], bool]:
    """Return where a projection lands, the shape of that tensor, and whether it is transposed."""
    key, rows = weight.projections[index]
    projection, dot, suffix = key.partition(".")
    rule, word = _find_rule(arch, projection, dot + suffix)
    fused = rule.projections[word]
    dims = parse_dims(rule.dims)
    prefix = f"model.layers.{weight.layer}."
    if not dims.stacked:
        name = f"{prefix}{rule.pattern}".replace("{proj}", word) + (dot + suffix or ".weight")
        full = (rows.length, weight.cols)
        return Form(name, Span(0, rows.length)), full[:1] if suffix else full, False
    name = f"{prefix}{rule.pattern}".replace("{proj}", word) + (_PACKED_BIAS if suffix else "")
    shape = dims.shape(weight.slots or 1, len(fused), rows.length, weight.cols)
    at = dims.rows_of(fused.index(projection), len(fused), rows.length)
    return Form(name, at), shape, dims.transposed


def _find_rule(arch: GgufArch, projection: str, suffix: str) -> tuple[Rule, str]:
    for rule in arch.experts:
        for word, names in rule.projections.items():
            if rule.suffix == suffix and projection in names:
                return rule, word
    raise BadSource(
        f"the experts of the GGUF architecture {arch.arch!r} have no '{projection}{suffix}'",
        hint="the file was made by a newer or another converter",
    )
