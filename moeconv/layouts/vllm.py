"""The vllm layout: one file per rank, parameters as `--load-format sharded_state` reads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from moeconv.errors import Refused, UnrecognizedTensor
from moeconv.layouts.base import Draft, Fill, Layouted
from moeconv.layouts.hf import weight_dtype
from moeconv.layouts.options import Options
from moeconv.layouts.partition import (
    Part,
    Rank,
    all_ranks,
    divisors,
    even,
    heads,
    kv_heads,
    mapped_experts,
    padded,
    place_experts,
    vocab,
    whole,
)
from moeconv.layouts.vllm_rows import TESTED, Architecture, Piece, Row
from moeconv.layouts.vllm_tables import ARCHITECTURES, GENERIC
from moeconv.types import Json, Key, Place, Span


class View(NamedTuple):
    """What the layout needs of a model."""

    family: str
    places: Mapping[Key, Place]
    expert_layers: Mapping[tuple[str, int], int]
    heads: int
    kv_heads: int
    layers: int
    tied: bool
    config: Mapping[str, Json]


def draft_vllm(view: View, options: Options) -> Layouted:
    """Return every rank's drafts; Refused where the ranks cannot hold the model.

    Raises UnrecognizedTensor for a tensor of the decoder that no row of the architecture takes.
    """
    architecture = find_architecture(view.family, experts_only=options.experts_only)
    if options.experts_only:
        rows = tuple(row for row in architecture.rows if row.experts)
        architecture = architecture._replace(rows=rows)
    _check_even(view, architecture, options)
    unused = _unused(view, architecture, experts_only=options.experts_only)
    drafts = [
        draft
        for rank in all_ranks(options.tp, options.dp)
        for draft in _Drafter(view, options, architecture, rank).drafts()
    ]
    facts = {
        "architecture": architecture.name,
        "tested_vllm": list(TESTED),
        "ranks": options.tp * options.dp,
        "experts": _expert_facts(view, options),
    }
    notes = []
    if options.dp > 1:
        notes.append("vLLM's own sharded_state loader addresses tensor-parallel ranks only (dp 1)")
    return Layouted(tuple(drafts), unused, facts, tuple(notes))


def find_architecture(family: str, *, experts_only: bool) -> Architecture:
    """Return the table for a family; Refused names a family without one, but for its experts."""
    for architecture in ARCHITECTURES:
        if family in architecture.families:
            return architecture
    if experts_only:
        return GENERIC
    known = ", ".join(name for one in ARCHITECTURES for name in one.families)
    raise Refused(
        f"the vllm layout has no table for family '{family}'",
        hint=f"families with one: {known}; any other: --experts-only",
    )


def _check_even(view: View, architecture: Architecture, options: Options) -> None:
    """Raise Refused where vLLM asserts that the ranks divide the experts, and they do not."""
    if not architecture.even_only or not options.ep or options.pads:
        return
    ranks = options.tp * options.dp
    for experts in view.expert_layers.values():
        if (experts + options.redundant_experts) % ranks:
            works = ", ".join(str(one) for one in divisors(experts))
            raise Refused(
                f"{experts} experts are not divided by {ranks} ranks, as {architecture.name} needs",
                hint=f"tp x dp that work: {works}",
            )


def _unused(view: View, architecture: Architecture, *, experts_only: bool) -> Mapping[str, str]:
    """Return stack or key -> rule of what this layout leaves out; raise for what it should know."""
    taken = {piece.key for row in architecture.rows for piece in row.pieces}
    unused = {
        piece.key: f"config.json says {row.flag} is off"
        for row in architecture.rows
        for piece in row.pieces
        if row.flag and not view.config.get(row.flag)
    }
    for key, place in view.places.items():
        if experts_only and key.expert is None:
            continue
        if key.stack.startswith("mtp"):
            unused[key.stack] = "MTP layers are not part of vLLM's sharded state"
        elif key.stack != "main":
            raise Refused(
                f"'{place.weight.name}' belongs to '{key.stack}', not to the text model",
                hint="vision-language models: --experts-only",
            )
        elif key.name == "lm_head.weight" and view.tied:
            unused[key.name] = "tie_word_embeddings: vLLM reads the embedding"
        elif key.name not in taken:
            ref = next(iter(place.weight.parts.values()))
            raise UnrecognizedTensor(
                f"'{ref.name}' has no row in the vllm table of {architecture.name}",
                where=ref.file,
                hint="--experts-only writes the experts alone",
            )
    return unused


def rank_experts(rank: Rank, experts: int, options: Options) -> tuple[int, ...]:
    """Return the logical experts in a rank's slots; all of them without --ep."""
    if not options.ep:
        return tuple(range(experts))
    if options.expert_map is not None:
        return mapped_experts(options.expert_map, rank, experts)
    return place_experts(experts, rank, options.placement, options.redundant_experts)


def _expert_facts(view: View, options: Options) -> list[list[int]]:
    experts = max(view.expert_layers.values())
    ranks = all_ranks(options.tp, options.dp)
    return [list(rank_experts(rank, experts, options)) for rank in ranks]


