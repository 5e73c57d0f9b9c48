"""Profiles: what threads do, what bounds kernels, and that no aim is missed without a reason."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench import aims, growth, kernel_probe, kernel_profile, profiles, scaling, timeline, trace
from bench.aims import Aim
from bench.kernel_profile import Pace, Profile, Profiles
from bench.kernels import PROFILED
from bench.measure import Cost, convert, run_telling
from bench.profiles import Trace
from bench.timeline import Part
from bench.trace import MAIN, Span
from moeconv.demo import make_checkpoint
from moeconv.measure.cases import Tile, cases
from tests.checkpoints import quick_directory
from tests.test_bench import SVG, columns

SMALL = kernel_profile.Effort((Tile(32, 256), Tile(64, 256)), Tile(64, 256), 2, 0.001, 1)


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_directory() as directory:
        yield directory


def cost(wall: float) -> Cost:
    return Cost(wall, wall / 2, 2**30, 2 * 10**9)


def test_a_watched_conversion_is_the_same(folder: Path) -> None:
    """Every seam is met (trace.run raises else), every thread's time is told, no byte differs."""
    make_checkpoint(folder / "source")
    options = ("--layout", "vllm", "--tp", "2")
    convert(folder / "source", folder / "plain", *options)
    found = profiles.traced(folder / "source", folder / "watched", *options)
    told = [
        json.loads((folder / name / "moeconv.json").read_text()) for name in ("plain", "watched")
    ]
    assert told[0] == told[1]
    assert found.lanes[0] == MAIN and len(found.lanes) > 1
    whats = {span.what for span in found.spans}
    assert {trace.READING, trace.DECODING, trace.DIGESTING, trace.WRITING, trace.SYNCING} <= whats
    assert whats <= set(timeline.COLORS)
    for lane in found.lanes:
        parts = [part for part in found.parts if part.lane == lane]
        assert all(one.start < one.stop for one in parts)
        assert all(one.stop <= two.start for one, two in pairwise(parts))
    assert 0 < sum(span.cpu for span in found.spans) <= found.cpu


def test_an_unmet_seam_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    seam = ("moeconv.errors", "Refused.renamed")
    monkeypatch.setattr(trace, "SEAMS", {seam: trace.REST})
    with pytest.raises(AttributeError, match="renamed"):
        trace.replace(trace.Recorder(0.0), seam)


