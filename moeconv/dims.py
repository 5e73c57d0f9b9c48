"""The axes mini-language: how the experts' matrices lie in one stored tensor.

    R C          one matrix per tensor               E R C        stacked over experts
    R            a vector (bias) per tensor          E R          stacked vectors
    E (P R) C    projections one after another       E (R P) C    row by row in turn (interleaved)
    E C (P R)    the same, stored transposed         (E R) C      experts flattened into the rows

R: out features of one projection, C: in features, E: experts, P: projections.
"""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

from moeconv.types import Span

_GROUP = re.compile(r"\(([ERCP](?: [ERCP])+)\)|([ERC])")


class Dims(NamedTuple):
    """A parsed dims text."""

    text: str
    groups: tuple[tuple[str, ...], ...]

    @property
    def stacked(self) -> bool:
        return any("E" in group for group in self.groups)

    @property
    def vector(self) -> bool:
        return not any("C" in group for group in self.groups)

    @property
    def transposed(self) -> bool:
        """True where C comes before R in memory."""
        order = [axis for group in self.groups for axis in group]
        return not self.vector and order.index("C") < order.index("R")

    @property
    def fused(self) -> bool:
        return any("P" in group for group in self.groups)

    @property
    def interleaved(self) -> bool:
        order = [axis for group in self.groups for axis in group]
        return self.fused and order.index("R") < order.index("P")

    def shape(self, experts: int, projections: int, rows: int, cols: int) -> tuple[int, ...]:
        """Return the tensor shape for E, P, R (of one projection) and C."""
        extent = {"E": experts, "P": projections, "R": rows, "C": cols}
        shape = []
        for group in self.groups:
            product = 1
            for axis in group:
                product *= extent[axis]
            shape.append(product)
        return tuple(shape)

    def rows_of(self, index: int, projections: int, rows: int) -> Span:
        """Return the rows of projection `index` in a slot's matrix of projections * rows rows."""
        if self.interleaved:
            return Span(index, projections * rows, projections)
        return Span(index * rows, (index + 1) * rows)


@cache
def parse_dims(text: str) -> Dims:
    """Parse a dims text; a ValueError names a text that the language does not have."""
    groups: list[tuple[str, ...]] = []
    rest = text
    while rest:
        match = _GROUP.match(rest)
        if match is None:
            raise ValueError(f"dims {text!r}: cannot read {rest!r}")
        groups.append(tuple((match[1] or match[2]).split(" ")))
        rest = rest[match.end() :].lstrip(" ")
    axes = [axis for group in groups for axis in group]
    if len(set(axes)) != len(axes) or "R" not in axes:
        raise ValueError(f"dims {text!r}: every axis once, and R among them")
    if "E" in axes and axes[0] != "E":
        raise ValueError(f"dims {text!r}: E must come first")
    if any("P" in group and "R" not in group for group in groups):
        raise ValueError(f"dims {text!r}: P lies beside R")
    return Dims(text, tuple(groups))