class _Drafter:
    """One rank's rows -> drafts."""

    def __init__(
        self, view: View, options: Options, architecture: Architecture, rank: Rank
    ) -> None:
        self.view = view
        self.options = options
        self.architecture = architecture
        self.rank = rank
        self.moe = {layer for stack, layer in view.expert_layers if stack == "main"}

    def drafts(self) -> Iterator[Draft]:
        """Yield this rank's drafts, layer by layer."""
        for row in self.architecture.rows:
            if row.when == "model":
                yield from self.row(row, None)
        for layer in range(self.view.layers):
            kind = "moe" if layer in self.moe else "dense"
            for row in self.architecture.rows:
                if row.when in ("layer", kind):
                    yield from self.row(row, layer)

    def row(self, row: Row, layer: int | None) -> Iterator[Draft]:
        """Yield the draft of a row; none where an optional one has no source."""
        routed = self.options.vllm_names == "routed" or not row.plain
        below = row.name if routed else row.plain
        name = below if layer is None else f"model.layers.{layer}.{below}"
        if row.constant is not None:
            yield Draft(
                name,
                row.dtype,
                (),
                1,
                1,
                1,
                constant=row.constant,
                rank=self.rank.number,
                layer=layer,
            )
            return
        if not self.applies(row, layer):
            return
        first = 0 if row.experts else None
        places = [
            self.view.places.get(Key("main", layer, first, self.key(row, piece)))
            for piece in row.pieces
        ]
        present = [place for place in places if place is not None]
        if not present and row.optional:
            return
        if len(present) < len(places):
            lost = ", ".join(
                piece.key for piece, place in zip(row.pieces, places, strict=True) if not place
            )
            raise UnrecognizedTensor(
                f"'{name}' needs {lost}, which the source does not have",
                hint="the checkpoint is incomplete, or of a variant that this table does not know",
            )
        yield self.matrix(row, layer, name, present)

    def applies(self, row: Row, layer: int | None) -> bool:
        """Return whether this model, at this layer, has the row at all."""
        if row.flag and not self.view.config.get(row.flag):
            return False
        if self.view.tied and row.pieces[0].key == "model.embed_tokens.weight":
            return False  # one storage: vLLM keeps the smaller name, lm_head.weight
        if not row.given:
            return True
        there = Key("main", layer, None, row.given.lstrip("!")) in self.view.places
        return there != row.given.startswith("!")

    def key(self, row: Row, piece: Piece) -> str:
        """Return the key that a piece is read from."""
        if self.view.tied and row.name == "lm_head.weight":
            return "model.embed_tokens.weight"
        return piece.key

    def matrix(self, row: Row, layer: int | None, name: str, places: Sequence[Place]) -> Draft:
        """Return the draft of a row from the places of its pieces (of expert 0)."""
        experts = None
        if row.experts:
            count = self.view.expert_layers["main", layer or 0]
            experts = rank_experts(self.rank, count, self.options)
        windows = [
            self.window(piece, place) for piece, place in zip(row.pieces, places, strict=True)
        ]
        height = sum(rows.extent for rows, _ in windows)
        width = windows[0][1].extent
        dtype = row.dtype or weight_dtype(places[0].weight, self.options)
        vector = len(places[0].weight.shape) == (2 if row.experts and _stacked(places) else 1)
        shape: tuple[int, ...] = (height,) if vector else (height, width)
        if experts is not None:
            shape = (len(experts), *shape)
        slots = 1 if experts is None else len(experts)
        draft = Draft(name, dtype, shape, slots, height, width, rank=self.rank.number, layer=layer)
        if row.pieces[0].split == "rank0" and self.rank.number and not self.options.ep:
            return draft._replace(constant=0.0)
        return draft._replace(fills=self.fills(row, layer, experts, windows))

    def fills(
        self,
        row: Row,
        layer: int | None,
        experts: tuple[int, ...] | None,
        windows: Sequence[tuple[Part, Part]],
    ) -> tuple[Fill, ...]:
        """Return the fills of a row's pieces: one after another, or row by row in turn."""
        fills = []
        at = 0
        for index, (piece, (rows, cols)) in enumerate(zip(row.pieces, windows, strict=True)):
            fills.append(
                Fill(
                    "main",
                    layer,
                    self.key(row, piece),
                    experts,
                    Span(rows.start, rows.stop),
                    Span(cols.start, cols.stop),
                    at_row=index if row.interleaved else at,
                    row_step=len(windows) if row.interleaved else 1,
                    own_rows=rows.extent,
                    own_cols=cols.extent,
                )
            )
            at += rows.extent
        return tuple(fills)

    def window(self, piece: Piece, place: Place) -> tuple[Part, Part]:
        """Return the (rows, cols) of a piece that this rank holds."""
        rows, cols = whole(place.rows.length), whole(place.weight.cols)
        axis, _, kind = piece.split.partition(" ")
        if axis == "rows":
            rows = self.part(kind, piece.key, rows.extent)
        elif axis == "cols":
            cols = self.part(kind, piece.key, cols.extent)
        if piece.key == "down.bias":
            rows = padded(rows, self.options.pad_hidden)
        elif kind == "expert" and "bias" not in piece.key:
            hidden = cols if axis == "rows" else rows
            grown = padded(hidden, self.options.pad_hidden)
            return (rows, grown) if axis == "rows" else (grown, cols)
        return rows, cols

    def part(self, kind: str, what: str, extent: int) -> Part:
        """Return this rank's part of an axis that is split in the way `kind` names."""
        rank, options = self.rank, self.options
        if kind == "heads":
            return heads(what, extent, self.view.heads, rank)
        if kind == "kv":
            return kv_heads(what, extent, self.view.kv_heads, rank)
        if kind == "vocab":
            return vocab(what, extent, rank)
        if kind == "inter":
            return even(what, extent, rank.tp_rank, rank.tp, pad=options.pads)
        if options.ep:
            return padded(whole(extent), options.pad_intermediate)
        part = even(f"{what}: intermediate size", extent, rank.number, rank.ranks, pad=options.pads)
        return padded(part, options.pad_intermediate)


def _stacked(places: Iterable[Place]) -> bool:
    return any(place.weight.slots is not None for place in places)
