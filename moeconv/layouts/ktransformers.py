"""The ktransformers layout: the experts alone, as kt-kernel's own loader reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import gcd
from typing import NamedTuple

from moeconv.errors import Refused, UsageError
from moeconv.layouts.base import Draft, Fill, Layouted
from moeconv.layouts.ktransformers_raw import (
    PROJECTIONS,
    RawForm,
    raw_drafts,
    raw_form,
    raw_multiple,
    raw_notes,
    unused_parts,
)
from moeconv.layouts.options import Options
from moeconv.layouts.partition import divisors
from moeconv.types import Json, Key, Place, Span

TESTED = ("0.7.2",)  # kt-kernel, from its wheel
ACTIVATIONS = ("silu", "swish")  # what kt-kernel computes, whatever the model's config says
LEFT_OUT = "kt-kernel holds the experts alone; the rest is read from --model"
LEFT_OUT_STACK = "kt-kernel numbers its experts by the layers of the decoder"


class Form(NamedTuple):
    """A --dtype: kt-kernel's name of it, and what both sides of a slice are a multiple of.

    `encode`: the packed form's codec; "": plain BF16, which kt-kernel slices itself, and ends the
    process where a side of a slice is no multiple.
    """

    dtype: str
    method: str
    encode: str
    bits: int
    multiple: int


FORMS: tuple[Form, ...] = (
    Form("int4", "AMXINT4", "amxint4", 4, 128),
    Form("int8", "AMXINT8", "amxint8", 8, 64),
    Form("bf16", "BF16", "", 16, 32),
)


class KtView(NamedTuple):
    """What the layout needs of a model; `activation` and `swiglu_limit` as its config has them.

    `held`, with `--dtype keep`: where the parts of its quantized weights lie.
    """

    family: str
    places: Mapping[Key, Place]
    expert_layers: Mapping[tuple[str, int], int]
    activation: str
    swiglu_limit: float
    held: Mapping[Key, Place] | None = None


def draft_ktransformers(view: KtView, options: Options) -> Layouted:
    """Return the drafts of all experts, by layer and NUMA part.

    Raises Refused for a model or a number of parts that kt-kernel could not compute.
    """
    _check_options(options)
    layers = sorted(layer for stack, layer in view.expert_layers if stack == "main")
    _check_experts(view, layers)
    raw = raw_form(view.places) if options.dtype == "keep" else None
    _check_activation(view, clamps=raw is not None and raw.clamps)
    if raw is not None:
        return _draft_raw(view, raw, layers, options.numa)
    dtype = "bf16" if options.dtype == "keep" else options.dtype
    return _draft_form(view, next(one for one in FORMS if one.dtype == dtype), layers, options)


def _draft_form(view: KtView, form: Form, layers: list[int], options: Options) -> Layouted:
    """Return the experts in BF16 or packed."""
    drafts: list[Draft] = []
    for layer in layers:
        intermediate, hidden = _sizes(view, layer)
        _check_sizes(form, intermediate, hidden, options.numa)
        make = _packed if form.encode else _plain
        drafts += make(view, layer, form, options.numa)
    facts: dict[str, Json] = {"method": form.method, "tested_kt_kernel": list(TESTED)}
    if form.encode:
        facts["numa"] = options.numa
        return Layouted(tuple(drafts), _unused(view), facts)
    return Layouted(tuple(drafts), _unused(view), facts, (_cut_note(view, form, layers),))


def _draft_raw(view: KtView, raw: RawForm, layers: list[int], numa: int) -> Layouted:
    """Return the experts in the quantized form of the source; `numa` decides nothing but checks."""
    held = view.held or {}
    multiple = raw_multiple(raw, view.places)
    form = Form("keep", raw.method, "", 0, multiple)
    drafts: list[Draft] = []
    sides = 0
    for layer in layers:
        intermediate, hidden = _sizes(view, layer)
        _check_sizes(form, intermediate, hidden, numa)
        sides = gcd(sides, intermediate // numa, hidden)
        drafts += raw_drafts(raw, held, layer, view.expert_layers["main", layer])
    facts: dict[str, Json] = {
        "method": raw.method,
        "tested_kt_kernel": list(TESTED),
        "checked_numa": numa,
    }
    notes = (_cut_note(view, form, layers), *raw_notes(raw, view.places, sides))
    unused = {**_unused(view), **unused_parts(raw, held)}
    return Layouted(tuple(drafts), unused, facts, notes)


def _cut_note(view: KtView, form: Form, layers: list[int]) -> str:
    """Return the numbers of NUMA parts into which kt-kernel can cut what is not cut here."""
    counts = set.intersection(*(set(_fitting(form, *_sizes(view, layer))) for layer in layers))
    fitting = ", ".join(str(count) for count in sorted(counts))
    return f"kt-kernel cuts {form.method} experts as it loads them, into parts: {fitting}"


def launch_hint(facts: Mapping[str, Json], dst: str) -> str:
    """Return the arguments with which SGLang's kt-kernel serves an output; `facts`: of its plan."""
    hint = f"--kt-weight-path {dst} --kt-method {facts['method']}"
    numa = facts.get("numa", facts.get("checked_numa"))
    if numa is not None:  # other counts give garbage or end the process
        hint += f" --kt-threadpool-count {numa}"
    return hint


