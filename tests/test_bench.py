"""Every part of the benchmarks runs, at sizes that say nothing, and its peers decode the same."""

from __future__ import annotations

import shutil
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from bench import __main__ as command
from bench import (
    aims,
    cold,
    contest,
    fp8_job,
    kernels,
    kt_job,
    loading,
    main_job,
    plots,
    ranks,
    scaling,
    start_up,
)
from bench.aims import Aim
from bench.architectures import KINDS, Size
from bench.checkpoints import source, write_checkpoint
from bench.kernel_peers import QUANTIZERS, installed, peers_of
from bench.kernels import Beside
from bench.measure import Cost, cool, run_python, warm
from moeconv.codecs.base import Window
from moeconv.kernels.cpu import KERNELS
from moeconv.measure.cases import Case, Tile, cases
from moeconv.measure.figures import Rates
from moeconv.measure.kernels import Effort
from tests.checkpoints import quick_directory, read_all, same_bits

TINY = Size(1, 8, 256, 512, vocab=64, heads=8, kv_heads=8, head_dim=32, q_lora=128, kv_lora=128)
SIZES = dict.fromkeys(KINDS, TINY)
TILE = Tile(128, 512)
EFFORT = kernels.Effort(Effort(TILE, tiles=2, passes=1, repeats=1), peer_tiles=1, peer_repeats=1)
# In units of the largest value. Peers have their scales in BF16.
TOLERANCE = 2.0**-7
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_directory() as directory:
        yield directory


