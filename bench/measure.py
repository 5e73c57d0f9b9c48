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
from resource import RUSAGE_CHILDREN, getrusage
from statistics import median
from typing import NamedTuple, TypeVar

Result = TypeVar("Result")
CHUNK_NBYTES = 16 << 20


class Cost(NamedTuple):
    """What one run cost: seconds, bytes; 0 where the run does not tell.

    `read_chars`, `written_chars`: of its system calls; `read_disk`, `written_disk`: what these
    took from and gave to disks (rchar, wchar, read_bytes, write_bytes of /proc/self/io).
    `system`: of the CPU seconds, those in the kernel.
    """

    wall: float
    cpu: float
    peak_rss: int = 0
    read_chars: int = 0
    written_chars: int = 0
    read_disk: int = 0
    written_disk: int = 0
    system: float = 0.0


class Told(NamedTuple):
    """What one run cost, and the figures that its code left in `figures`."""

    cost: Cost
    figures: dict[str, float]


def run_python(code: str, arguments: Sequence[str] = ()) -> Cost:
    """Run Python code in a process of its own and return what it cost, start-up included."""
    return run_telling(code, arguments).cost


def pinned(cores: int) -> list[str]:
    """Return the command that keeps what follows it on the first `cores` cores; 0: on all."""
    first = sorted(os.sched_getaffinity(0))[:cores]
    return ["taskset", "-c", ",".join(map(str, first))] if cores else []


def run_telling(
    code: str, arguments: Sequence[str] = (), python: str = sys.executable, *, cores: int = 0
) -> Told:
    """Run Python code that fills the dict `figures`, in a process of its own."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        wrapped = (
            "import sys, json, atexit\n"
            "figures = {}\n"
            "def _tell():\n"
            "    status = open('/proc/self/status').read()\n"
            "    peak = int(status.split('VmHWM:')[1].split()[0]) * 1024\n"
            "    io = dict(line.split(': ') for line in open('/proc/self/io'))\n"
            "    names = ('rchar', 'wchar', 'read_bytes', 'write_bytes')\n"
            "    found = [peak, *(int(io[name]) for name in names)]\n"
            f"    with open({report.name!r}, 'w') as report:\n"
            "        json.dump([found, figures], report)\n"
            "atexit.register(_tell)\n" + code
        )
        before = getrusage(RUSAGE_CHILDREN)  # os.times counts in ticks of 10 ms
        start = time.monotonic()
        subprocess.run(
            [*pinned(cores), python, "-c", wrapped, *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
            env=installed(),
        )
        wall = time.monotonic() - start
        after = getrusage(RUSAGE_CHILDREN)
        system = after.ru_stime - before.ru_stime
        cpu = after.ru_utime - before.ru_utime + system
        told, figures = json.loads(Path(report.name).read_text())
    return Told(Cost(wall, cpu, *told)._replace(system=system), figures)


def installed() -> dict[str, str]:
    """Return the environment with which modules are compiled once, as those that pip installs."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


def moeconv(*arguments: str, cores: int = 0, codes: Sequence[int] = (0,)) -> Cost:
    """Measure a command of moeconv that ends with one of these exit codes."""
    code = (  # ends as moeconv/__main__.py does
        "import os\n"
        "from moeconv.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n"
        f"    assert (stop.code or 0) in {tuple(codes)}, stop.code\n"
        "    _tell()\n"
        "    os._exit(0)\n"
    )
    return run_telling(code, arguments, cores=cores).cost


def convert(source: Path, target: Path, *options: str, cores: int = 0) -> Cost:
    """Measure `moeconv convert` with the output made durable."""
    arguments = ("convert", str(source), str(target), "--progress", "none", *options)
    return moeconv(*arguments, cores=cores)


def write_direct(path: Path, nbytes: int, threads: int = 2) -> Cost:
    """Measure writing `nbytes` past the page cache, by threads, durably."""
    buffer = mmap.mmap(-1, CHUNK_NBYTES)
    buffer.write(os.urandom(1 << 20) * (CHUNK_NBYTES >> 20))
    whole = nbytes // 4096 * 4096
    start, busy = time.monotonic(), time.process_time()
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
    return Cost(time.monotonic() - start, time.process_time() - busy)


COPY = """
import subprocess, sys
subprocess.run(["cp", "-r", sys.argv[1], sys.argv[2]], check=True)
"""
# Makes what stands in the directory of the second argument durable.
DURABLE = """
import os, pathlib, sys
for path in [*pathlib.Path(sys.argv[2]).rglob("*"), pathlib.Path(sys.argv[2])]:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
"""


def copy_plainly(source: Path, target: Path) -> Cost:
    """Measure `cp` of a directory, durably; its memory and its bytes are not told."""
    cost = run_python(COPY + DURABLE, [str(source), str(target)])
    return Cost(cost.wall, cost.cpu)


def files_of(root: Path) -> list[Path]:
    """Return the files below a directory."""
    return [path for path in root.rglob("*") if path.is_file()]


def warm(root: Path) -> None:
    """Read every file, so that the page cache has them."""
    buffer = bytearray(CHUNK_NBYTES)
    for path in files_of(root):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def cool(root: Path) -> None:
    """Drop every file from the page cache, which needs no rights: POSIX_FADV_DONTNEED."""
    for path in files_of(root):
        with path.open("rb", buffering=0) as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fresh(folder: Path, run: Callable[[], Result]) -> Result:
    """Run with `folder` removed before, so that every run does the whole work.

    What the removal leaves to the disk (ext4 discards blocks later) is done before the run.
    """
    shutil.rmtree(folder, ignore_errors=True)
    os.sync()
    return run()


def spread(costs: Sequence[Cost], *, system: bool = False) -> str:
    """Return the least and the most seconds of runs, or CPU seconds in the kernel."""
    found = [cost.system if system else cost.wall for cost in costs]
    return f"{min(found):.2f} - {max(found):.2f}"


def touch_fresh(nbytes: int) -> float:
    """Return the seconds of writing to memory that this process did not have before."""
    with mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        start = time.monotonic()
        for at in range(0, nbytes, mmap.PAGESIZE):
            memory[at] = 1
        return time.monotonic() - start


def middle(costs: Sequence[Cost]) -> Cost:
    """Return the median of each figure."""
    wall, cpu, *told, system = (median(values) for values in zip(*costs, strict=True))
    return Cost(wall, cpu, *map(int, told))._replace(system=system)
