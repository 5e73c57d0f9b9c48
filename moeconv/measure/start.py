"""How long a conversion of next to nothing takes: what comes before the first byte and after."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from moeconv.demo import make_checkpoint
from moeconv.errors import IOFailed


def start_seconds(directory: Path, repeats: int, device: str = "cpu") -> float:
    """Return the median seconds of `moeconv convert` of a checkpoint of a few megabytes.

    In processes of its own; one before them that is not counted compiles the kernels. Everything
    is made below `directory`, on whose disk the output becomes durable, and left there.
    """
    source = directory / "checkpoint"
    make_checkpoint(source)
    targets = [directory / f"{device}-{at}" for at in range(repeats + 1)]
    return median([_convert(source, target, device) for target in targets][1:])


def _convert(source: Path, target: Path, device: str) -> float:
    words = ["-m", "moeconv", "convert", str(source), str(target), "--quiet", "--device", device]
    start = time.perf_counter()
    ran = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if ran.returncode:
        raise IOFailed(
            f"a conversion of a small checkpoint failed: {ran.stderr.strip() or ran.returncode}",
            where=str(target),
            hint="moeconv demo shows it",
        )
    return seconds
