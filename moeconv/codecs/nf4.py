"""NF4 of bitsandbytes: 4-bit table codes in one flat run, one scale per run of `blocksize`.

The flat run takes no notice of rows, so every part is read whole, whatever the window. The matrix
shape stands only in the payload of the quant_state part: whoever detects codecs puts that JSON
text into `QuantScheme.values["quant_state"]`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from moeconv.codecs.base import QuantScheme, Tile, Window
from moeconv.errors import BadSource, ShapeMismatch
from moeconv.types import Params, TensorRef

if TYPE_CHECKING:
    import torch

STATE = "weight.quant_state.bitsandbytes__nf4"
FLAT_PARTS = frozenset(("weight", "weight.absmax", "weight.quant_map", STATE))
NESTED_PARTS = frozenset(("weight.nested_absmax", "weight.nested_quant_map"))
NF4_CODES = 16
NESTED_CODES = 256  # of the scales, where they are quantized too


@dataclass(frozen=True, slots=True)
class Nf4:
    """w[i] = quant_map[q[i]] * absmax[i // blocksize], i = n * cols + k, high nibble first.

    Nested: absmax[b] = nested_quant_map[a[b]] * nested_absmax[b // nested_blocksize] + offset.
    """

    name: str = "nf4"
    reference_nbytes: int = 26

    def tiles(self, params: Params) -> Mapping[str, Tile]:
        count = int(params["rows"]) * int(params["cols"])
        blocks = -(-count // int(params["blocksize"]))
        nested = int(params["nested_blocksize"])
        tiles = {
            "weight": Tile(("U8",), rows=None, cols=None, pack_rows=-(-count // 2)),
            "weight.absmax": _vector("U8" if nested else "F32", blocks),
            "weight.quant_map": _vector("F32", NF4_CODES),
            STATE: _vector("U8", int(params["state_nbytes"])),
        }
        if nested:
            tiles["weight.nested_absmax"] = _vector("F32", -(-blocks // nested))
            tiles["weight.nested_quant_map"] = _vector("F32", NESTED_CODES)
        return tiles

    def detect(self, found: Mapping[str, TensorRef], scheme: QuantScheme) -> Params | None:
        """Return what the quant_state says; BadSource if it was not given or cannot be read."""
        nested = set(found) == FLAT_PARTS | NESTED_PARTS
        if not (nested or set(found) == FLAT_PARTS) or found["weight"].dtype != "U8":
            return None
        state = _read_state(found[STATE], scheme)
        if (state.nested_blocksize > 0) != nested:
            raise _bad_state(found[STATE], "does not agree with the nested parts in the file")
        pairs = -(-state.rows * state.cols // 2)
        if found["weight"].shape != (pairs, 1):
            raise ShapeMismatch(
                f"'{found['weight'].name}' has shape {list(found['weight'].shape)}, expected"
                f" [{pairs}, 1] for an nf4 weight [{state.rows}, {state.cols}]",
                where=found["weight"].file,
                hint="the file is damaged",
            )
        return {**state._asdict(), "state_nbytes": found[STATE].shape[0]}

    def shape(self, found: Mapping[str, TensorRef], params: Params) -> tuple[int, ...]:
        return int(params["rows"]), int(params["cols"])

    def decode(
        self, parts: Mapping[str, torch.Tensor], window: Window, params: Params
    ) -> torch.Tensor:
        """Return float32 [R, C] of the window, from parts that are whole."""
        import torch

        packed = parts["weight"].flatten()
        rows = torch.arange(window.row_start, window.row_stop, device=packed.device)
        cols = torch.arange(window.col_start, window.col_stop, device=packed.device)
        at = rows[:, None] * int(params["cols"]) + cols  # [R, C] places in the flat run
        pairs = packed[at // 2]
        codes = torch.where(at % 2 == 0, pairs >> 4, pairs & 15)
        values = parts["weight.quant_map"].flatten()[codes.long()]
        return values * _absmax(parts, params)[at // int(params["blocksize"])]


def _vector(dtype: str, count: int) -> Tile:
    """Return the tile of a vector that belongs to the weight as a whole."""
    return Tile((dtype,), cols=None, axes="c", elements=count)


def _absmax(parts: Mapping[str, torch.Tensor], params: Params) -> torch.Tensor:
    """Return float32 [blocks], out of the table of tables where it is nested."""
    import torch

    stored = parts["weight.absmax"].flatten()
    nested = int(params["nested_blocksize"])
    if not nested:
        return stored
    values = parts["weight.nested_quant_map"].flatten()[stored.long()]
    scales = parts["weight.nested_absmax"].flatten()
    scales = scales[torch.arange(len(stored), device=stored.device) // nested]  # [blocks]
    return values * scales + float(params["nested_offset"])


class State(NamedTuple):
    """What the JSON of a quant_state says; `nested_blocksize` 0 where the scales are plain."""

    rows: int
    cols: int
    blocksize: int
    nested_blocksize: int
    nested_offset: float


def _read_state(ref: TensorRef, scheme: QuantScheme) -> State:
    text = scheme.values.get("quant_state")
    if not isinstance(text, str):
        raise _bad_state(ref, "was not read")
    try:
        raw = json.loads(text)
        rows, cols = raw["shape"]
        state = State(
            int(rows),
            int(cols),
            int(raw["blocksize"]),
            int(raw.get("nested_blocksize", 0)),
            float(raw.get("nested_offset", 0.0)),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _bad_state(ref, "is not the JSON of an nf4 matrix") from error
    if min(state.rows, state.cols, state.blocksize) < 1 or state.nested_blocksize < 0:
        raise _bad_state(ref, "gives a shape or a block size below 1")
    return state


def _bad_state(ref: TensorRef, what: str) -> BadSource:
    return BadSource(
        f"'{ref.name}' {what}",
        where=ref.file,
        hint="the shape of a bitsandbytes weight stands nowhere else",
    )
