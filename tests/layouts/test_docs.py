"""docs/layouts.md holds the vllm tables as the code has them, and names the states compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from moeconv.layouts.vllm_rows import TESTED, Architecture, Piece, Row
from moeconv.layouts.vllm_tables import ARCHITECTURES
from tests.layouts.test_vllm_keep import CHECKPOINTS, WHOLE
from tests.layouts.test_vllm_state import DUMPS

ROOT = Path(__file__).parents[2]
DOC = ROOT / "docs" / "layouts.md"
SECTIONS = ("queries of ", "keys of ", "values of ")


def describe(piece: Piece) -> str:
    """Return a piece as the page writes it: `key` and how it is split."""
    part = SECTIONS[piece.section] if piece.section >= 0 else ""
    return f"{part}`{piece.key}`" + (f" ({piece.split})" if piece.split else "")


def line(row: Row) -> str:
    """Return a row of an architecture's table."""
    source = ", ".join(describe(piece) for piece in row.pieces) or f"constant {row.constant}"
    remarks = [
        row.when,
        "interleaved" if row.interleaved else "",
        row.dtype,
        "optional" if row.optional else "",
        f"if `{row.flag}`" if row.flag else "",
        f"with `{row.given}`" if row.given and row.given[0] != "!" else "",
        f"without `{row.given[1:]}`" if row.given.startswith("!") else "",
        f"plain: `{row.plain}`" if row.plain else "",
    ]
    return f"| `{row.name}` | {source} | {', '.join(one for one in remarks if one)} |"


def table(architecture: Architecture) -> str:
    """Return an architecture's section of the page."""
    head = [
        f"### {architecture.name}",
        f"Families: {', '.join(architecture.families)}.",
        "",
        "| parameter | from | when |",
        "|---|---|---|",
    ]
    return "\n".join([*head, *(line(row) for row in architecture.rows)])


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda one: one.name)
def test_the_page_has_every_table(architecture: Architecture) -> None:
    assert table(architecture) + "\n" in DOC.read_text()


def test_the_page_names_the_states_that_were_compared() -> None:
    text = DOC.read_text()
    for dump in DUMPS:
        assert f"`{dump.parent.name}` {dump.stem}" in text, dump
    for source, dump in WHOLE:
        assert f"`{source.parent.name}` {dump.stem}" in text
    for source, dump in CHECKPOINTS:
        assert f"`{source.name}` {dump.stem.rpartition('.')[2]}" in text
    assert all(f"vLLM {version}" in text for version in TESTED)
