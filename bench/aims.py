"""What is aimed at, beside what was measured: whether it is met is computed, never typed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

MET, MISSED = "yes", "**no**"


class Aim(NamedTuple):
    """A bound on one figure; `most`: from above, else from below; `form`: how both are written.

    `why`: what stands in the way, said where the aim is missed.
    """

    text: str
    value: float
    bound: float
    most: bool = False
    form: str = ".2f"
    why: str = ""

    @property
    def met(self) -> bool:
        return self.value <= self.bound if self.most else self.value >= self.bound


def table(aims: Sequence[Aim]) -> list[str]:
    """Return the Markdown rows, one an aim, and a list of why some are missed."""
    lines = ["| aim | bound | measured | met |", "|---|---|---|---|"]
    for aim in aims:
        sign = "at most" if aim.most else "at least"
        value, bound = (format(number, aim.form) for number in (aim.value, aim.bound))
        lines.append(f"| {aim.text} | {sign} {bound} | {value} | {MET if aim.met else MISSED} |")
    told = [f"- {aim.text}: {aim.why}" for aim in aims if aim.why and not aim.met]
    return [*lines, "", "What stands in the way:", "", *told] if told else lines


def count(lines: Sequence[str]) -> tuple[int, int]:
    """Return how many aims a page's tables state, and how many of them are met."""
    ends = [line.rsplit("|", 2)[1].strip() for line in lines if line.startswith("| ")]
    met, missed = ends.count(MET), ends.count(MISSED)
    return met + missed, met
