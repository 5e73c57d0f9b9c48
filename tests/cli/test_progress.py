"""Progress: lines for logs, a bar for terminals, and never a reason to stop."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from moeconv.cli.progress import Lines, Meter, amounts, choose, clock_text
from moeconv.cli.tables import human_seconds
from moeconv.execute import Progress
from tests.cli.runs import ROOT, Cli


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def lines_shown(moments: list[tuple[float, int]], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the lines printed for (seconds, per cent) of a run of 1000 tasks and 10 GB."""
    clock = Clock()
    lines = Lines(Meter(40, clock), "converting")
    for seconds, percent in moments:
        clock.now = 100 + seconds
        lines(Progress(percent * 10**8, 10**10, percent * 10, 1000, 23))
    return capsys.readouterr().err.splitlines()


def test_a_line_every_ten_seconds_or_five_per_cent(capsys: pytest.CaptureFixture[str]) -> None:
    moments = [(2.0, 3), (4.0, 5), (6.0, 9), (8.0, 10), (17.0, 11), (18.5, 12), (20.0, 100)]
    shown = [line.split()[1] for line in lines_shown(moments, capsys)]
    assert shown == ["5%", "10%", "12%", "100%"]


def test_a_short_run_prints_its_end_only(capsys: pytest.CaptureFixture[str]) -> None:
    moments = [(percent / 200, percent) for percent in range(1, 101)]
    assert len(lines_shown(moments, capsys)) == 1


def test_a_line_says_bytes_rate_time_layer_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = lines_shown([(10.0, 25)], capsys)
    assert line.startswith("converting   25%  2.5/10.0 GB  250.0 MB/s  eta 0:30  layer 24/40  ram ")


def test_a_closed_stderr_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed:
        def write(self, text: str) -> None:
            raise BrokenPipeError

        def flush(self) -> None:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Closed())
    lines = Lines(Meter(1), "converting")
    lines(Progress(1, 1, 1, 1, None))
    lines(Progress(1, 1, 1, 1, None))


def test_amounts_and_times() -> None:
    assert amounts(179_600_000_000, 264_000_000_000) == "179.6/264.0 GB"
    assert amounts(7, 99) == "7/99 B"
    assert clock_text(64) == "1:04"
    assert clock_text(7530) == "2:05:30"
    assert [human_seconds(one) for one in (0.84, 9.96, 42, 201, 7500)] == [
        "0.8s",
        "10s",
        "42s",
        "3m21s",
        "2h05m",
    ]


def test_auto_is_plain_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose("auto") == "plain"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert choose("auto") == "bar"
    monkeypatch.setenv("TERM", "dumb")
    assert choose("auto") == "plain"
    assert choose("bar") == "bar"


def test_progress_none(checkpoint: Path, tmp_path: Path, cli: Cli) -> None:
    assert cli("convert", checkpoint, tmp_path / "a", "--progress", "none").err == ""
    assert "100%" in cli("convert", checkpoint, tmp_path / "b", "--progress", "plain").err


@pytest.mark.parametrize("no_color", [False, True])
def test_a_bar_on_a_terminal(no_color: bool, checkpoint: Path, tmp_path: Path) -> None:
    main, terminal = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"}
    env.pop("NO_COLOR", None)
    if no_color:
        env["NO_COLOR"] = "1"
    words = ["-m", "moeconv", "convert", str(checkpoint), str(tmp_path / "dst")]
    process = subprocess.Popen(
        [sys.executable, *words], stdout=terminal, stderr=terminal, cwd=ROOT, env=env
    )
    os.close(terminal)
    shown = b""
    while True:
        try:
            found = os.read(main, 65536)
        except OSError:  # the other side has closed
            break
        if not found:
            break
        shown += found
    os.close(main)
    assert process.wait(timeout=60) == 0
    assert "converting" in shown.decode()
    assert "━" in shown.decode()
    assert "✓ source" in shown.decode().replace("\x1b[32m✓\x1b[0m", "✓")
    assert (b"\x1b[32m" in shown) != no_color
