"""The hf layout: the source's own names and arrangement, decoded."""

from __future__ import annotations

from collections.abc import Iterator

from moeconv.layouts.base import Draft, Fill, Layouted
from moeconv.layouts.options import Options, target_dtype
from moeconv.types import Span, Weight, element_count


def draft_hf(weights: tuple[Weight, ...], options: Options) -> Layouted:
    """Return one draft per tensor of the Hugging Face form, in the dtype that the options give it.

    That is one per weight, but where the source arranges its experts otherwise (Weight.forms).
    """
    drafts: dict[str, Draft] = {}
    for weight in weights:
        for draft in _formed(weight, options) if weight.forms else _draft(weight, options):
            other = drafts.get(draft.name)
            if other is not None and weight.forms:  # gate and up of one tensor
                draft = other._replace(fills=(*other.fills, *draft.fills))
            drafts[draft.name] = draft
    return Layouted(tuple(drafts.values()), {}, {})


def _draft(weight: Weight, options: Options) -> Iterator[Draft]:
    slots = weight.slots or 1
    experts: tuple[int, ...] | None = None
    if weight.is_expert:
        experts = tuple(range(slots)) if weight.slots is not None else (weight.expert or 0,)
    yield Draft(
        weight.name,
        weight_dtype(weight, options),
        weight.shape,
        slots,
        weight.rows,
        weight.cols,
        tuple(_fill(weight, name, experts, rows) for name, rows in weight.projections),
        transposed=weight.form_transposed,
        layer=weight.layer,
    )


def _formed(weight: Weight, options: Options) -> Iterator[Draft]:
    """Yield a draft for each tensor that a stacked weight of experts is spread over, or shares."""
    slots = range(weight.slots or 1)
    for (name, _), form in zip(weight.projections, weight.forms, strict=True):
        apart = "{expert}" in form.name
        runs = [(slot,) for slot in slots] if apart else [tuple(slots)]
        rows = element_count(weight.shape) // len(runs[0]) // max(weight.cols, 1)
        for experts in runs:
            yield Draft(
                form.name.replace("{expert}", str(experts[0])),
                weight_dtype(weight, options),
                weight.shape,
                len(experts),
                rows,
                weight.cols,
                (_fill(weight, name, experts, form.rows),),
                transposed=weight.form_transposed,
                layer=weight.layer,
            )


def _fill(weight: Weight, name: str, experts: tuple[int, ...] | None, at: Span) -> Fill:
    return Fill(
        weight.stack,
        weight.layer,
        name,
        experts,
        Span(0, at.length),
        Span(0, weight.cols),
        at_row=at.start,
        row_step=at.step,
        own_rows=at.length,
        own_cols=weight.cols,
    )


def weight_dtype(weight: Weight, options: Options) -> str:
    """Return the output dtype of a weight; a raw one keeps its own."""
    stored = str(weight.params.get("dtype", ""))
    if weight.codec == "raw":
        return stored
    wanted = options.dtype if weight.is_expert else options.dense
    if weight.model_dtype and wanted != "keep":
        return target_dtype(weight.model_dtype, wanted, expert=weight.is_expert, plain=True)
    return target_dtype(stored, wanted, expert=weight.is_expert, plain=weight.codec == "float")
