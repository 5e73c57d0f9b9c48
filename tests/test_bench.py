"""Every part of the benchmarks runs, at sizes that say nothing, and its peers decode the same."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import __main__ as command
from bench import kernels, loading, main_job, ranks, scaling, start_up
from bench.checkpoints import Size, source
from bench.kernel_peers import installed, peers_of
from bench.measure import Cost
from moeconv.codecs.base import Window
from moeconv.kernels.cpu import KERNELS
from moeconv.measure.cases import Case, Tile, cases
from moeconv.measure.figures import Rates
from moeconv.measure.kernels import Effort
from tests.checkpoints import quick_directory

TINY = Size(1, 8, 256, 512, vocab=64, heads=8, kv_heads=8, head_dim=32)
SIZES = {"gpt-oss": TINY, "qwen3-moe": TINY}
TILE = Tile(128, 512)
EFFORT = kernels.Effort(Effort(TILE, tiles=2, passes=1, repeats=1), 1, 1)
# In units of the largest value. Peers have their scales in BF16.
TOLERANCE = 2.0**-7


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_directory() as directory:
        yield directory


def columns(lines: list[str], title: str) -> list[list[str]]:
    """Return the cells of every row of the table whose first row begins with `title`."""
    start = next(at for at, line in enumerate(lines) if line.startswith(f"| {title}"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_every_kernel_has_a_case() -> None:
    assert {case.kernel for case in cases(TILE)} == set(KERNELS)


@pytest.mark.slow
@pytest.mark.parametrize("case", list(cases(TILE)), ids=lambda case: case.title)
def test_peers_decode_the_same(case: Case) -> None:
    out = np.empty(TILE, np.uint16)
    KERNELS[case.kernel](case.parts, Window(0, TILE.rows, 0, TILE.cols), case.params, "BF16", out)
    ours = torch.from_numpy(out).view(torch.bfloat16).float()
    assert ours.isfinite().all()
    for peer in installed(peers_of(case)):
        found = torch.as_tensor(peer.make(case, TILE)()).float()
        if peer.title == "transformers":
            found = found[0].T
        apart = (found - ours).abs().max() / ours.abs().max()
        assert apart <= TOLERANCE, (peer.title, float(apart))


def test_kernels() -> None:
    rows = list(kernels.run(EFFORT))
    decoding = [case.title for case in cases(TILE)]
    assert [row.rates.title for row in rows[: len(decoding)]] == decoding
    assert all(row.rates.one > 0 and row.rates.all > 0 for row in rows)
    assert all((row.rates.roof > 0) == (row.rates.title in decoding) for row in rows)
    assert len(kernels.table(iter(rows))) == 2 + sum(max(len(row.peers), 1) for row in rows)


def test_sources_are_written_once(folder: Path) -> None:
    first = source(folder, "gpt-oss", TINY)
    told = (first.root / "config.json").stat().st_mtime_ns
    assert source(folder, "gpt-oss", TINY) == first
    assert (first.root / "config.json").stat().st_mtime_ns == told
    assert source(folder, "gpt-oss", TINY._replace(layers=2)).nbytes > first.nbytes


@pytest.mark.slow
def test_loading(folder: Path) -> None:
    rows = columns(loading.section(folder, 1, TINY), "`moeconv.load")
    assert [row[1] for row in rows] == [rows[0][1]] * len(loading.WAYS)  # as many bytes
    assert not [path for path in folder.iterdir() if path.name != "qwen3-moe"]


@pytest.mark.slow
def test_ranks(folder: Path) -> None:
    found = ranks.run(folder, 1, SIZES)
    assert [(row.kind, row.target) for row in found] == [
        (kind, target) for kind in ranks.TITLES for target in ranks.targets_of(kind)
    ]
    assert all(row.cost.read_chars >= row.source_nbytes / 2 for row in found)
    assert len(ranks.table(found)) == 2 + len(found)


@pytest.mark.slow
def test_scaling(folder: Path) -> None:
    lines = scaling.section(folder, 1, TINY._replace(hidden=64, intermediate=64))
    assert len(columns(lines, "layers")) == 2 + len(scaling.LAYERS)
    assert len(columns(lines, "--memory")) == 2 + len(scaling.MEMORIES) * len(scaling.JOBS)
    assert not list(folder.glob("scaling-*/*"))


@pytest.mark.slow
def test_main_job(folder: Path) -> None:
    rows = columns(main_job.section(folder, 1, peer=False, size=TINY), "moeconv")
    assert [row[0] for row in rows] == ["moeconv, `--layout hf`", "moeconv, `--layout vllm --tp 8`"]


def test_start_up() -> None:
    assert len(columns(start_up.section(1), "command")) == 4


def cost(wall: float, read: int = 0) -> Cost:
    return Cost(wall, wall / 2, 2**30, read)


def test_tables_by_hand() -> None:
    rows = [
        ranks.Row("gpt-oss", "hf", 4 * 10**9, 10**9, cost(2.0, 101 * 10**7)),
        ranks.Row("gpt-oss", "tp8", 4 * 10**9, 10**9, cost(2.5, 103 * 10**7)),
    ]
    cells = columns(ranks.table(rows), "gpt-oss")[1]
    assert cells[2:] == ["4.00", "1.030", "2.50", "1.25"]
    grown = [
        scaling.Row(1, 10**9, "2GiB", 2, cost(1.2)),
        scaling.Row(4, 4 * 10**9, "2GiB", 2, cost(4.0)),
    ]
    assert columns(scaling.growing_table(grown), "1")[0] == [
        "1",
        "1.00",
        "1.20",
        "1.20",
        "1.20",
        "0.60",
        "1.00",
    ]
    assert columns(scaling.bounded_table(grown), "2GiB")[0][-1] == "2.35"
    loaded = [loading.Row("a", 0.5, 1.0, 2e6, 2**30, 2**29), loading.Row("b", 1, 4, 2e6, 0, 0)]
    assert columns(loading.table(loaded), "b")[0][1:6] == ["2", "1000.0", "2.0", "4000.0", "4.0"]
    given = iter([kernels.Row(Rates("k", 6.0, 12.0, 8.0, 12.0), (("p", 0.5), ("q", 2.0)))])
    first, second = columns(kernels.table(given), "k")
    assert first[1:] == ["6.00", "12.00", "2.00", "8.00", "75%", "1.50", "p", "0.500", "12"]
    assert second[7:] == ["q", "2.000", "3"]


def test_only_some_parts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page is written by a whole run, or where --out says."""
    page, elsewhere = tmp_path / "benchmarks.md", tmp_path / "some.md"

    def part(name: str) -> Callable[..., list[str]]:
        return lambda options: [f"## {name}"]

    monkeypatch.setattr(command, "DOCUMENT", page)
    monkeypatch.setattr(command, "PARTS", {name: part(name) for name in command.PARTS})
    command.main(["--only", "ranks,kernels"])
    assert "## kernels" in capsys.readouterr().out and not page.exists()
    command.main(["--only", "ranks", "--out", str(elsewhere)])
    assert "## ranks" in elsewhere.read_text() and "## main" not in elsewhere.read_text()
    command.main([])
    assert all(f"## {name}" in page.read_text() for name in command.PARTS)
    with pytest.raises(ArgumentTypeError, match="'speed'"):
        command.names("ranks,speed")