def _check_options(options: Options) -> None:
    if options.numa < 1:
        raise UsageError(f"--numa {options.numa} is not a number of NUMA parts", hint="1 or more")
    if options.dense_dtype is not None:
        raise Refused(
            "--dense-dtype has nothing to change: the ktransformers layout writes experts alone",
            hint="leave it out; --layout hf writes the other weights",
        )


def _unused(view: KtView) -> Mapping[str, str]:
    """Return stack or key -> rule of what is left out."""
    unused = {}
    for key in view.places if view.held is None else view.held:
        if key.stack != "main":
            unused[key.stack] = LEFT_OUT_STACK
        elif key.expert is None:
            unused[key.name] = LEFT_OUT
    return unused


def _check_experts(view: KtView, layers: list[int]) -> None:
    """Raise Refused for experts whose projections are not those that kt-kernel reads."""
    hint = "kt-kernel reads gate, up and down without biases; --layout hf and vllm have no limit"
    names = {key.name for key in view.places if key.expert is not None and key.stack == "main"}
    for name in PROJECTIONS:
        if name not in names:
            raise Refused(f"the experts of family '{view.family}' have no {name}", hint=hint)
    more = sorted(names - set(PROJECTIONS))
    if more:
        raise Refused(f"the experts of family '{view.family}' have {', '.join(more)}", hint=hint)
    if not layers:
        raise Refused("the decoder has no layer with experts", hint="--layout hf writes the rest")


def _check_activation(view: KtView, *, clamps: bool) -> None:
    """Raise Refused for an activation that kt-kernel does not compute."""
    if view.activation and view.activation not in ACTIVATIONS:
        raise Refused(
            f"the experts of this model use {view.activation}; kt-kernel computes SiLU",
            where="config.json",
            hint="--layout hf and vllm have no such limit",
        )
    if view.swiglu_limit and not clamps:
        raise Refused(
            f"this model clamps its experts at swiglu_limit {view.swiglu_limit:g}, which kt-kernel "
            "takes for FP8 blocks, MXFP4 and MXFP8 alone, as they are stored",
            where="config.json",
            hint="--layout hf and vllm have no such limit",
        )


def _sizes(view: KtView, layer: int) -> tuple[int, int]:
    """Return (intermediate, hidden) of a layer's experts; Refused where they differ."""
    found = set()
    for expert in range(view.expert_layers["main", layer]):
        for name in PROJECTIONS:
            place = view.places[Key("main", layer, expert, name)]
            shape = (place.rows.length, place.weight.cols)
            found.add(shape if name != "down" else shape[::-1])
    if len(found) > 1:
        sizes = " and ".join(f"{rows} x {cols}" for rows, cols in sorted(found))
        raise Refused(
            f"the experts of layer {layer} have several sizes: {sizes}",
            hint="kt-kernel takes one size per layer; --layout hf has no such limit",
        )
    return found.pop()


