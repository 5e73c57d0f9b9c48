"""`inspect DST`: experts, bytes and 4 KiB pages by rank or NUMA part, counted byte by byte here."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import Size, write_checkpoint
from tests.cli.runs import Cli

Counted = dict[tuple[int, int | None], tuple[int, int, int, int]]
CASES: list[tuple[str, tuple[str, ...], dict[tuple[int, int | None], list[int]]]] = [
    (
        "int8",
        ("--layout", "ktransformers", "--dtype", "int8", "--numa", "2"),
        {(0, 0): [0, 1, 2], (0, 1): [0, 1, 2]},
    ),
    ("bf16", ("--layout", "ktransformers", "--dtype", "bf16"), {(0, None): [0, 1, 2]}),
    (
        "ep",
        ("--layout", "vllm", "--tp", "2", "--ep", "--placement", "round-robin"),
        {(0, None): [0, 2], (1, None): [1]},
    ),
    (
        "tp",
        ("--layout", "vllm", "--tp", "2"),
        {(0, None): [0, 1, 2], (1, None): [0, 1, 2]},
    ),
]


def counted(root: Path) -> Counted:
    """Return (tensors, bytes, pages, shared pages) by place, from sets of page numbers."""
    pages: dict[tuple[int, int | None], set[tuple[str, int]]] = defaultdict(set)
    totals: dict[tuple[int, int | None], list[int]] = defaultdict(lambda: [0, 0])
    for path in root.glob("*.safetensors"):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        rank = re.search(r"rank-(\d+)", path.name)
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name == "__metadata__":
                continue
            part = re.search(r"numa\.(\d+)", name)
            at = (int(rank[1]) if rank else 0, int(part[1]) if part else None)
            begin, end = (8 + length + one for one in entry["data_offsets"])
            totals[at][0] += 1
            totals[at][1] += end - begin
            pages[at] |= {(path.name, byte // 4096) for byte in range(begin, end)}
    found: Counted = {}
    for at, mine in pages.items():
        others = set[tuple[str, int]]().union(*(one for key, one in pages.items() if key != at))
        found[at] = (totals[at][0], totals[at][1], len(mine), len(mine & others))
    return found


def places(facts: Any) -> Counted:
    return {
        (row["rank"], row["numa"]): (
            row["tensors"],
            row["nbytes"],
            row["pages"],
            row["shared_pages"],
        )
        for row in facts["map"]
    }


@pytest.mark.parametrize(("name", "words", "experts"), CASES, ids=[case[0] for case in CASES])
def test_what_lies_where(
    tmp_path: Path,
    cli: Cli,
    name: str,
    words: tuple[str, ...],
    experts: dict[tuple[int, int | None], list[int]],
) -> None:
    """Odd numbers of small tensors, so that places meet within pages."""
    size = Size(layers=2, hidden=192, intermediate=384, experts=3)
    write_checkpoint(tmp_path / "src", "qwen3moe", size)
    dst = tmp_path / "dst"
    assert cli("convert", tmp_path / "src", dst, *words).code == 0
    facts = cli("inspect", dst, "--json").json
    assert places(facts) == counted(dst)
    assert {(row["rank"], row["numa"]): row["experts"] for row in facts["map"]} == experts
    if name == "int8":
        assert all(row["shared_pages"] for row in facts["map"])
    table = cli("inspect", dst).out.split("4 KiB pages")[1]
    for row in facts["map"]:
        assert f"{row['nbytes']:,}" in table and f"{row['pages']:,}" in table


def test_files_that_cannot_be_read_leave_no_map(tmp_path: Path, cli: Cli) -> None:
    write_checkpoint(tmp_path / "src", "qwen3moe", Size())
    dst = tmp_path / "dst"
    assert cli("convert", tmp_path / "src", dst, "--layout", "vllm", "--tp", "2").code == 0
    file = dst / "model-rank-0-part-0.safetensors"
    whole = file.read_bytes()
    file.unlink()
    assert [row["rank"] for row in cli("inspect", dst, "--json").json["map"]] == [1]
    file.write_bytes(b"\xff" * 8 + whole[8:])
    facts = cli("inspect", dst, "--json").json
    assert facts["map"] is None
    assert "what lies where is not shown" in facts["notes"][-1]
