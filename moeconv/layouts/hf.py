"""The hf layout: the source's own names and arrangement, decoded."""

from __future__ import annotations

from collections.abc import Iterator

from moeconv.layouts.base import Draft, Fill, Layouted
from moeconv.layouts.options import Options, target_dtype
from moeconv.types import Span, Weight


def draft_hf(weights: tuple[Weight, ...], options: Options) -> Layouted:
    """Return one draft per weight, in the dtype that the options give it."""
    drafts = tuple(draft for weight in weights for draft in _draft(weight, options))
    return Layouted(drafts, {}, {})


def _draft(weight: Weight, options: Options) -> Iterator[Draft]:
    slots = weight.slots or 1
    experts: tuple[int, ...] | None = None
    if weight.is_expert:
        experts = tuple(range(slots)) if weight.slots is not None else (weight.expert or 0,)
    fills = tuple(
        Fill(
            weight.stack,
            weight.layer,
            name,
            experts,
            Span(0, rows.length),
            Span(0, weight.cols),
            at_row=rows.start,
            row_step=rows.step,
            own_rows=rows.length,
            own_cols=weight.cols,
        )
        for name, rows in weight.projections
    )
    yield Draft(
        weight.name,
        weight_dtype(weight, options),
        weight.shape,
        slots,
        weight.rows,
        weight.cols,
        fills,
        transposed=weight.form_transposed,
        layer=weight.layer,
    )


def weight_dtype(weight: Weight, options: Options) -> str:
    """Return the output dtype of a weight; a raw one keeps its own."""
    stored = str(weight.params.get("dtype", ""))
    if weight.codec == "raw":
        return stored
    wanted = options.dtype if weight.is_expert else options.dense
    return target_dtype(stored, wanted, expert=weight.is_expert, plain=weight.codec == "float")
