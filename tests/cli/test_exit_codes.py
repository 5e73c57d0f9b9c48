"""Every kind of failure has its exit code and its one block of text, or its one JSON object."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moeconv.cli.failures import report
from moeconv.errors import Stopped
from moeconv.store import space
from tests.cli.runs import ROOT, Cli

# Words after `moeconv`, exit code, text that the error must have. SRC is the small checkpoint.
CASES: tuple[tuple[str, int, str], ...] = (
    ("fly", 2, "fly"),
    ("convert SRC", 2, "DST"),
    ("convert SRC DST --flat", 2, "--flat"),
    ("convert SRC DST --tp 0", 2, "--tp"),
    ("convert SRC DST --tp two", 2, "--tp"),
    ("convert SRC DST --jobs 0", 2, "--jobs"),
    ("convert SRC DST --device tpu", 2, "--device"),
    ("convert SRC DST --memory 4000000GB", 3, "more than is free here (8.0 GB)"),
    ("convert SRC DST --device cuda:1", 3, "cuda:1"),
    ("plan SRC DST --device cuda", 3, "cuda"),
    ("plan SRC /etc/passwd/below", 3, "/etc/passwd"),
    ("convert SRC /etc/passwd/below", 3, "/etc/passwd"),
    ("convert SRC DST --jobs -1", 2, "--jobs"),
    ("convert SRC DST --redundant-experts -1", 2, "--redundant-experts"),
    ("convert SRC DST --pad-intermediate 0", 2, "--pad-intermediate"),
    ("convert SRC DST --memory 2GX", 2, "512MiB"),
    ("convert SRC DST --max-file-size 0", 2, "size"),
    ("convert SRC DST --ranks 3-1", 2, "range"),
    ("convert SRC DST --layers one", 2, "0,3-5"),
    ("convert SRC DST --layout xyz", 2, "vllm"),
    ("convert SRC DST --dtype int3", 2, "'--dtype': 'int3' is not one of 'bf16'"),
    ("convert SRC DST --expert-map NOWHERE", 2, "NOWHERE"),
    ("convert NOWHERE DST", 2, "NOWHERE"),
    ("inspect NOWHERE", 2, "NOWHERE"),
    ("plan NOWHERE DST", 2, "NOWHERE"),
    ("convert SRC DST --config NOWHERE", 2, "NOWHERE"),
    ("verify NOWHERE --sample 5%", 2, "--source"),
    ("verify NOWHERE --source SRC --sample 7", 2, "5%"),
    ("convert SRC DST --tp 2", 3, "--layout vllm"),
    ("convert SRC DST --layout ktransformers --dtype fp16", 3, "bf16"),
    ("convert SRC DST --layout vllm --placement round-robin", 3, "--ep"),
    ("convert SRC DST --layout vllm --tp 3", 3, "--tp"),
    ("plan SRC DST --layout vllm --tp 3", 3, "--tp"),
    ("convert SRC DST --layers 7", 3, "layer 7"),
    ("convert SRC DST --layout vllm --tp 2 --ranks 5", 3, "rank 5"),
    ("convert SRC DST --include nothing*", 3, "nothing is selected"),
    ("convert SRC DST --memory 1KB", 3, "--memory"),
    ("plan SRC DST --memory 1KB", 3, "--memory is too small"),
    ("convert SRC DST --memory 1", 3, "--memory 1 B is too small"),
    ("convert SRC SRC", 3, "SRC"),
    ("plan SRC SRC", 3, "SRC"),
    ("convert SRC FOREIGN", 3, "did not write"),
    ("convert SRC FOREIGN --overwrite", 3, "did not write"),
    ("plan SRC FOREIGN", 3, "did not write"),
    ("inspect DAMAGED", 4, "truncated"),
    ("plan DAMAGED DST", 4, "truncated"),
    ("convert DAMAGED DST", 4, "truncated"),
    ("inspect FOREIGN", 4, ".safetensors"),
    ("verify FOREIGN", 5, ""),
)


@pytest.fixture
def words(checkpoint: Path, tmp_path: Path) -> dict[str, str]:
    """Return the paths that the cases speak of."""
    foreign, damaged = tmp_path / "foreign", tmp_path / "damaged"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    shutil.copytree(checkpoint, damaged)
    weights = sorted(damaged.glob("*.safetensors"))[0]
    os.truncate(weights, weights.stat().st_size - 1)
    return {
        "SRC": str(checkpoint),
        "DST": str(tmp_path / "dst"),
        "FOREIGN": str(foreign),
        "DAMAGED": str(damaged),
        "NOWHERE": str(tmp_path / "NOWHERE"),
    }


@pytest.mark.parametrize(("line", "code", "text"), CASES)
def test_failures(
    line: str,
    code: int,
    text: str,
    words: dict[str, str],
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(space, "memory_limit", lambda: 8_000_000_000)  # else of the moment
    command = [words.get(word, word) for word in line.split()]
    ran = cli(*command)
    assert ran.code == code, ran
    assert "Traceback" not in ran.err
    first, *rest = ran.err.splitlines()
    assert re.match(r"[A-Z][A-Za-z]+: \S", first)
    assert [line[:5] for line in rest] in ([], ["  whe"], ["  do:"], ["  whe", "  do:"])
    assert text in ran.err
    if command[0] != "plan":
        assert ran.out == ""
    assert not Path(words["DST"]).exists()

    again = cli(*command, "--json")
    assert again.code == code
    assert again.json["exit_code"] == code
    assert again.json["error"]["what"] in ran.err
    assert again.err == ""


def test_a_locked_output(checkpoint: Path, tmp_path: Path, cli: Cli) -> None:
    lock = tmp_path / "dst" / ".moeconv" / "lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        ran = cli("convert", checkpoint, tmp_path / "dst")
    assert ran.code == 6
    assert "another run" in ran.err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (PermissionError(13, "Permission denied", "/data/x"), 74, "/data/x"),
        (OSError(28, "No space left on device"), 74, "No space left"),
        (Stopped("stopped"), 75, "stopped"),
        (KeyError("weird"), 1, "-v"),
        (RuntimeError("first line\nsecond"), 1, "report"),
    ],
)
def test_errors_from_below(
    error: Exception, code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(error, ["convert", "a", "b"]) == code
    shown = capsys.readouterr()
    assert text in shown.err
    assert shown.out == ""
    assert report(error, ["convert", "--json"]) == code
    assert json.loads(capsys.readouterr().out)["exit_code"] == code


@pytest.mark.parametrize("flags", [(), ("-v",), ("--verbose",), ("-qv",)])
def test_a_bug_shows_its_traceback_only_when_asked(
    flags: tuple[str, ...], cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("boom")

    monkeypatch.setattr("moeconv.api.inspect", broken)
    ran = cli("inspect", "somewhere", *flags)
    assert ran.code == 1
    assert ("Traceback" in ran.err) == bool(flags)
    assert "ZeroDivisionError" in ran.err
    assert "boom" in ran.err


def test_ctrl_c_anywhere(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moeconv.api.inspect", interrupted)
    assert cli("inspect", "somewhere").code == 130


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("words", [("formats",), ("--help",), ("--version",)])
def test_a_closed_pipe_is_no_error(words: tuple[str, ...], buffered: bool) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe:
        ran = subprocess.run(
            [sys.executable, "-m", "moeconv", *words],
            stdout=pipe,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"},
            timeout=60,
        )
    assert ran.stderr == b""
    assert ran.returncode == 141


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize(
    "words", [("formats",), ("formats", "--json"), ("--help",), ("--version",)], ids=" ".join
)
def test_a_full_disk_below_stdout_is_said_on_stderr(words: tuple[str, ...], buffered: bool) -> None:
    with open("/dev/full", "wb") as full:
        ran = subprocess.run(
            [sys.executable, "-m", "moeconv", *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"},
            timeout=60,
        )
    assert ran.returncode == 74
    assert "Traceback" not in ran.stderr
    assert "where: stdout" in ran.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(("words", "code"), [(("formats",), 0), (("inspect", "nowhere"), 2)])
def test_streams_that_are_not_open(words: tuple[str, ...], code: int, closed: str) -> None:
    line = f'exec "$@" {closed}'
    ran = subprocess.run(
        ["sh", "-c", line, "sh", sys.executable, "-m", "moeconv", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert ran.returncode == code
    assert "Error" not in ran.stderr.replace("UsageError", "")


def test_names_that_are_no_text(tmp_path: Path, cli: Cli) -> None:
    name = os.fsdecode(b"\xff\xfe")
    ran = cli("inspect", tmp_path / name)
    assert ran.code == 2
    assert "\\udcff" in ran.err