def _check_sizes(form: Form, intermediate: int, hidden: int, numa: int) -> None:
    """Raise Refused, with what would work, unless the form's tiles fit each part."""
    if form.dtype == "bf16":
        numa = 1  # kt-kernel slices it when it loads
    if numa in _fitting(form, intermediate, hidden):
        return
    if hidden % form.multiple:
        problem = f"hidden size {hidden} is no multiple of {form.multiple}"
    elif intermediate % numa:
        problem = f"intermediate size {intermediate} is not divided by --numa {numa}"
    else:
        problem = (
            f"{intermediate // numa} intermediate rows per NUMA part ({intermediate} / {numa}) are "
            f"no multiple of {form.multiple}"
        )
    raise Refused(
        f"--dtype {form.dtype} ({form.method}): {problem}",
        hint="; ".join(
            _works(one, intermediate, hidden)
            for one in ((form, *FORMS) if form not in FORMS else FORMS)
        ),
    )


def _fitting(form: Form, intermediate: int, hidden: int) -> list[int]:
    """Return the numbers of NUMA parts that a form can have."""
    if hidden % form.multiple:
        return []
    return [count for count in divisors(intermediate) if intermediate // count % form.multiple == 0]


def _works(form: Form, intermediate: int, hidden: int) -> str:
    counts = ", ".join(str(count) for count in _fitting(form, intermediate, hidden))
    if form.dtype == "bf16":
        return f"--dtype {form.dtype} works" if counts else f"{form.dtype}: never"
    return f"--dtype {form.dtype} works with --numa {counts}" if counts else f"{form.dtype}: never"


def _packed(view: KtView, layer: int, form: Form, numa: int) -> Iterator[Draft]:
    """Yield weight and scale of each slice of a layer: what lies on one node together.

    gate and up are cut along their rows, down along its columns: both the intermediate size.
    """
    for part in range(numa):
        for expert in range(view.expert_layers["main", layer]):
            for name in PROJECTIONS:
                place = view.places[Key("main", layer, expert, name)]
                rows, cols = Span(0, place.rows.length), Span(0, place.weight.cols)
                if name == "down":
                    cols = _slice(cols, part, numa)
                else:
                    rows = _slice(rows, part, numa)
                nbytes = rows.length * cols.length * form.bits // 8
                yield from _pair(
                    f"blk.{layer}.ffn_{name}_exps.{expert}.numa.{part}",
                    _fill(layer, expert, name, rows, cols),
                    form.encode,
                    nbytes,
                )


def _pair(name: str, fill: Fill, encode: str, nbytes: int) -> Iterator[Draft]:
    """Yield the weight and the scale that one rectangle is packed into."""
    rows, cols, layer = fill.own_rows, fill.own_cols, fill.layer
    for part, dtype, length in (("weight", "I8", nbytes), ("scale", "F32", rows)):
        yield Draft(
            f"{name}.{part}",
            dtype,
            (length,),
            1,
            rows,
            cols,
            (fill,),
            layer=layer,
            encode=encode,
            part=part,
        )


def _plain(view: KtView, layer: int, form: Form, numa: int) -> Iterator[Draft]:
    """Yield one BF16 matrix per expert and projection, under the names that kt-kernel tries first.

    Those are the same for every family: no prefix of a source is needed.
    """
    for expert in range(view.expert_layers["main", layer]):
        for name in PROJECTIONS:
            place = view.places[Key("main", layer, expert, name)]
            rows, cols = Span(0, place.rows.length), Span(0, place.weight.cols)
            fill = _fill(layer, expert, name, rows, cols)
            shape = (rows.length, cols.length)
            key = f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"
            yield Draft(key, form.method, shape, 1, *shape, (fill,), layer=layer)


def _slice(span: Span, part: int, numa: int) -> Span:
    each = span.length // numa
    return Span(part * each, (part + 1) * each)


def _fill(layer: int, expert: int, name: str, rows: Span, cols: Span) -> Fill:
    return Fill(
        "main",
        layer,
        name,
        (expert,),
        rows,
        cols,
        own_rows=rows.length,
        own_cols=cols.length,
    )
