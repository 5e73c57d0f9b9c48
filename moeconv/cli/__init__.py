"""The command line: a thin layer over moeconv.inspect, plan, convert and verify."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    # Nothing here multiplies matrices: the threads that numpy would start only turn in circles.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    gc.set_threshold(100_000)  # imports make tens of thousands of objects, and no garbage
    from moeconv.cli.failures import run_guarded

    given = list(sys.argv[1:] if arguments is None else arguments)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: no file of ours may get its descriptor
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # A name may have bytes that are no text, a terminal no letter for what is printed.
            stream.reconfigure(errors="backslashreplace")
    code = run_guarded(lambda: run_line(given), given)
    for stream in (sys.stdout, sys.stderr):  # the process ends without doing so
        with contextlib.suppress(OSError):
            stream.flush()
    sys.exit(code)


def run_line(words: Sequence[str]) -> int:
    """Return the exit code of the command that a line of words asks for."""
    from moeconv.cli.typed import build

    found = build().main(args=list(words), prog_name="moeconv", standalone_mode=False)
    return found if isinstance(found, int) else 0
