"""Lines printed without rich are those that rich prints where it styles nothing."""

from __future__ import annotations

import io

import pytest

from moeconv.cli.tables import Printer

TEXTS = (
    "",
    "two words",
    "x" * 5000,
    "trailing  ",
    "[bold]no markup[/bold] :smile:",
    "a\nb",
    "bell\a back\b feed\f up\v return\r end",
    "\x1b[31mred\x1b[0m",
    "é 漢字 ✓",
)


def printed(monkeypatch: pytest.MonkeyPatch, text: str, *, by_rich: bool) -> str:
    """Return what a line and a marked line of this text are on a stdout that is no terminal."""
    stream = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", stream)
        patch.setattr("moeconv.cli.tables.has_styles", lambda: by_rich)
        printer = Printer({})
        printer.line(text, style="bold")
        printer.done(text)
    return stream.getvalue()


@pytest.mark.parametrize("text", TEXTS)
def test_lines_are_the_same(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    plain = printed(monkeypatch, text, by_rich=False)
    assert plain == printed(monkeypatch, text, by_rich=True)


@pytest.mark.parametrize("name", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_colours_that_are_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setenv(name, "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr("sys.stdout", stream)
    Printer({}).done("text")
    assert stream.getvalue().startswith("\x1b[")
