"""A conversion that is killed at its n-th low-level call, for every n; run as a program.

    python tests/crashes.py SRC WORK LAYOUT STEP

Prints one JSON object: the kills that happened, and what was wrong after any of them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import moeconv.api as api
from moeconv.resources import Resources
from moeconv.store import system

CALLS = ("open_file", "pwrite", "truncate", "sync_file", "sync_data", "rename", "fallocate")
MODEL = ("config.json", "model.safetensors.index.json", "moeconv.json")


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def run(src: Path, dst: Path, layout: str, jobs: int) -> None:
    options: dict[str, Any] = {"tp": 2} if layout == "vllm" else {"max_file_size": 60_000}
    plan = api.plan(src, dst, layout=layout, **options)
    api.convert(plan, dst, resources=Resources(jobs=jobs))


def die_at(position: int) -> None:
    """Make the process kill itself at the n-th call; every other time half way into a write."""
    count = 0

    def dying(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            if count == position:
                if name == "pwrite" and position % 2:
                    fd, data, offset = arguments
                    real(fd, bytes(data)[: len(bytes(data)) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        return call

    for name in CALLS:
        setattr(system, name, dying(name, getattr(system, name)))


def killed(src: Path, dst: Path, layout: str, position: int) -> bool:
    """Return whether a child was killed at this position (it ended before, if not)."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            die_at(position)
            run(src, dst, layout, 1)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    if status:
        raise SystemExit(f"the child at {position} failed with {status}")
    return False


def looks_finished(dst: Path, expected: dict[str, bytes]) -> str:
    """Return what of an unfinished directory could be taken for a model, though it is not one."""
    present = [name for name in MODEL if (dst / name).exists()]
    whole = all(
        (dst / name).is_file() and (dst / name).read_bytes() == data
        for name, data in expected.items()
        if name.endswith(".safetensors")
    )
    return "" if whole or not present else f"{present} beside unfinished files"


def main(src: Path, work: Path, layout: str, step: int) -> None:
    run(src, work / "whole", layout, 2)
    expected = files_of(work / "whole")
    wrong: list[str] = []
    position, kills = 1, 0
    dst = work / "out"
    while killed(src, dst, layout, position):
        kills += 1
        found = looks_finished(dst, expected) if dst.exists() else ""
        if position % 3 == 0:  # die once more while going on
            killed(src, dst, layout, position // 2 + 1)
            found = found or looks_finished(dst, expected)
        run(src, dst, layout, 2)
        if files_of(dst) != expected:
            found = found or "other bytes than an uninterrupted run"
        if found:
            wrong.append(f"killed at call {position}: {found}")
        shutil.rmtree(dst)
        position += step
    print(json.dumps({"kills": kills, "wrong": wrong}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
