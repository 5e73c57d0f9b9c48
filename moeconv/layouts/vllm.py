"""The vllm layout: one file per rank, parameters as `--load-format sharded_state` reads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from moeconv.errors import Refused, UnrecognizedTensor
from moeconv.layouts.base import Draft, Fill, Layouted
from moeconv.layouts.hf import weight_dtype
from moeconv.layouts.keep import Keeper, shares_blocks, unused_parts
from moeconv.layouts.keep_extras import Joined, kept_scalars
from moeconv.layouts.options import Options
from moeconv.layouts.partition import Part, Rank, all_ranks
from moeconv.layouts.vllm_experts import (
    check_experts,
    expert_facts,
    rank_experts,
    serving_notes,
    shares_heads,
)
from moeconv.layouts.vllm_rows import TESTED, Architecture, Piece, Row
from moeconv.layouts.vllm_split import Splitter, View
from moeconv.layouts.vllm_tables import ARCHITECTURES, GENERIC
from moeconv.types import Key, Place, Span

WRAPPED = "model.language_model."
VISION = ("model.visual", "visual")
VISION_RULE = "the vision tower is not part of the text model's state"


def draft_vllm(view: View, options: Options) -> Layouted:
    """Return every rank's drafts; Refused where the ranks cannot hold the model.

    Raises UnrecognizedTensor for a tensor of the decoder that no row of the architecture takes.
    """
    architecture = find_architecture(view.family, experts_only=options.experts_only)
    if options.experts_only:
        rows = tuple(row for row in architecture.rows if row.experts)
        architecture = architecture._replace(rows=rows)
    check_experts(view, architecture, options)
    unused = _unused(view, architecture, experts_only=options.experts_only)
    drafts = [
        draft
        for rank in all_ranks(options.tp, options.dp)
        for draft in _Drafter(view, options, architecture, rank).drafts()
    ]
    facts = {
        "architecture": architecture.name,
        "tested_vllm": list(TESTED),
        "vllm_loads": options.dp == 1 and shares_heads(view, architecture, options),
        "ranks": options.tp * options.dp,
        **expert_facts(view, options),
    }
    notes = []
    if architecture.wrapper and is_wrapped(view) and not options.experts_only:
        notes.append("the vision tower is left out: serve with --language-model-only")
    notes += serving_notes(view, architecture, options)
    return Layouted(
        tuple(drafts),
        {**unused_parts(view, experts_only=options.experts_only), **unused},
        facts,
        tuple(notes),
    )


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
        if key.stack.startswith("mtp") or key.name.startswith("mtp."):
            name = key.stack if key.stack != "main" else key.name
            unused[name] = "MTP layers are not part of vLLM's sharded state"
        elif architecture.wrapper and key.stack.startswith(VISION):
            unused[key.stack] = VISION_RULE
        elif architecture.wrapper and key.name.startswith(tuple(f"{one}." for one in VISION)):
            unused[key.name] = VISION_RULE
        elif key.stack != "main":
            raise Refused(
                f"'{place.weight.name}' belongs to '{key.stack}', not to the text model",
                hint="vision-language models: --experts-only",
            )
        elif key.name == "lm_head.weight" and view.tied:
            unused[key.name] = "tie_word_embeddings: vLLM reads the embedding"
        elif key.name.replace(WRAPPED, "model.", 1) not in taken:
            ref = next(iter(place.weight.parts.values()))
            raise UnrecognizedTensor(
                f"'{ref.name}' has no row in the vllm table of {architecture.name}",
                where=ref.file,
                hint="--experts-only writes the experts alone",
            )
    return unused


def is_wrapped(view: View) -> bool:
    """Return whether the text model lies inside a vision-language model."""
    return any(key.layer is None and key.name.startswith(WRAPPED) for key in view.places)


class _Drafter:
    """One rank's rows -> drafts."""

    def __init__(
        self, view: View, options: Options, architecture: Architecture, rank: Rank
    ) -> None:
        self.view = view
        self.options = options
        self.architecture = architecture
        self.rank = rank
        self.split = Splitter(view, options, rank, blocks=shares_blocks(view, options))
        self.keeper = Keeper(self.split)
        self.wrapped = is_wrapped(view)
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
        if self.wrapped:
            name = self.architecture.wrapper + name
        if not self.applies(row, layer):
            return
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
            if name.endswith("._q_scale"):
                yield from kept_scalars(self.view, row, name, layer, self.rank.number)
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
        joined = self.join(row, layer, name, present)
        if any(self.view.keeps(place.weight) for place in present):
            yield from self.keeper.drafts(joined)
        else:
            yield self.matrix(joined)

    def applies(self, row: Row, layer: int | None) -> bool:
        """Return whether this model, at this layer, has the row at all."""
        if row.flag and not self.view.config.get(row.flag):
            return False
        if self.view.tied and row.pieces and row.pieces[0].key == "model.embed_tokens.weight":
            return False  # one storage: vLLM keeps the smaller name, lm_head.weight
        if not row.given:
            return True
        expert = 0 if row.experts else None
        there = Key("main", layer, expert, row.given.lstrip("!")) in self.view.places
        return there != row.given.startswith("!")

    def key(self, row: Row, piece: Piece) -> str:
        """Return the key that a piece is read from."""
        tied = self.view.tied and row.name == "lm_head.weight"
        key = "model.embed_tokens.weight" if tied else piece.key
        if self.wrapped and row.when == "model":
            return key.replace("model.", WRAPPED, 1) if key.startswith("model.") else key
        return key

    def join(self, row: Row, layer: int | None, name: str, places: Sequence[Place]) -> Joined:
        """Return a row with the windows of its pieces, from their places (of expert 0)."""
        experts = None
        if row.experts:
            count = self.view.expert_layers["main", layer or 0]
            experts = rank_experts(self.rank, count, self.options)
        windows = tuple(
            self.split.window(piece, place) for piece, place in zip(row.pieces, places, strict=True)
        )
        return Joined(row, name, layer, tuple(places), windows, experts)

    def matrix(self, joined: Joined) -> Draft:
        """Return the draft of a row of plain weights."""
        row, name, layer, places, windows, experts = joined
        height = sum(rows.extent for rows, _ in windows)
        width = windows[0][1].extent
        dtype = row.dtype or weight_dtype(places[0].weight, self.options)
        vector = len(places[0].weight.shape) == (2 if row.experts and _stacked(places) else 1)
        shape: tuple[int, ...] = (height,) if vector else (height, width)
        if not row.experts and len(places[0].weight.shape) > 2:
            shape = (height, *places[0].weight.shape[1:])  # a convolution's
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


def _stacked(places: Iterable[Place]) -> bool:
    """Return whether the shapes of the Hugging Face form begin with the experts.

    GGUF stacks experts that most of its models' forms have a tensor each for.
    """
    return any(
        place.weight.slots is not None
        and not any("{expert}" in form.name for form in place.weight.forms)
        for place in places
    )
