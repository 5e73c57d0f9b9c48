"""The options are those of the library, under the names that scripts rely on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moeconv.cli import options
from moeconv.cli.commands import COMMANDS
from moeconv.layouts.options import Options
from moeconv.plan import RANK_OPTIONS
from tests.cli.runs import Cli, run_process

# Scripts are written against these names.
CONVERT_FLAGS = """
    --layout --dtype --dense-dtype --tp --dp --ep --placement --redundant-experts --expert-map
    --uneven --pad-intermediate --pad-hidden --vllm-names --ranks --layers --experts-only --include
    --exclude --config --orientation --max-file-size --nonfinite --memory --jobs --overwrite
    --device --vram --numa --verify --progress --quiet -q --verbose -v --json
"""


@pytest.mark.parametrize("command", ["plan", "convert"])
def test_the_flags_of_the_contract_are_there(command: str) -> None:
    rows = next(entry.rows for entry in COMMANDS if entry.name == command)
    flags = [flag for row in rows if not row.argument for flag in options.flags_of(row)]
    assert sorted(flags) == sorted(CONVERT_FLAGS.split())


def test_every_option_of_a_conversion_is_one_of_the_library() -> None:
    names = {row.name for row in (*options.SHAPE, options.ORIENTATION)}
    assert names == set(Options.__dataclass_fields__)


def test_the_options_of_ranks_are_there() -> None:
    assert {row.name for row in options.SHAPE} >= set(RANK_OPTIONS)


def test_values_reach_the_library_as_it_wants_them(cli: Cli, monkeypatch: Any) -> None:
    seen: dict[str, Any] = {}

    def note(src: str, **values: Any) -> None:
        seen.update(values, src=src)
        raise KeyboardInterrupt

    monkeypatch.setattr("moeconv.api.plan", note)
    words = "--layout vllm --tp 4 --ep --ranks 0,2-3 --include a* --include b* --max-file-size 1GB"
    assert cli("convert", "s", "d", *words.split(), "--placement", "round-robin").code == 130
    assert seen == {
        "src": "s",
        "config": None,
        "layout": "vllm",
        "tp": 4,
        "ep": True,
        "ranks": (0, 2, 3),
        "include": ("a*", "b*"),
        "max_file_size": 1_000_000_000,
        "placement": "round-robin",
    }
    assert type(seen["layout"]) is str
    Options(**{name: value for name, value in seen.items() if name not in ("src", "config")})


@pytest.mark.parametrize("command", [(), *((entry.name,) for entry in COMMANDS)])
def test_help_cuts_nothing_off(command: tuple[str, ...], cli: Cli) -> None:
    ran = cli(*command, "--help")
    assert ran.code == 0
    assert "…" not in ran.out
    assert "Usage: moeconv" in ran.out


def test_version_and_completion() -> None:
    from moeconv import __version__

    assert run_process("--version") == (0, f"moeconv {__version__}\n", "")
    shown = run_process("--show-completion", "bash")
    # typer looks for a shell among the parent processes first; a container may have none.
    assert "_MOECONV_COMPLETE" in shown.out or "not supported" in shown.err + shown.out


def test_no_command_shows_the_help(cli: Cli) -> None:
    ran = cli()
    assert ran.code == 2
    assert "inspect" in ran.out


def test_the_reference_page_is_up_to_date() -> None:
    from moeconv.cli.reference import reference

    page = Path(__file__).parents[2] / "docs" / "cli.md"
    assert page.read_text() == reference() + "\n", (
        "run python -m moeconv.cli.reference > docs/cli.md"
    )
    for entry in COMMANDS:
        assert f"## moeconv {entry.name}\n" in page.read_text()