@pytest.fixture
def missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every aim missed: each is then explained."""
    table = aims.table

    def explained(given: Sequence[Aim]) -> list[str]:
        lines = table(given)
        assert sum(line.startswith("- ") for line in lines) == len(given)
        assert not any(aims.UNEXPLAINED in line for line in lines)
        return lines

    monkeypatch.setattr(Aim, "met", property(lambda aim: False))
    monkeypatch.setattr(aims, "table", explained)


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
    """But for what no weight is stored as: tables of integers, scales read on a finer grid."""
    assert {case.kernel for case in cases(TILE)} == set(KERNELS) - {"raw", "repeated"}


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


def test_kernels(folder: Path) -> None:
    packed = {"amxint4": Beside(kernels.KT, 1.0, True)}
    rows = list(kernels.run(EFFORT, packed))
    decoding = [case.title for case in cases(TILE)]
    assert [row.rates.title for row in rows[: len(decoding)]] == decoding
    assert all(row.rates.one > 0 and row.rates.all > 0 for row in rows)
    assert all((row.rates.roof > 0) == (row.rates.title in decoding) for row in rows)
    assert len(kernels.table(rows)) == 2 + sum(max(len(row.peers), 1) for row in rows)
    assert "](plots/k.svg)" in kernels.picture(folder / "k.svg", rows)[0]


def test_quantizers_in_torch() -> None:
    values = torch.tensor([[127.0, -3.0], [0.5, 0.25]]).bfloat16()
    codes, scales = QUANTIZERS["amxint8"](values)
    assert codes.tolist() == [[127, -3], [127, 64]] and scales[0].item() == 1.0
    nibbles, _ = QUANTIZERS["amxint4"](torch.tensor([[7.0, -2.0]]).bfloat16())
    assert nibbles.view(torch.uint8).tolist() == [[7 | 14 << 4]]


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
def test_ranks(folder: Path, missed: None) -> None:
    found = ranks.run(folder, 1, SIZES)
    assert [(row.kind, row.target) for row in found] == [
        (kind, target) for kind in ranks.TITLES for target in ranks.targets_of(kind)
    ]
    assert all(row.cost.read_chars >= row.source_nbytes / 2 for row in found)
    assert len(ranks.table(found)) == 2 + len(found)
    aims.table(ranks.aimed(folder, found))


@pytest.mark.slow
def test_scaling(folder: Path, monkeypatch: pytest.MonkeyPatch, missed: None) -> None:
    monkeypatch.setattr(scaling, "MADE_NBYTES", 1 << 20)
    lines = scaling.section(folder, folder / "p", 1, TINY._replace(hidden=64, intermediate=64))
    rows = [row for row in columns(lines, "workers") if row[0] in scaling.JOBS.values()]
    assert len(rows) == len(scaling.GROWING)
    assert [row[0] for row in rows[:3]] == list(scaling.JOBS.values())
    assert not list(folder.glob("scaling-*/*"))
    assert len(list((folder / "p").glob("scaling-*.svg"))) == 2


@pytest.mark.slow
def test_main_job(folder: Path, missed: None) -> None:
    rows = columns(main_job.section(folder, folder, 1, peer=False, size=TINY), "moeconv")
    assert [row[0] for row in rows] == [main_job.HF, contest.DIRECT, main_job.TP8, contest.COPY]


@pytest.mark.slow
def test_fp8_job(folder: Path, missed: None) -> None:
    lines = fp8_job.section(folder, folder, 1, TINY)
    titles = [row[0] for row in columns(lines, "moeconv")]
    assert len(titles) == 6 and titles[0] == fp8_job.OURS and titles[-1] == fp8_job.DEEPSEEK
    assert len(columns(lines, "aim")) == 2 + 3


@pytest.mark.slow
def test_others_write_the_same_from_fp8(folder: Path) -> None:
    """What is compared in speed is the same work: the same tensors, bit for bit."""
    root = source(folder, "deepseek-v3", TINY).root
    written = {}
    ours, *others = [way for way in fp8_job.ways() if way.title not in contest.LIMITS]
    for way in (ours, *others):
        target = folder / "out"
        way.run(contest.Turn(root, target, target, 0))
        written[way.title] = read_all(target)
        shutil.rmtree(target)
    expected = written.pop(ours.title)
    for title, found in written.items():
        assert set(found) == set(expected), title
        assert all(same_bits(found[name], expected[name]) for name in found), title


@pytest.mark.slow
@pytest.mark.parametrize("there", (False, True))
def test_kt_job(folder: Path, monkeypatch: pytest.MonkeyPatch, missed: None, there: bool) -> None:
    """Without kt-kernel its rows are left out, and the page says so."""
    if there and not kt_job.python():
        pytest.skip(f"{kt_job.KT_PYTHON} names no Python that has kt-kernel")
    if not there:
        monkeypatch.delenv(kt_job.KT_PYTHON, raising=False)
    lines = kt_job.section(folder, folder, 1, TINY)
    assert len(columns(lines, "moeconv, int4")) == 2 + there
    assert any("did not run" in line for line in lines) != there
    if there:
        assert kernels.packed_by_kt(folder, TINY)["amxint8"].rate > 0


@pytest.mark.slow
def test_cold(folder: Path, missed: None) -> None:
    rows = columns(cold.section(folder, 1, SIZES), "source")
    assert [row[1] for row in rows[2:]] == ["warm", "cold"] * len(cold.JOBS)


def test_cool_and_warm(tmp_path: Path) -> None:
    """A file that was dropped is read from the disk again, one that was read is not."""
    (tmp_path / "x").write_bytes(bytes(8 << 20))
    read = f"open({str(tmp_path / 'x')!r}, 'rb').read()"
    found = {}
    for prepare in (cool, warm):
        prepare(tmp_path)
        found[prepare] = run_python(read).read_disk
    if not found[cool]:
        pytest.skip("this file system has no page cache to drop from")
    assert found[cool] >= 8 << 20 > found[warm]


def test_start_up(folder: Path, missed: None) -> None:
    lines = start_up.section(folder, 1, TINY, TINY._replace(vocab=4096))
    assert len(columns(lines, "command")) == 2 + 3 + 2 + 1 + len(start_up.PLANS)
    assert len(columns(lines, "aim")) == 2 + 4
    assert not (folder / "sparse").exists()


def test_files_of_a_checkpoint(folder: Path) -> None:
    """Every tensor is in the file that the index names; sparse files take no room."""
    kind = KINDS["deepseek-v3"]
    config, tensors = kind.config(TINY), list(kind.tensors(TINY))
    write_checkpoint(folder / "a", iter(tensors), config, 1 << 20)
    assert {name: t.dtype for name, t in read_all(folder / "a").items()}.keys() == {
        tensor.name for tensor in tensors
    }
    assert len(list((folder / "a").glob("*.safetensors"))) > 1
    write_checkpoint(folder / "b", iter(tensors), config, 1 << 20, sparse=True)
    (path, *_) = sorted((folder / "b").glob("*.safetensors"))
    assert path.stat().st_size == (folder / "a" / path.name).stat().st_size
    assert path.stat().st_blocks * 512 < path.stat().st_size / 2


def cost(wall: float, read: int = 0) -> Cost:
    return Cost(wall, wall / 2, 2**30, read)


def test_tables_by_hand() -> None:
    rows = [
        ranks.Row("gpt-oss", "hf", 4 * 10**9, 10**9, [cost(2.0, 101 * 10**7)]),
        ranks.Row("gpt-oss", "tp8", 4 * 10**9, 10**9, [cost(2.5, 103 * 10**7)]),
    ]
    cells = columns(ranks.table(rows), "gpt-oss")[1]
    assert cells[2:] == ["4.00", "1.030", "2.50", "2.50 - 2.50", "1.25"]
    assert [(aim.value, aim.met) for aim in ranks.aimed(Path(), rows)] == [
        (1.03, True),
        (1.25, False),
    ]
    loaded = [loading.Row("a", 0.5, 1.0, 2e6, 2**30, 2**29), loading.Row("b", 1, 4, 2e6, 0, 0)]
    assert columns(loading.table(loaded), "b")[0][1:6] == ["2", "1000.0", "2.0", "4000.0", "4.0"]
    peers = (Beside("p", 0.5), Beside("q", 2.0, all_threads=True))
    given = [kernels.Row(Rates("k", 6.0, 12.0, 8.0, 12.0), peers)]
    first, second = columns(kernels.table(given), "k")
    assert first[1:] == ["6.00", "12.00", "2.00", "8.00", "75%", "1.50", "p", "0.500", "12.0"]
    assert second[7:] == ["q", "2.000", "6.0"]


def test_contests_by_hand() -> None:
    runs = {
        "moeconv": [Cost(3, 4, 2**30, 10**9), Cost(2, 4, 2**30, 10**9), Cost(1, 4, 2**30, 10**9)],
        contest.DIRECT: [Cost(1, 1)],
        "other": [Cost(9, 8)],
    }
    outcome = contest.Outcome(10**9, 4 * 10**9, runs)
    ours, direct, other = columns(contest.table(outcome), "moeconv")
    assert ours[1:] == [
        "2.00",
        "1.00 - 3.00",
        "1.00",
        "2.00",
        "50%",
        "4.0",
        "1.00",
        "1.00",
        "1.000",
    ]
    assert direct[1:6] == ["1.00", "1.00 - 1.00", "0.50", "4.00", "100%"]
    assert other[1:] == ["9.00", "9.00 - 9.00", "4.50", "0.44", "11%", "8.0", "2.00", "", ""]


def test_plots_are_svg(tmp_path: Path) -> None:
    shown = plots.bars(tmp_path / "b.svg", "a < b", [plots.Bar("x", 1.0), plots.Bar("y", 4.0)])
    assert shown == ["![a < b](plots/b.svg)"]
    widths = [
        float(box.get("width", 0))
        for box in ElementTree.parse(tmp_path / "b.svg").iter(SVG + "rect")
    ]
    assert widths[1] == pytest.approx(4 * widths[0], rel=0.01)
    plots.lines(tmp_path / "l.svg", "t", [plots.Line("one", [(0, 0), (2, 1)])], "GB")
    (line,) = ElementTree.parse(tmp_path / "l.svg").iter(SVG + "polyline")
    (x0, y0), (x1, y1) = (map(float, at.split(",")) for at in str(line.get("points")).split())
    assert plots.ticks(16.2) == [0, 5, 10, 15] and plots.ticks(2) == [0, 0.5, 1, 1.5, 2]
    assert (x0, x1) == (plots.LEFT, plots.WIDTH - plots.RIGHT) and y1 < y0


def test_only_some_parts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page is written by a whole run, or where --out says."""
    page, elsewhere = tmp_path / "benchmarks.md", tmp_path / "some.md"

    def part(name: str) -> Callable[..., list[str]]:
        return lambda options: [f"## {name}"]

    monkeypatch.setattr(command, "DOCUMENT", page)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "PARTS", {name: part(name) for name in command.PARTS})
    command.main(["--only", "ranks,kernels"])
    assert "## kernels" in capsys.readouterr().out and not page.exists()
    command.main(["--only", "ranks", "--out", str(elsewhere)])
    assert "## ranks" in elsewhere.read_text() and "## main" not in elsewhere.read_text()
    command.main([])
    monkeypatch.setitem(command.PARTS, "ranks", lambda options: ["## ranks", "anew"])
    command.main(["--only", "ranks", "--update"])
    assert page.read_text().count("anew") == page.read_text().count("## ranks") == 1
    assert all(f"## {name}" in page.read_text() for name in command.PARTS)
    with pytest.raises(ArgumentTypeError, match="'speed'"):
        command.names("ranks,speed")
