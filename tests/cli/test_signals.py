"""Ctrl-C and SIGTERM in the middle of a conversion: nothing is lost, the same command continues."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moeconv.cli.convert import Stop, handled_signals
from moeconv.errors import Interrupted, Stopped
from tests.cli.runs import ROOT, Cli, contents

# Tasks that take a while each, so that the signal comes between two of them.
SLOW = """
import os, time
import moeconv.execute as execute
real = execute.process
def slow(*arguments):
    time.sleep(float(os.environ["TASK_SECONDS"]))
    return real(*arguments)
execute.process = slow
from moeconv.cli import main
main()
"""


@contextmanager
def converting(src: Path, dst: Path, task_seconds: float) -> Iterator[subprocess.Popen[str]]:
    """Give a conversion that has begun its tasks."""
    words = ["convert", str(src), str(dst), "--layout", "vllm", "--tp", "2", "--jobs", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TASK_SECONDS": str(task_seconds)},
    )
    try:
        deadline = time.monotonic() + 60
        while not (dst / ".moeconv" / "journal").exists() and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        time.sleep(5 * min(task_seconds, 0.1))
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def clean(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return what an undisturbed conversion writes."""
    import moeconv

    dst = tmp_path_factory.mktemp("clean") / "dst"
    moeconv.convert(moeconv.plan(checkpoint, dst, layout="vllm", tp=2), dst)
    return contents(dst)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_stops_and_the_same_command_continues(
    number: int,
    code: int,
    checkpoint: Path,
    clean: dict[str, bytes],
    tmp_path: Path,
    cli: Cli,
) -> None:
    dst = tmp_path / "dst"
    with converting(checkpoint, dst, 0.05) as process:
        process.send_signal(number)
        sent = time.monotonic()
        out, err = process.communicate(timeout=30)
        assert time.monotonic() - sent < 10
    assert process.returncode == code, err
    assert out == ""
    assert "the same command continues" in err
    assert "Traceback" not in err
    assert not (dst / "config.json").exists()

    words = ("convert", checkpoint, dst, "--layout", "vllm", "--tp", "2")
    shown = cli("inspect", dst)
    assert "the command that began it continues" in shown.out
    done = cli(*words, "--json").json
    assert done["state"] == "converted"
    assert 0 < done["written_nbytes"] < done["output_nbytes"]
    assert contents(dst) == clean


def test_a_second_ctrl_c_exits_at_once(
    checkpoint: Path, clean: dict[str, bytes], tmp_path: Path, cli: Cli
) -> None:
    dst = tmp_path / "dst"
    with converting(checkpoint, dst, 20) as process:
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=10)
    assert process.returncode == 130
    assert cli("convert", checkpoint, dst, "--layout", "vllm", "--tp", "2").code == 0
    assert contents(dst) == clean


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, Interrupted), (signal.SIGTERM, Stopped)]
)
def test_a_signal_before_the_run_ends_it_at_once(number: int, error: type[Exception]) -> None:
    before = signal.getsignal(number)
    with pytest.raises(error, match="nothing is written"), handled_signals(Stop()):
        os.kill(os.getpid(), number)
        time.sleep(1)
    assert signal.getsignal(number) is before
