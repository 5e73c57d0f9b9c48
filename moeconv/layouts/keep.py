"""`--dtype keep` into the vllm layout: quantized weights cut and joined as they are stored.

Names, dtypes and shapes of parameters as `create_weights` of vLLM 0.32's quantization methods.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from moeconv.codecs.base import Tile, stored_count
from moeconv.errors import Refused
from moeconv.layouts.base import Draft, Fill
from moeconv.layouts.keep_extras import Joined, invented, model_dtype
from moeconv.layouts.options import Options
from moeconv.layouts.partition import Part, Rank
from moeconv.layouts.raw import WHOLE, part_key
from moeconv.layouts.vllm_split import Splitter, View
from moeconv.types import FLOAT_DTYPES, Key, Place, Span, Weight

# vLLM's words where they are not the checkpoint's.
RENAMED: Mapping[tuple[str, str], str] = {
    ("mxfp4", "blocks"): "weight",
    ("mxfp4", "scales"): "weight_scale",
    ("mxfp4", "scale"): "weight_scale",
    ("fp8-tensor", "activation_scale"): "input_scale",
}
BESIDE = ("input_scale", "activation_scale", "input_global_scale")
CODECS = (
    "fp8-block",
    "fp8-channel",
    "fp8-tensor",
    "mxfp8",
    "mxfp4",
    "nvfp4-ct",
    "nvfp4-modelopt",
    "packed-int",
    "int-quantized",
    "gptq",
    "awq",
)
# Codecs whose group scales have the model's dtype in vLLM; those of all others are float32.
MODEL_DTYPE_SCALES = ("packed-int", "gptq", "awq")
ORDER_PARTS = ("g_idx", "weight_g_idx")
# Rows that vLLM builds without a quantization, whatever the config says.
PLAIN_ROWS = (
    "gate.weight",
    "router.weight",
    "norm.weight",
    "conv1d.weight",
    "embed_tokens.weight",
    "embedding.weight",
    "lm_head.weight",
)
UNUSED: Mapping[str, str] = {
    "weight_shape": "vLLM keeps one shape of the weights that it joins",
    "input_scale": "vLLM keeps one input scale of the experts that it joins",
    "activation_scale": "vLLM keeps one input scale of the experts that it joins",
    "g_idx": "groups are in order: vLLM has no index of them",
    "weight_g_idx": "groups are in order: vLLM has no index of them",
    "kv_scale": "vLLM has a scale for keys and one for values",
    **{
        f"{which}_{what}": "vLLM has no such parameter for this quantization"
        for which in "qkv"
        for what in ("scale", "zero_point")
    },
}


class Param(NamedTuple):
    """One parameter that vLLM makes of a part; `name` follows "w13_" or the linear's name.

    `kind`: matrix (the pieces' rows one after another), scalars (one number of each piece), last
    (of the pieces' equal numbers the last one's).
    """

    part: str
    name: str
    kind: str
    dtype: str
    tile: Tile

    def shape(self, height: int, width: int, *, turned: bool, single: bool) -> tuple[int, ...]:
        """Return the shape of one slot; `single`: an expert's number that is no vector."""
        if self.kind == "scalars":
            return () if single else (height,)
        if self.kind == "last":
            return (width,) if self.part == "weight_shape" else ()
        return (width, height) if turned else (height, width)


def unused_parts(view: View, *, experts_only: bool) -> dict[str, str]:
    """Return key name -> rule of the parts that vLLM may have no parameter for."""
    names = {
        key.name
        for key in view.held or ()
        if "/" in key.name and (key.expert is not None or not experts_only)
    }
    return {
        name: UNUSED[part] for name in sorted(names) if (part := name.rpartition("/")[2]) in UNUSED
    }


class Keeper:
    """One rank's quantized rows -> drafts, part by part."""

    def __init__(self, split: Splitter) -> None:
        self.split = split
        self.view = split.view
        self.rank = split.rank
        self.options = split.options

    def drafts(self, joined: Joined) -> Iterator[Draft]:
        """Yield the drafts of a row's parts; Refused for what vLLM could not load."""
        self.check(joined)
        for param in self.params(joined):
            yield self.draft(joined, param)
        if joined.row.experts:
            parts = {param.part for param in self.params(joined)}
            yield from invented(self.view, joined, parts, self.rank.number)

    def check(self, joined: Joined) -> None:
        """Raise Refused for a quantization that vLLM does not have for this row."""
        weight = joined.places[0].weight
        hint = "--dtype bf16 decodes it"
        if weight.codec not in CODECS:
            raise Refused(
                f"vLLM's form of {weight.codec} ('{weight.name}') is not known", hint=hint
            )
        if weight.params.get("act_order"):
            raise Refused(
                f"'{weight.name}' is quantized in activation order (desc_act, g_idx), which vLLM "
                "no longer loads",
                hint=hint,
            )
        if joined.row.name.endswith(PLAIN_ROWS):
            raise Refused(f"'{weight.name}' is {weight.codec}; vLLM holds it plain", hint=hint)
        for place in joined.places:
            other = place.weight
            if (other.codec, set(other.parts)) != (weight.codec, set(weight.parts)):
                raise Refused(
                    f"vLLM joins '{weight.name}' ({weight.codec}) and '{other.name}' "
                    f"({other.codec}), which are quantized differently",
                    hint=hint,
                )

    def params(self, joined: Joined) -> list[Param]:
        """Return vLLM's parameters for a row."""
        weight = joined.places[0].weight
        assert self.view.tiles is not None
        tiles = self.view.tiles(weight, self.options)
        parts = [part for part in weight.parts if part not in ORDER_PARTS]
        parts += [part for part in BESIDE if self.place(joined, -1, part) is not None]
        return [self.param(joined, part, tiles.get(part, WHOLE)) for part in parts]

    def param(self, joined: Joined, part: str, tile: Tile) -> Param:
        """Return vLLM's parameter for one part."""
        codec, experts = joined.places[0].weight.codec, joined.row.experts
        place = self.place(joined, -1, part)
        assert place is not None
        name = RENAMED.get((codec, part), part)
        dtype = str(place.weight.params["dtype"])
        kind = "matrix"
        if part == "weight_shape":
            return Param(part, name, "last", model_dtype(self.view) if experts else dtype, tile)
        if tile.rows is None and tile.cols is None:
            single = experts and name == "input_scale" and not codec.startswith("nvfp4")
            kind = "last" if single else "scalars"
        if "scale" in part and dtype in FLOAT_DTYPES and codec not in MODEL_DTYPE_SCALES:
            dtype = "F32"
        return Param(part, name, kind, dtype, tile)

    def place(self, joined: Joined, index: int, part: str) -> Place | None:
        """Return where a part of one of the pieces lies."""
        assert self.view.held is not None
        expert = 0 if joined.row.experts else None
        key = part_key(joined.row.pieces[index].key, part)
        return self.view.held.get(Key("main", joined.layer, expert, key))

    def draft(self, joined: Joined, param: Param) -> Draft:
        """Return the draft of one parameter."""
        many = range(len(joined.places))
        indices = many[-1:] if param.kind == "last" else many
        windows = [self.stored(joined, param, index) for index in indices]
        height, width = sum(rows.extent for rows, _ in windows), windows[0][1].extent
        place = self.place(joined, -1, param.part)
        assert place is not None
        turned = place.weight.transposed
        shape = param.shape(height, width, turned=turned, single=joined.single)
        slots = 1 if joined.experts is None else len(joined.experts)
        woven = joined.row.interleaved and param.kind == "matrix"
        fills = []
        at = 0
        for order, (index, (rows, cols)) in enumerate(zip(indices, windows, strict=True)):
            fills.append(
                Fill(
                    "main",
                    joined.layer,
                    part_key(joined.row.pieces[index].key, param.part),
                    joined.experts,
                    Span(rows.start, rows.stop),
                    Span(cols.start, cols.stop),
                    at_row=order if woven else at,
                    row_step=len(windows) if woven else 1,
                    own_rows=rows.extent,
                    own_cols=cols.extent,
                )
            )
            at += rows.extent
        return Draft(
            joined.name[: -len("weight")] + param.name,
            param.dtype,
            shape if joined.experts is None else (slots, *shape),
            slots,
            height,
            width,
            tuple(fills),
            transposed=turned,
            rank=self.rank.number,
            layer=joined.layer,
        )

    def stored(self, joined: Joined, param: Param, index: int) -> tuple[Part, Part]:
        """Return the window of a piece in stored elements; Refused where it cuts a block."""
        place = joined.places[index]
        window = joined.windows[index]
        last = index == len(joined.places) - 1
        found = stored_window(param.tile, window, place, last=last)
        if found is None:
            raise self.cut(joined, param)
        return found

    def cut(self, joined: Joined, param: Param) -> Refused:
        """Return the refusal of a split through blocks, with the --tp that cut none."""
        works = [tp for tp in range(1, 65) if self.works(joined, param, tp)]
        block = " x ".join(str(size or "all") for size in (param.tile.rows, param.tile.cols))
        padding = " and --pad-hidden" if self.options.pad_hidden else ""
        return Refused(
            f"blocks of {block} (rows x cols) do not fit the parts of '{joined.name}' "
            f"({joined.places[0].weight.codec}, {param.part}) at --tp {self.options.tp}{padding}",
            hint="--dtype bf16 decodes it, for any split"
            + (f"; --tp that work with keep: {', '.join(map(str, works))}" if works else ""),
        )

    def works(self, joined: Joined, param: Param, tp: int) -> bool:
        """Return whether some other --tp cuts no block of a parameter."""
        options = replace(self.options, tp=tp, dp=1)
        rank = Rank(tp - 1, tp - 1, tp, tp)
        split = Splitter(self.view, options, rank, blocks=self.split.blocks)
        try:
            windows = [
                split.window(piece, place)
                for piece, place in zip(joined.row.pieces, joined.places, strict=True)
            ]
        except Refused:
            return False
        if any(not rows.stop - rows.start or not cols.stop - cols.start for rows, cols in windows):
            return False  # nothing is left for the last rank
        assert self.view.tiles is not None
        tile = self.view.tiles(joined.places[0].weight, options).get(param.part, WHOLE)
        return all(
            stored_window(tile, window, place, last=place is joined.places[-1]) is not None
            for window, place in zip(windows, joined.places, strict=True)
        )


def stored_window(
    tile: Tile, window: tuple[Part, Part], place: Place, *, last: bool
) -> tuple[Part, Part] | None:
    """Return a window in stored elements of a part; None where it cuts a tile.

    A ragged last tile of rows is whole only where no other piece follows it.
    """
    rows = _scaled(window[0], place.rows.length, tile.rows, tile.pack_rows)
    cols = _scaled(window[1], place.weight.cols, tile.cols, tile.elements)
    if tile.axes == "c":
        rows = Part(0, 1, 1)
    if tile.axes == "r":
        cols = Part(0, 1, 1)
    if rows is None or cols is None:
        return None
    ragged = tile.rows is not None and window[0].stop * tile.pack_rows % tile.rows
    return None if ragged and not last and tile.axes != "c" else (rows, cols)


def _scaled(part: Part, length: int, tile: int | None, count: int) -> Part | None:
    """Return elements [start, stop) of an axis as stored elements; None where a tile is cut."""
    if tile is None:
        return Part(0, count, count)
    stored = stored_count(length, tile, count)
    start, start_cut = divmod(part.start * count, tile)
    stop, stop_cut = divmod(part.stop * count, tile)
    extent, extent_cut = divmod(part.extent * count, tile)
    if part.stop == length:
        stop, stop_cut = stored, 0
    if part.start == length:
        start, start_cut = stored, 0
    if part.extent == part.stop - part.start:
        extent, extent_cut = stop - start, 0
    if start_cut or stop_cut or extent_cut:
        return None
    return Part(start, stop, extent)


def shares_blocks(view: View, options: Options) -> bool:
    """Return whether gpt-oss' experts are kept in MXFP4, whose blocks vLLM deals out whole."""
    return (
        view.held is not None
        and options.dtype == "keep"
        and view.family == "gpt_oss"
        and any(_is_mxfp4_expert(place.weight) for place in view.places.values())
    )


def _is_mxfp4_expert(weight: Weight) -> bool:
    return weight.is_expert and weight.codec == "mxfp4"
