"""The documents name everything that the program has, and nothing that is not there."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

from moeconv.codecs import CODECS
from moeconv.families.gguf_names import ARCHITECTURES
from moeconv.families.tables import FAMILIES
from moeconv.plan import LAYOUTS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
INTERNAL_CODECS = {"repeated"}  # how a coarser grid of scales is kept, no format of its own


def test_every_codec_has_a_line_with_a_test() -> None:
    page = (ROOT / "docs" / "formats.md").read_text()
    lines = dict(re.findall(r"^\| (\S+) \|(.+)\|$", page, re.MULTILINE))
    for name in CODECS.keys() - INTERNAL_CODECS:
        tests = re.findall(r"`(tests/\S+\.py)`", lines[name])
        assert tests and all((ROOT / test).exists() for test in tests), name


def test_every_family_and_layout_is_documented() -> None:
    page = (ROOT / "docs" / "formats.md").read_text()
    for family in FAMILIES:
        assert f"| {family.name} |" in page
        for model_type in family.model_types:
            assert f"`{model_type}`" in page
    layouts = (ROOT / "docs" / "layouts.md").read_text()
    for layout in LAYOUTS:
        assert re.search(rf"^## .*\b{layout.name}\b", layouts, re.MULTILINE | re.IGNORECASE)


def test_verified_gguf_architectures_are_documented() -> None:
    page = (ROOT / "docs" / "formats.md").read_text()
    for row in ARCHITECTURES:
        if row.verified:
            assert row.arch in page


def test_the_table_of_rooms_has_every_file_and_no_other() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (`.+`) \|", page, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    there = {path.name for path in (ROOT / "moeconv").glob("[a-z]*.py")}
    there |= {f"{path.parent.name}/" for path in (ROOT / "moeconv").glob("*/__init__.py")}
    assert [name for name in sorted(there) if not any(fnmatch(name, one) for one in named)] == []
    assert [one for one in sorted(named) if not any(fnmatch(name, one) for name in there)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target
