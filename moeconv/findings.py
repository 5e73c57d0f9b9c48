"""What a verification has found so far: problems, notes, counts, and how far it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from moeconv.execute import Progress

SHOWN_PROBLEMS = 50
ANEW = "moeconv convert --overwrite makes the output anew"
REMOVE = "remove it, or move it elsewhere: moeconv never removes others' files"


class Problem(NamedTuple):
    """One thing that is wrong: what, where (file, byte range), and what to do."""

    what: str
    where: str
    hint: str = ANEW


@dataclass(slots=True)
class Findings:
    """Collected by one thread; beyond some dozens of problems only their number is kept."""

    progress: Callable[[Progress], None] | None = None
    problems: list[Problem] = field(default_factory=list)
    more_problems: int = 0
    notes: list[str] = field(default_factory=list)
    total_nbytes: int = 0
    total_tasks: int = 0
    done_nbytes: int = 0
    done_tasks: int = 0

    def problem(self, what: str, where: str, hint: str = ANEW) -> None:
        """Note a problem."""
        if len(self.problems) < SHOWN_PROBLEMS:
            self.problems.append(Problem(what, where, hint))
        else:
            self.more_problems += 1

    def note(self, text: str) -> None:
        """Note what is no problem, but worth saying."""
        self.notes.append(text)

    def expect(self, nbytes: int, tasks: int) -> None:
        """Add work that is still to be done."""
        self.total_nbytes += nbytes
        self.total_tasks += tasks

    def advance(self, nbytes: int, layer: int | None = None) -> None:
        """Count one piece of work as done and tell whoever listens."""
        self.done_nbytes += nbytes
        self.done_tasks += 1
        if self.progress is not None:
            from moeconv.execute import Progress

            self.progress(
                Progress(
                    self.done_nbytes, self.total_nbytes, self.done_tasks, self.total_tasks, layer
                )
            )
