"""What is read without typer is read as typer reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeconv.cli import typed
from moeconv.cli.commands import COMMANDS
from moeconv.cli.options import flags_of
from moeconv.cli.plain import read_plain

Values = Mapping[str, Any]

PLAIN = (
    "convert a b",
    "convert a b --layout ktransformers --numa 1 --dtype int4",
    "convert a --layout=vllm --tp 8 b --ep -q",
    "plan a b --max-file-size 1.5GiB --json --json",
    "convert a b --include x* --exclude y --include z",
    "convert a=b c=d --config=e=f",
    "convert a b --layers 0-3,7 --ranks=2",
    "convert a b --redundant-experts 0 --tp 2 --tp 4",
    "inspect a -v",
    "verify a --source b --sample 5%",
    "formats",
    "demo",
    "demo a",
    "bench --dst a",
    "convert a b --config --json",
    "convert a b --config= --json",
    "convert a b --include - --exclude --",
)
NOT_PLAIN = (
    "",
    "--version",
    "fly",
    "formats a",
    "convert a",
    "convert a b c",
    "convert a b --help",
    "convert a b -h",
    "convert a b -qv",
    "convert a b -- c",
    "convert -- a b",
    "convert a -",
    "convert a b --lay hf",
    "convert a b --layout",
    "convert a b --layout --json",
    "convert a b --layout=",
    "convert a b --layout HF",
    "convert a b --json=1",
    "convert a b --tp 0",
    "convert a b --tp +2",
    "convert a b --tp 1_0",
    "convert a b --tp 2.0",
    "convert a b --memory 1XB",
    "convert a b --ranks 3-1",
    "convert a b --expert-map nowhere",
)
TEXTS = "hf vllm bf16 keep 0 1 07 -1 1GB 0-2 a a=b linear deep nowhere".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def typers() -> Iterator[Callable[[Sequence[str]], Values | None]]:
    """Give what typer reads of a line; None where it has something to say instead."""
    seen: list[Values] = []
    with pytest.MonkeyPatch.context() as patch:
        entries = [
            entry._replace(function=lambda values: seen.append(values) or 0) for entry in COMMANDS
        ]  # type: ignore[func-returns-value]
        patch.setattr(typed, "COMMANDS", tuple(entries))
        command = typed.build()

    def read(words: Sequence[str]) -> Values | None:
        seen.clear()
        try:
            command.main(args=list(words), prog_name="moeconv", standalone_mode=False)
        except Exception:  # noqa: BLE001  # whatever typer says
            return None
        return seen[0] if seen else None

    yield read


@pytest.mark.parametrize("line", PLAIN)
def test_plain_lines(line: str, typers: Callable[[Sequence[str]], Values | None]) -> None:
    words = line.split()
    found = read_plain(words)
    assert found is not None
    assert found.values == typers(words)
    assert found.function is next(one.function for one in COMMANDS if one.name == words[0])


@pytest.mark.parametrize("line", NOT_PLAIN)
def test_what_typer_has_to_explain(line: str) -> None:
    assert read_plain(line.split()) is None


def test_a_map_is_read(tmp_path: Path, typers: Callable[[Sequence[str]], Values | None]) -> None:
    (tmp_path / "map.json").write_text("[[0], [1]]")
    words = ["convert", "a", "b", "--expert-map", str(tmp_path / "map.json")]
    found = read_plain(words)
    assert found is not None
    assert found.values == typers(words) == {"src": "a", "dst": "b", "expert_map": ((0,), (1,))}


def test_completion_is_typers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_MOECONV_COMPLETE", "complete_bash")
    assert read_plain(["convert", "a", "b"]) is None


@st.composite
def lines(draw: st.DrawFn) -> list[str]:
    """Draw a command with some of its options and words, in any order, not always rightly."""
    entry = draw(st.sampled_from(COMMANDS))
    flags = [flag for row in entry.rows if not row.argument for flag in flags_of(row)]
    words = st.lists(
        st.one_of(
            st.tuples(st.sampled_from(TEXTS)),
            st.tuples(st.sampled_from(flags)),
            st.tuples(st.sampled_from(flags), st.sampled_from(TEXTS)),
            st.tuples(st.builds("{}={}".format, st.sampled_from(flags), st.sampled_from(TEXTS))),
        ),
        max_size=6,
    )
    return [entry.name, *(word for group in draw(words) for word in group)]


@settings(deadline=None, max_examples=300)
@given(words=lines())
def test_any_line_is_read_as_typer_reads_it_or_left_to_it(
    words: list[str], typers: Callable[[Sequence[str]], Values | None]
) -> None:
    found = read_plain(words)
    assert found is None or found.values == typers(words)
