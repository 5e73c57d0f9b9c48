"""What is there before the first byte: `--help`, a plan of DeepSeek-V3, the first byte itself."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median

from bench import aims
from bench.aims import Aim
from bench.architectures import DEEPSEEK_V3, DEEPSEEK_V3_SHARD_NBYTES, KINDS, Size
from bench.checkpoints import source, write_checkpoint
from bench.measure import Cost, fresh, installed, middle, moeconv, run_telling, warm

REPEATS = 7
PLAN_REPEATS = 3
FIRST_NBYTES = 1 << 20
POLL_SECONDS = 0.001
PLANNED = (0, 3)  # 3: planned to the end, but the disk has no room for what it is about
PLANS = {"hf": ("--layout", "hf"), "vllm, 8 ranks": ("--layout", "vllm", "--tp", "8")}
# What is there before any command of ours does anything.
BARE = {"Python alone": "pass", "and `import moeconv.cli`": "import moeconv.cli"}
BARE |= {"and `import moeconv.convert`": BARE["and `import moeconv.cli`"] + ", moeconv.convert"}
# The steps of the last of PLANS: the seconds of each, and the peak RSS after it.
STEPS = ("reading headers", "recognising the model", "laying out and checking the plan")
STEP_BY_STEP = """
import time
from pathlib import Path
from moeconv.collector import paused
from moeconv.layouts.options import Options
from moeconv.model import build_model
from moeconv.plan import build_plan
from moeconv.store.source import open_source
def step(index, work):
    start = time.monotonic()
    found = work()
    figures[f"seconds {index}"] = time.monotonic() - start
    peak = open("/proc/self/status").read().split("VmHWM:")[1].split()[0]
    figures[f"peak {index}"] = int(peak) * 1024
    return found
with paused():
    source = step(0, lambda: open_source(Path(sys.argv[1])))
    model = step(1, lambda: build_model(source))
    step(2, lambda: build_plan(model, Options(layout="vllm", tp=8)))
"""


def command_of(arguments: str) -> list[str]:
    """Return the command line of `python -m moeconv ARGUMENTS`."""
    return [sys.executable, "-m", "moeconv", *arguments.split()]


def seconds_of(command: Sequence[str], repeats: int) -> float:
    """Return the median wall seconds of a command."""
    found = []
    for _ in range(repeats):
        start = time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=installed())
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


def plans(folder: Path, repeats: int, size: Size) -> tuple[dict[str, Cost], dict[str, float]]:
    """Return what planning costs, by the layout, and the figures of STEP_BY_STEP.

    The files are holes with headers.
    """
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
    steps = run_telling(STEP_BY_STEP, [str(root)]).figures
    shutil.rmtree(root)
    return found, steps


def told_steps(steps: Mapping[str, float]) -> str:
    """Return the steps of a plan, seconds and peak RSS."""
    return ", ".join(
        f"{name} {steps[f'seconds {at}']:.2f} s (then {steps[f'peak {at}'] / 1e9:.2f} GB)"
        for at, name in enumerate(STEPS)
    )


def told_bare(bare: Mapping[str, float]) -> str:
    """Return what is there before a command does anything."""
    return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in bare.items())


def section(
    folder: Path, repeats: int = REPEATS, planned: Size = DEEPSEEK_V3, size: Size | None = None
) -> list[str]:
    """Return the part of docs/benchmarks.md."""
    seconds = {name: seconds_of(command_of(name), repeats) for name in ("--help", "--version")}
    bare = {name: seconds_of([sys.executable, "-c", code], repeats) for name, code in BARE.items()}
    first = first_bytes(folder, repeats, size)
    costs, steps = plans(folder, min(repeats, PLAN_REPEATS), planned)
    before, planning = partial(told_bare, bare), partial(told_steps, steps)
    slow, peak = (
        max(cost.wall for cost in costs.values()),
        max(cost.peak_rss for cost in costs.values()) / 1e9,
    )
    aimed = [
        Aim("`--help`, seconds", seconds["--help"], 0.4, before, most=True),
        Aim("first byte, seconds", first, 1.0, before, most=True),
        Aim("slower plan, seconds", slow, 10, planning, most=True),
        Aim("its peak RSS, GB", peak, 1.0, planning, most=True),
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
        *(f"| {name} | {value:.2f} | | |" for name, value in bare.items()),
        *(f"| `moeconv {name}` | {value:.2f} | | |" for name, value in seconds.items()),
        f"| `moeconv convert gpt-oss OUT`, first byte | {first:.2f} | | |",
        *(
            f"| `moeconv plan deepseek-v3 OUT {' '.join(PLANS[name])}` | {cost.wall:.2f} "
            f"| {cost.cpu:.2f} | {cost.peak_rss / 1e9:.2f} |"
            for name, cost in costs.items()
        ),
        "",
        f"The last plan's steps, once more: {told_steps(steps)}.",
        "",
        *aims.table(aimed),
        "",
        "All of it: `python -m bench --only start-up`.",
    ]
