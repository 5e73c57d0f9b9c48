"""How the vllm layout's ranks share each axis of a weight, and what it asks of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from moeconv.codecs.base import Tile
from moeconv.errors import BadSource
from moeconv.layouts.options import Options
from moeconv.layouts.partition import Part, Rank, even, heads, kv_heads, padded, vocab, whole
from moeconv.layouts.vllm_rows import Piece
from moeconv.types import Json, Key, Place, Weight

MXFP4_BLOCK = 32
GATED = ("qwen3_next", "qwen3_5_moe")  # q_proj holds a gate beside each head


class View(NamedTuple):
    """What the layout needs of a model.

    With `--dtype keep` of a quantized one also: `method`, its quantization; `held`, where the parts
    of its weights lie; `tiles`, how a weight's parts cover it.
    """

    family: str
    places: Mapping[Key, Place]
    expert_layers: Mapping[tuple[str, int], int]
    heads: int
    kv_heads: int
    layers: int
    tied: bool
    config: Mapping[str, Json]
    method: str = ""
    held: Mapping[Key, Place] | None = None
    tiles: Callable[[Weight, Options], Mapping[str, Tile]] | None = None

    def keeps(self, weight: Weight) -> bool:
        """Return whether a weight goes into the output part by part."""
        return self.held is not None and weight.codec not in ("float", "raw")


class Splitter:
    """The windows of one rank."""

    def __init__(self, view: View, options: Options, rank: Rank, *, blocks: bool) -> None:
        """`blocks`: the experts' MXFP4 blocks are dealt out whole, as vLLM does for gpt-oss."""
        self.view = view
        self.options = options
        self.rank = rank
        self.blocks = blocks

    def window(self, piece: Piece, place: Place) -> tuple[Part, Part]:
        """Return the (rows, cols) of a piece that this rank holds."""
        rows, cols = whole(place.rows.length), whole(place.weight.cols)
        axis, _, kind = piece.split.partition(" ")
        if piece.section >= 0:
            first, length = linear_section(self.view.config, piece.section)
            part = self.part(kind, piece.key, length)
            rows = Part(first + part.start, first + part.stop, part.extent)
        elif axis == "rows":
            check_heads(self.view, piece, kind, rows.extent)
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
        if kind in ("keys", "values"):
            return heads(what, extent, linear_heads(self.view.config, kind), rank)
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
        name = f"{what}: intermediate size"
        part = even(name, extent, rank.number, rank.ranks, pad=options.pads)
        if self.blocks:
            blocks = -(-extent // MXFP4_BLOCK)
            per = -(-blocks // rank.ranks) * MXFP4_BLOCK
            start, stop = (min(index * per, extent) for index in (rank.number, rank.number + 1))
            part = Part(start, stop, per)
        return padded(part, options.pad_intermediate)


def check_heads(view: View, piece: Piece, kind: str, rows: int) -> None:
    """Raise BadSource where q, k or v has not as many rows as the config's heads take.

    Checked where the config says head_dim; MLA's heads are of several sizes.
    """
    text = text_config(view.config)
    size = text.get("head_dim")
    name = piece.key.removeprefix("self_attn.").partition("_proj.")[0]
    if name not in ("q", "k", "v") or not isinstance(size, int) or text.get("kv_lora_rank"):
        return
    count = view.kv_heads if kind == "kv" else view.heads
    gated = name == "q" and view.family in GATED and text.get("attn_output_gate", True)
    wanted = count * size * (2 if gated else 1)
    if rows != wanted:
        raise BadSource(
            f"'{piece.key}' has {rows} rows; {count} heads of {size}"
            f"{' with their gates' if gated else ''} take {wanted}",
            where="config.json",
            hint="config.json does not belong to these files",
        )


def text_config(config: Mapping[str, Json]) -> Mapping[str, Json]:
    """Return the section of the text model, or the config itself."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def linear_heads(config: Mapping[str, Json], kind: str) -> int:
    """Return the heads of linear attention; `kind`: "keys" or "values"."""
    return int(text_config(config).get(f"linear_num_{kind[:-1]}_heads") or 1)


def linear_section(config: Mapping[str, Json], section: int) -> tuple[int, int]:
    """Return (first row, rows) of queries, keys or values (0, 1, 2) in a linear attention's qkv."""
    text = text_config(config)
    keys, values = (
        linear_heads(config, kind) * int(text.get(f"linear_{kind[:-1]}_head_dim") or 0)
        for kind in ("keys", "values")
    )
    return section * keys, values if section == 2 else keys
