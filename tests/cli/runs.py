"""The command line in this process or in one of its own, and what directories hold."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from moeconv.cli import main

ROOT = Path(__file__).parents[2]


class Ran(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Return what stdout holds, which must be JSON and nothing else."""
        return json.loads(self.out)


class Cli:
    """Runs commands in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: object) -> Ran:
        """Run a command and return its exit code and output."""
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        out, err = self._capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return Ran(stop.value.code, out, err)


def run_process(*words: object, **settings: Any) -> Ran:
    """Run `python -m moeconv` and return its exit code and output."""
    return run_python(["-m", "moeconv", *(str(word) for word in words)], **settings)


def run_python(words: Sequence[str], **settings: Any) -> Ran:
    """Run Python in the repository and return its exit code and output."""
    ran = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=ROOT, timeout=120, **settings
    )
    return Ran(ran.returncode, ran.stdout, ran.stderr)


def contents(directory: Path) -> dict[str, bytes]:
    """Return every file below a directory by its path there."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
