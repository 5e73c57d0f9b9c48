"""`--dtype keep`: a weight taken apart into its stored tensors, each a weight of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from moeconv.codecs.base import Tile, extent_of
from moeconv.errors import Refused
from moeconv.types import FLOAT_DTYPES, Span, TensorRef, Weight, element_count

# One number (or a few) for the whole weight.
WHOLE = Tile((), rows=None, cols=None)


def part_key(key: str, part: str) -> str:
    """Return the key name under which a part of a quantized weight is a weight."""
    return f"{key}/{part}"


def as_stored(weight: Weight) -> Iterator[Weight]:
    """Yield one weight per part: name, dtype, shape as in the file, its matrix not interpreted."""
    for part, ref in weight.parts.items():
        slots = weight.slots if weight.slots and ref.shape[:1] == (weight.slots,) else None
        shape = ref.shape[1:] if slots else ref.shape
        rows = shape[0] if shape else 1
        name = part_key(weight.projections[0][0], part)
        yield _raw(weight, ref, (rows, element_count(shape[1:])), ((name, Span(0, rows)),), slots)


def taken_apart(
    weight: Weight, tiles: Mapping[str, Tile], stored: Mapping[str, Tile]
) -> Iterator[Weight]:
    """Yield one weight per part: [rows, cols] of stored elements, each projection with its rows.

    A part that covers all rows at once belongs to every projection. `tiles` may be finer than those
    that are `stored`: the part's elements are then repeated.
    """
    for part, ref in weight.parts.items():
        tile = tiles[part]
        extent = extent_of(tile, weight.rows, weight.cols)
        projections = tuple(
            (part_key(name, part), _stored_rows(weight, tile, rows, extent[0]))
            for name, rows in weight.projections
        )
        turned = tile.axes in ("rc", "cr") and (tile.axes == "cr") != weight.transposed
        part_weight = _raw(weight, ref, extent, projections, weight.slots, transposed=turned)
        own = stored[part]
        if own != tile:
            finer = {"rows": (own.rows or 1) // (tile.rows or 1)}
            finer["cols"] = (own.cols or 1) // (tile.cols or 1)
            part_weight = replace(
                part_weight, codec="repeated", params={"dtype": ref.dtype, **finer}
            )
        yield part_weight


def beside(owner: Weight, part: str, ref: TensorRef) -> Weight:
    """Return the weight of a number that lies beside another one's parts (input_scale)."""
    slots = owner.slots if owner.slots and ref.shape[:1] == (owner.slots,) else None
    cols = element_count(ref.shape[1:] if slots else ref.shape)
    projections = tuple((part_key(name, part), Span(0, 1)) for name, _ in owner.projections)
    return _raw(owner, ref, (1, cols), projections, slots)


def alone(stack: str, layer: int | None, name: str, ref: TensorRef) -> Weight:
    """Return the weight of a number that belongs to no weight (a cache's scale)."""
    rows = ref.shape[0] if ref.shape else 1
    return Weight(
        name=ref.name,
        codec=_codec(ref),
        rows=rows,
        cols=element_count(ref.shape[1:]),
        slots=None,
        parts={"weight": ref},
        transposed=False,
        params={"dtype": ref.dtype},
        stack=stack,
        layer=layer,
        expert=None,
        projections=((name, Span(0, rows)),),
        shape=ref.shape,
        form_transposed=False,
        is_expert=False,
    )


def _raw(
    weight: Weight,
    ref: TensorRef,
    extent: tuple[int, int],
    projections: tuple[tuple[str, Span], ...],
    slots: int | None,
    *,
    transposed: bool = False,
) -> Weight:
    return Weight(
        name=ref.name,
        codec=_codec(ref),
        rows=extent[0],
        cols=extent[1],
        slots=slots,
        parts={"weight": ref},
        transposed=transposed,
        params={"dtype": ref.dtype},
        stack=weight.stack,
        layer=weight.layer,
        expert=weight.expert,
        projections=projections,
        shape=ref.shape,
        form_transposed=transposed,
        is_expert=weight.is_expert,
    )


def _codec(ref: TensorRef) -> str:
    return "float" if ref.dtype in FLOAT_DTYPES else "raw"


def _stored_rows(weight: Weight, tile: Tile, rows: Span, extent: int) -> Span:
    """Return the stored rows of a projection; Refused where a block holds rows of two."""
    if tile.rows is None or tile.axes == "c":
        return Span(0, extent)
    if tile.rows == tile.pack_rows == 1:
        return rows
    start, cut = divmod(rows.start * tile.pack_rows, tile.rows)
    if rows.step > 1 or cut:
        raise Refused(
            f"a block of '{weight.name}' holds rows of two projections: they cannot be taken apart",
            hint="--dtype bf16 decodes it",
        )
    return Span(start, -(-rows.stop * tile.pack_rows // tile.rows))
