"""A command measured: wall seconds, CPU seconds, peak memory, bytes read and written."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple, TypeVar

Result = TypeVar("Result")
CHUNK_NBYTES = 16 << 20


class Cost(NamedTuple):
    """What one run cost; bytes from /proc/self/io, 0 where the run does not tell."""

    wall: float
    cpu: float
    peak_rss: int
    read_chars: int = 0


class Told(NamedTuple):
    """What one run cost, and the figures that its code left in `figures`."""

    cost: Cost
    figures: dict[str, float]


def run_python(code: str, arguments: Sequence[str] = ()) -> Cost:
    """Run Python code in a process of its own and return what it cost, start-up included."""
    return run_telling(code, arguments).cost


def run_telling(code: str, arguments: Sequence[str] = (), python: str = sys.executable) -> Told:
    """Run Python code that fills the dict `figures`, in a process of its own."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        wrapped = (
            "import sys, json, atexit\n"
            "figures = {}\n"
            "def _tell():\n"
            "    status = open('/proc/self/status').read()\n"
            "    peak = int(status.split('VmHWM:')[1].split()[0]) * 1024\n"
            "    io = dict(line.split(': ') for line in open('/proc/self/io'))\n"
            f"    json.dump([peak, int(io['rchar']), figures], open({report.name!r}, 'w'))\n"
            "atexit.register(_tell)\n" + code
        )
        before = os.times()
        start = time.monotonic()
        subprocess.run(
            [python, "-c", wrapped, *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
            env=installed(),
        )
        wall = time.monotonic() - start
        after = os.times()
        cpu = after.children_user + after.children_system
        cpu -= before.children_user + before.children_system
        peak, read_chars, figures = json.loads(Path(report.name).read_text())
    return Told(Cost(wall, cpu, peak, read_chars), figures)


def installed() -> dict[str, str]:
    """Return the environment with which modules are compiled once, as those that pip installs."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


def convert(source: Path, target: Path, *options: str) -> Cost:
    """Measure `moeconv convert` with the output made durable."""
    code = (
        "from moeconv.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
    )
    arguments = ["convert", str(source), str(target), "--progress", "none", *options]
    return run_python(code, arguments)


def write_direct(path: Path, nbytes: int, threads: int = 2) -> float:
    """Return the seconds of writing `nbytes` past the page cache, by threads, durably."""
    buffer = mmap.mmap(-1, CHUNK_NBYTES)
    buffer.write(os.urandom(1 << 20) * (CHUNK_NBYTES >> 20))
    whole = nbytes // 4096 * 4096
    start = time.monotonic()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, 0o644)
    os.posix_fallocate(fd, 0, whole)

    def work(first: int) -> None:
        for offset in range(first * CHUNK_NBYTES, whole, threads * CHUNK_NBYTES):
            os.pwrite(fd, memoryview(buffer)[: min(CHUNK_NBYTES, whole - offset)], offset)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    os.fsync(fd)
    os.close(fd)
    return time.monotonic() - start


def copy_plainly(source: Path, target: Path) -> float:
    """Return the seconds of `cp` of a directory, durably."""
    start = time.monotonic()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for path in target.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
    return time.monotonic() - start


def fresh(folder: Path, run: Callable[[], Result]) -> Result:
    """Run with `folder` removed before, so that every run does the whole work."""
    shutil.rmtree(folder, ignore_errors=True)
    return run()


def middle(costs: Sequence[Cost]) -> Cost:
    """Return the median of each figure."""
    return Cost(
        median(cost.wall for cost in costs),
        median(cost.cpu for cost in costs),
        int(median(cost.peak_rss for cost in costs)),
        int(median(cost.read_chars for cost in costs)),
    )