def test_calls_inside_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU seconds count once: for the innermost call."""
    ticks = iter([0.0, 1.0, 4.0, 9.0])
    monkeypatch.setattr(trace.time, "thread_time", lambda: next(ticks))
    recorder = trace.Recorder(0.0)
    inner = recorder.wrap(trace.READING, lambda: None)
    recorder.wrap(trace.REST, inner)()
    assert [(span.what, span.cpu) for span in recorder.spans] == [
        (trace.READING, 3.0),
        (trace.REST, 6.0),
    ]


# Starts for 1 s; one worker reads, then decodes, another writes meanwhile; 1 s to sync.
SPANS = (
    Span(MAIN, trace.STARTING, 0.0, 1.0, 0.75),
    Span(MAIN, trace.REST, 1.0, 6.0, 0.25),
    Span(MAIN, trace.WATCHING, 1.0, 5.0, 0.0),
    Span(MAIN, trace.SYNCING, 5.0, 6.0, 0.125),
    Span("one", trace.REST, 1.0, 5.0, 0.125),
    Span("one", trace.READING, 1.0, 2.0, 0.5),
    Span("one", trace.DECODING, 2.0, 4.0, 2.0),
    Span("two", trace.WRITING, 3.0, 4.5, 0.125),
)
BY_HAND = Trace(6.0, 4.0, SPANS)


def test_where_the_time_goes_by_hand() -> None:
    one = [part for part in BY_HAND.parts if part.lane == "one"]
    assert one == [
        Part("one", trace.READING, 1.0, 2.0),
        Part("one", trace.DECODING, 2.0, 4.0),
        Part("one", trace.REST, 4.0, 5.0),
    ]
    told = profiles.overlap(BY_HAND)
    assert told.shares == {"reading": 0.25, "computing": 0.5, "writing": 0.375}
    assert (told.seconds, told.together, told.none) == (4.0, 0.25, 0.125)
    assert told.cores == 2.75 / 4
    rows = {row[0]: row[1:] for row in columns(profiles.table(BY_HAND), "seconds of")}
    assert rows["decoding"] == ["", "2.000", "", "2.000", "50%"]
    assert rows["starting Python"] == ["1.000", "", "", "0.750", "19%"]
    assert rows["all of it"] == ["6.000", "4.000", "1.500", "4.000", "100%"]
    assert columns(profiles.overlaps({"job": BY_HAND}), "job") == [
        ["job", "6.00", "1.00", "4.00", "1.00", "25%", "50%", "38%", "25%", "12%", "0.69"]
    ]
    assert "something is written 38% of the time and computed 50%" in profiles.no_writing(BY_HAND)
    assert "start 0.75, reading 0.50, the kernels 2.00" in profiles.why_cpu(BY_HAND, 1.0)


def test_a_timeline(tmp_path: Path) -> None:
    parts = [Part("a", trace.READING, 0, 2.25), Part("a", trace.WRITING, 2.25, 4)]
    blue, red = timeline.COLORS[trace.READING], timeline.COLORS[trace.WRITING]
    assert list(timeline.columns(parts, 1.0)) == [(blue, 0, 2), (red, 2, 2)]
    assert timeline.draw(tmp_path / "t.svg", "t", ["a"], parts) == ["![t](plots/t.svg)"]
    paths = list(ElementTree.parse(tmp_path / "t.svg").iter(SVG + "path"))
    assert [path.get("fill") for path in paths] == [blue, red]


def test_every_probe_runs() -> None:
    titles = [*(case.title for case in cases(SMALL.large)), *kernel_probe.STEPS]
    assert set(PROFILED) | set(kernel_profile.STEPPED) <= set(titles)
    jobs = [kernel_probe.Job(title, SMALL.large, 1) for title in titles]
    assert all(one > 0 for one in kernel_probe.seconds_per_call(jobs, 0.0, together=False))


def test_kernels_are_profiled() -> None:
    packer = kernel_probe.form_title("amxint8")
    found = kernel_profile.run(["MXFP4", "packed INT4", "GPTQ INT4", packer], SMALL)
    assert found.roof_of["MXFP4"] == "roofline, 4 bits" and len(found.of) == 5
    lines = kernel_profile.section(found)
    assert len(columns(lines, "| in the cache")) == 2 + 5


def test_what_bounds_kernels_by_hand() -> None:
    """64 MiB a call at 20 GB/s; in the cache 40; the roofline 25 in memory."""
    one = Profile(Pace(40.0, 80.0), Pace(20.0, 22.0), 1e-4)
    packer = kernel_probe.form_title("amxint8")
    of = dict.fromkeys(("MXFP4", packer, "packed INT4", "GPTQ INT4"), one)
    of["roof"] = Profile(Pace(100.0, 200.0), Pace(25.0, 25.0), 0.0)
    steps = dict.fromkeys(kernel_profile.STEPPED, Pace(30.0, 33.0))
    effort = SMALL._replace(large=Tile(1 << 10, 1 << 10))
    found = Profiles(of, steps, {"MXFP4": "roof"}, effort)
    computing, moving, calling = kernel_profile.share_of_time(found, "MXFP4")
    assert (computing, moving) == (0.5, 0.8) and calling == pytest.approx(1e-4 * 20e9 / 2**21)
    (row,) = [row for row in columns(kernel_profile.table(found), "| in the") if row[0] == "MXFP4"]
    assert row[1:] == ["40.0", "2.00", "20.0", "1.10", "50%", "80%", "95%", "100"]
    told = columns(kernel_profile.steps(found), "alone")
    assert [row[3:] for row in told if row[0] == kernel_probe.WORDS] == [["GPTQ INT4", "67%"]]
    assert "alone takes 50%" in kernel_profile.why_share(found, "MXFP4")
    assert "make 2.00 times one, in memory 1.10" in kernel_profile.why_twice(found, "MXFP4")
    why = kernel_profile.why_times(found, "MXFP4", 5.0, 15)
    assert "15 times are 75 GB/s" in why and "is 5.0 times the peer in memory and 20.0" in why
    assert "reading the input alone is 6.0" in kernel_profile.why_times(found, packer, 5.0, 10)


def test_scaling_by_hand() -> None:
    """A line of 0.5 s and 0.7 s per GB: found, and what is off it shows."""
    rows = [
        growth.Row(
            growth.Setting(layers, 0), 10**9, gb * 10**9, [cost(0.5 + 0.7 * gb)], [cost(gb / 2)]
        )
        for layers, gb in ((1, 1), (4, 4), (19, 16))
    ]
    ours, direct = growth.fits(rows)
    assert ours[:3] == pytest.approx((0.5, 0.7, 1)) and direct[:3] == pytest.approx((0, 0.5, 1))
    cells = columns(scaling.table(rows), "default")[0]
    assert cells[1:8] == ["2GiB", "1.00", "1.20", "1.200", "0.60", "1.00", "2.000"]
    assert columns(growth.spreads(rows), "GB out")[2][7:] == ["0.50 - 0.50", "1.00", "2.40"]
    level, apart, memory = scaling.aimed(rows, {})
    assert level.value == pytest.approx(1.2 / (0.7 + 0.5 / 16)) and not level.met
    assert apart.value == pytest.approx(1) and apart.met
    assert memory.value == -1
    rows[1] = rows[1]._replace(runs=[cost(9.0), cost(8.0), cost(11.0)])
    apart = scaling.aimed(rows, {})[1]
    assert not apart.met and "4.00 GB, whose 3 turns took 8.00 - 11.00 s" in apart.why()


def test_aims_are_computed() -> None:
    """Only what is missed is asked for its reason, and a missed one without is told."""

    def why() -> str:
        return "slow"

    def never() -> str:
        raise AssertionError("it is met")

    rows = aims.table(
        [
            Aim("a", 0.6, 0.7, why, form=".0%"),
            Aim("b", 0.7, 0.7, never),
            Aim("c", 2, 1, lambda: "", True),
        ]
    )
    assert rows[2:5] == [
        "| a | at least 70% | 60% | **no** |",
        "| b | at least 0.70 | 0.70 | yes |",
        "| c | at most 1.00 | 2.00 | **no** |",
    ]
    assert rows[-2:] == ["- a: slow", f"- c: {aims.UNEXPLAINED}"]
    told = aims.summary([*rows, "| no aim | yes, it is none |"])
    assert told == f"1 of 3 aims are met; {aims.UNEXPLAINED}: 1 of the others."
    assert "why each other one is not" in aims.summary(rows[:-1])


def unexplained(page: str) -> list[str]:
    """Return the aims of a page that are missed with no line below their table that says why."""
    found = []
    for section in re.split(r"^#+ ", page, flags=re.MULTILINE):
        told = section.partition(aims.STANDING)[2].splitlines()
        for line in section.splitlines():
            cells = line.split(" | ")
            if cells[-1] == f"{aims.MISSED} |":
                begin = f"- {cells[0].removeprefix('| ')}: "
                if not any(one.startswith(begin) and aims.UNEXPLAINED not in one for one in told):
                    found.append(begin)
    return found


def test_a_missed_aim_without_a_line_is_found() -> None:
    told = [
        Aim("met: yes", 2.0, 1.0, str),
        Aim("missed: told", 0.5, 1.0, lambda: "slow"),
        Aim("missed: not told", 0.5, 1.0, str),
    ]
    page = "\n".join(["# One", *aims.table(told[:2]), "", "# Two", *aims.table(told[:2])])
    assert unexplained(page) == []
    assert unexplained(page.replace("- missed: told: slow", "", 1)) == ["- missed: told: "]
    assert unexplained("\n".join(aims.table(told))) == ["- missed: not told: "]


def test_no_aim_is_missed_without_a_reason() -> None:
    page = (Path(__file__).parents[1] / "docs" / "benchmarks.md").read_text()
    assert aims.UNEXPLAINED not in page
    assert unexplained(page) == []


def test_cpu_seconds_are_no_fewer_than_a_process_counts_itself() -> None:
    """In ticks of a hundredth of a second they would be, of every other short process."""
    code = "import time\nfigures['own'] = time.process_time()\n"
    for told in (run_telling(code) for _ in range(12)):
        assert told.figures["own"] <= told.cost.cpu
