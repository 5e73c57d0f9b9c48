"""The examples run as they stand, and say what they should."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def run(command: list[str], cwd: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("name", "said"),
    [("convert.py", "converted: "), ("load_rank.py", "its slots hold the experts [4, 5, 6, 7]")],
)
def test_program_runs(name: str, said: str, tmp_path: Path) -> None:
    assert said in run([sys.executable, str(EXAMPLES / name)], tmp_path)


def test_batch_job_converts_and_verifies(tmp_path: Path) -> None:
    from moeconv.demo import make_checkpoint

    make_checkpoint(tmp_path / "checkpoint")
    stand_in = tmp_path / "bin" / "moeconv"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/sh\nexec {sys.executable} -m moeconv "$@"\n')
    stand_in.chmod(0o755)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{stand_in.parent}:{os.environ['PATH']}",
    }
    command = [str(EXAMPLES / "batch.sh"), "checkpoint", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0
    assert (tmp_path / "out" / "config.json").exists()
    done = subprocess.run(
        [*command[:1], "missing", "other"], cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 2


def test_every_example_is_listed() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    for path in EXAMPLES.iterdir():
        assert path.name == "README.md" or f"`{path.name}`" in listed
