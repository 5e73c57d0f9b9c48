"""What is there before the first byte: `--help`, a plan of DeepSeek-V3, the first byte itself."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from bench import aims
from bench.aims import Aim
from bench.architectures import DEEPSEEK_V3, DEEPSEEK_V3_SHARD_NBYTES, KINDS, Size
from bench.checkpoints import source, write_checkpoint
from bench.measure import Cost, fresh, installed, middle, moeconv, warm

REPEATS = 7
PLAN_REPEATS = 3
FIRST_NBYTES = 1 << 20
POLL_SECONDS = 0.001
PLANNED = (0, 3)  # 3: planned to the end, but the disk has no room for what it is about
PLANS = {"hf": ("--layout", "hf"), "vllm, 8 ranks": ("--layout", "vllm", "--tp", "8")}


def command_of(arguments: str) -> list[str]:
    """Return the command line of `python -m moeconv ARGUMENTS`."""
    return [sys.executable, "-m", "moeconv", *arguments.split()]


def seconds_of(arguments: str, repeats: int) -> float:
    """Return the median wall seconds of `moeconv ARGUMENTS`."""
    found = []
    for _ in range(repeats):
        start = time.monotonic()
        subprocess.run(
            command_of(arguments), check=True, stdout=subprocess.DEVNULL, env=installed()
        )
        found.append(time.monotonic() - start)
    return median(found)


def first_byte(root: Path, target: Path) -> float:
    """Return the seconds from the start of convert until its wchar passes FIRST_NBYTES.

    /proc/PID/io is asked every millisecond: system calls count when they return.
    """
    start = time.monotonic()
    process = subprocess.Popen(
        command_of(f"convert {root} {target} --progress none"),
        stdout=subprocess.DEVNULL,
        env=installed(),
    )
    counters = Path(f"/proc/{process.pid}/io")
    found = 0.0
    while not found and process.poll() is None:
        told = dict(line.split(": ") for line in counters.read_text().splitlines())
        if int(told.get("wchar", 0)) >= FIRST_NBYTES:
            found = time.monotonic() - start
        time.sleep(POLL_SECONDS)
    if process.wait() != 0 or not found:
        raise RuntimeError(f"{root}: no first byte was seen")
    return found


def first_bytes(folder: Path, repeats: int, size: Size | None) -> float:
    """Return the median of `repeats` first bytes, after one that is not counted."""
    root, target = source(folder, "gpt-oss", size).root, folder / "first-byte"
    warm(root)
    found = [fresh(target, lambda: first_byte(root, target)) for _ in range(repeats + 1)]
    shutil.rmtree(target)
    return median(found[1:])


def plans(folder: Path, repeats: int, size: Size) -> dict[str, Cost]:
    """Return what planning costs, by the layout; the files are holes with headers."""
    root, kind = folder / "sparse", KINDS["deepseek-v3"]
    shutil.rmtree(root, ignore_errors=True)
    shards = DEEPSEEK_V3_SHARD_NBYTES
    write_checkpoint(root, kind.tensors(size), kind.config(size), shards, sparse=True)
    target = str(folder / "planned")
    found = {
        name: middle(
            [moeconv("plan", str(root), target, *options, codes=PLANNED) for _ in range(repeats)]
        )
        for name, options in PLANS.items()
    }
    shutil.rmtree(root)
    return found


def section(
    folder: Path, repeats: int = REPEATS, planned: Size = DEEPSEEK_V3, size: Size | None = None
) -> list[str]:
    """Return the part of docs/benchmarks.md."""
    seconds = {name: seconds_of(name, repeats) for name in ("--help", "--version")}
    first = first_bytes(folder, repeats, size)
    costs = plans(folder, min(repeats, PLAN_REPEATS), planned)
    aimed = [
        Aim("`--help`, seconds", seconds["--help"], 0.4, most=True),
        Aim("first byte, seconds", first, 1.0, most=True),
        Aim("slower plan, seconds", max(cost.wall for cost in costs.values()), 10, most=True),
        Aim("its peak RSS, GB", max(c.peak_rss for c in costs.values()) / 1e9, 1.0, most=True),
    ]
    return [
        "## Start-up",
        "",
        f"Medians of {repeats}, until the process has ended; the first byte: until convert has",
        f"written {FIRST_NBYTES >> 20} MiB (wchar of /proc/PID/io, asked every millisecond) of",
        "gpt-oss, kernels compiled before. Plans are of DeepSeek-V3",
        f"({planned.layers} layers, {planned.experts} experts) as sparse files, medians of "
        f"{min(repeats, PLAN_REPEATS)}.",
        "",
        "| command | seconds | CPU seconds | peak RSS, GB |",
        "|---|---|---|---|",
        *(f"| `moeconv {name}` | {value:.2f} | | |" for name, value in seconds.items()),
        f"| `moeconv convert gpt-oss OUT`, first byte | {first:.2f} | | |",
        *(
            f"| `moeconv plan deepseek-v3 OUT {' '.join(PLANS[name])}` | {cost.wall:.2f} "
            f"| {cost.cpu:.2f} | {cost.peak_rss / 1e9:.2f} |"
            for name, cost in costs.items()
        ),
        "",
        *aims.table(aimed),
        "",
        "All of it: `python -m bench --only start-up`.",
    ]
