"""What is aimed at, beside what was measured: whether it is met is computed, never typed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

MET, MISSED = "yes", "**no**"
UNEXPLAINED = "**unexplained**"
STANDING = "What stands in the way:"


class Aim(NamedTuple):
    """A bound on one figure; `most`: from above, else from below; `form`: how both are written.

    `why`: what stands in the way, computed and said where the aim is missed, and only there.
    """

    text: str
    value: float
    bound: float
    why: Callable[[], str]
    most: bool = False
    form: str = ".2f"

    @property
    def met(self) -> bool:
        return self.value <= self.bound if self.most else self.value >= self.bound


def table(aims: Sequence[Aim]) -> list[str]:
    """Return the Markdown rows, one an aim, and a list of why some are missed: each has a line."""
    lines = ["| aim | bound | measured | met |", "|---|---|---|---|"]
    for aim in aims:
        sign = "at most" if aim.most else "at least"
        value, bound = (format(number, aim.form) for number in (aim.value, aim.bound))
        lines.append(f"| {aim.text} | {sign} {bound} | {value} | {MET if aim.met else MISSED} |")
    told = [f"- {aim.text}: {aim.why() or UNEXPLAINED}" for aim in aims if not aim.met]
    return [*lines, "", STANDING, "", *told] if told else lines


def summary(lines: Sequence[str]) -> str:
    """Return how many of the aims that a page's tables state are met, and how many explained."""
    ends = [line.rsplit("|", 2)[1].strip() for line in lines if line.startswith("| ")]
    met, missed = ends.count(MET), ends.count(MISSED)
    open_ones = sum(UNEXPLAINED in line for line in lines)
    told = "why each other one is not stands below its table"
    if open_ones:
        told = f"{UNEXPLAINED}: {open_ones} of the others"
    return f"{met} of {met + missed} aims are met; {told}."
