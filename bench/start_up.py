"""What is there before the first byte: `--help`, imports, planning the largest models."""

from __future__ import annotations

import subprocess
import sys
import time
from statistics import median

REPEATS = 7


def seconds_of(*arguments: str) -> float:
    """Return the median wall seconds of `python -m moeconv ARGUMENTS`."""
    found = []
    for _ in range(REPEATS):
        start = time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "moeconv", *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        found.append(time.monotonic() - start)
    return median(found)


def table() -> list[str]:
    """Return the Markdown rows."""
    return [
        "| command | seconds, median of 7 |",
        "|---|---|",
        f"| `moeconv --help` | {seconds_of('--help'):.2f} |",
        f"| `moeconv --version` | {seconds_of('--version'):.2f} |",
    ]
