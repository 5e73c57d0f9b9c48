"""What is there before the first byte: `--help` and `--version`, imports included."""

from __future__ import annotations

import subprocess
import sys
import time
from statistics import median

from bench.measure import installed

REPEATS = 7


def seconds_of(arguments: str, repeats: int) -> float:
    """Return the median wall seconds of `python -m moeconv ARGUMENTS`."""
    found = []
    for _ in range(repeats):
        start = time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "moeconv", *arguments.split()],
            check=True,
            stdout=subprocess.DEVNULL,
            env=installed(),
        )
        found.append(time.monotonic() - start)
    return median(found)


def table(repeats: int = REPEATS) -> list[str]:
    """Return the Markdown rows."""
    return [
        "| command | seconds |",
        "|---|---|",
        *(
            f"| `moeconv {arguments}` | {seconds_of(arguments, repeats):.2f} |"
            for arguments in ("--help", "--version")
        ),
    ]


def section(repeats: int = REPEATS) -> list[str]:
    """Return the part of docs/benchmarks.md."""
    return [
        "## Start-up",
        "",
        f"Until the process has ended, medians of {repeats}. Aim: at most 0.4 s.",
        "",
        *table(repeats),
        "",
        "All of it: `python -m bench --only start-up`.",
    ]
