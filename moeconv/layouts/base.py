"""What a layout yields: output tensors as rectangles of keys, before they are laid out in files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from moeconv.types import Json, Span


class Fill(NamedTuple):
    """A run of rectangles: slot i of a tensor takes `rows` x `cols` of key (name, experts[i]).

    Each lands at (at_row + k * row_step, at_col) of its slot's matrix and owns `own_rows` rows (of
    `row_step`) x `own_cols` columns there; what the source does not reach of them is zero.
    `experts` is None where the key is no expert.
    """

    stack: str
    layer: int | None
    name: str
    experts: tuple[int, ...] | None
    rows: Span
    cols: Span
    at_row: int = 0
    row_step: int = 1
    at_col: int = 0
    own_rows: int = 0
    own_cols: int = 0


class Draft(NamedTuple):
    """One output tensor of one rank: `slots` matrices [rows, cols], stored [cols, rows] if
    transposed.

    `constant`: every element, where the source has no such tensor.
    `encode`, `part`: its one fill is rounded to BF16 and packed ("amxint4"); the tensor, which has
    one dimension, is the "weight" or the "scale" that come of it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    slots: int
    rows: int
    cols: int
    fills: tuple[Fill, ...] = ()
    transposed: bool = False
    constant: float | None = None
    rank: int = 0
    layer: int | None = None
    encode: str = ""
    part: str = ""

    @property
    def decoded(self) -> str:
        """Return the dtype that the source is decoded to."""
        return "BF16" if self.encode else self.dtype


class Layouted(NamedTuple):
    """What a layout makes of a model: drafts, the keys it leaves out by name, and what to say.

    `unused`: key name (or tensor name) -> the rule that drops it. `facts`: for the manifest.
    """

    drafts: tuple[Draft, ...]
    unused: Mapping[str, str]
    facts: Mapping[str, Json]
    notes: tuple[str, ...] = ()
