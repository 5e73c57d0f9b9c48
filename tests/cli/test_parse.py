"""Sizes, shares, lists of numbers and expert maps, as users write them."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer import BadParameter

from moeconv.cli.parse import (
    parse_numbers,
    parse_share,
    parse_size,
    read_expert_map,
    show_numbers,
)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("4096", 4096),
        ("1B", 1),
        ("5GB", 5_000_000_000),
        ("5gb", 5_000_000_000),
        ("5 GB", 5_000_000_000),
        ("2GiB", 2_147_483_648),
        ("512MiB", 536_870_912),
        ("3MB", 3_000_000),
        ("7KB", 7_000),
        ("7KiB", 7_168),
        ("1.5GiB", 1_610_612_736),
        ("0.1GB", 100_000_000),  # in floats 0.1 * 10**9 is exact by luck only
        ("1.1TB", 1_100_000_000_000),
    ],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "GB", "5XB", "5G B", "1e9", "nan", "5GB5", "0GB", "0.1B", "99999999TB"]
)
def test_texts_that_are_no_size(text: str) -> None:
    with pytest.raises(BadParameter, match="size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("0", (0,)),
        ("0,3-5", (0, 3, 4, 5)),
        ("3-5,0", (0, 3, 4, 5)),
        ("7,7,6-7", (6, 7)),
        ("2-2", (2,)),
        ("1, 2", (1, 2)),
    ],
)
def test_lists_of_numbers(text: str, numbers: tuple[int, ...]) -> None:
    assert parse_numbers(text) == numbers
    assert parse_numbers(show_numbers(numbers)) == numbers


@pytest.mark.parametrize("text", ["", ",", "1,", "a", "3-", "-3", "5-3", "1.5", "0-9999999999"])
def test_texts_that_are_no_list(text: str) -> None:
    with pytest.raises(BadParameter):
        parse_numbers(text)


def test_numbers_are_shown_as_runs() -> None:
    assert show_numbers((0, 3, 4, 5, 9)) == "0,3-5,9"
    assert show_numbers(()) == ""


@pytest.mark.parametrize(("text", "share"), [("5%", 0.05), ("0.05", 0.05), ("1", 1), ("100%", 1)])
def test_shares(text: str, share: float) -> None:
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["0", "0%", "5", "101%", "-1%", "5%%", "nan", "%"])
def test_texts_that_are_no_share(text: str) -> None:
    with pytest.raises(BadParameter, match="5%"):
        parse_share(text)


@pytest.mark.parametrize("text", ["[[0, 1], [2, 3]]", '{"1": [2, 3], "0": [0, 1]}'])
def test_expert_maps(text: str, tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(text)
    assert read_expert_map(str(tmp_path / "map.json")) == ((0, 1), (2, 3))


@pytest.mark.parametrize(
    "text",
    ["", "[0, 1]", "[[0.5]]", "[[true]]", "[[-1]]", '{"1": [0]}', '{"a": [0]}', "7", "[" * 9999],
)
def test_files_that_are_no_expert_map(text: str, tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(text)
    with pytest.raises(BadParameter, match=r"\[\[0, 1\], \[2, 3\]\]"):
        read_expert_map(str(tmp_path / "map.json"))


def test_an_expert_map_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadParameter, match="No such file"):
        read_expert_map(str(tmp_path / "none.json"))
