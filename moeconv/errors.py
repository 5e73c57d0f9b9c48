"""Every error that moeconv raises on purpose, with the exit code that the command line gives it.

One error is one block of text: what happened, where (file, tensor, byte range), what to do.
"""

from __future__ import annotations


class MoeconvError(Exception):
    """An expected failure: `what` happened, `where`, and the `hint` that says what to do."""

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.hint:
            lines.append(f"  do: {self.hint}")
        return "\n".join(lines)


class UsageError(MoeconvError):
    """An option that does not exist, a value outside its range, a SRC that is not there."""

    exit_code = 2


class Refused(MoeconvError):
    """The conversion cannot start: disk, memory, alignment, values that do not fit the model."""

    exit_code = 3


class BadSource(MoeconvError):
    """The source is damaged, inconsistent or holds what the target cannot."""

    exit_code = 4


class BadHeader(BadSource):
    """A file header that breaks its format's rules."""


class UnrecognizedTensor(BadSource):
    """A tensor that no rule of the family and no codec explains."""


class IncompleteModel(BadSource):
    """A missing expert, part or layer."""


class ShapeMismatch(BadSource):
    """A tensor whose shape or dtype is not the one that its codec or family needs."""


class NonFiniteValue(BadSource):
    """A NaN or Inf that the conversion would create, or that the target cannot hold."""


class VerifyFailed(MoeconvError):
    """The output is unfinished, damaged, or not what its source gives."""

    exit_code = 5


class Locked(MoeconvError):
    """Another run holds the output directory."""

    exit_code = 6


class IOFailed(MoeconvError):
    """A read or write failed while running; the same command continues."""

    exit_code = 74


class Stopped(MoeconvError):
    """Stopped by SIGTERM; the same command continues."""

    exit_code = 75


class Interrupted(MoeconvError):
    """Stopped by Ctrl-C; the same command continues."""

    exit_code = 130
