"""What bounds a conversion: each bound in turn, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moeconv.estimate import DECODE, MEMORY, READ, START, WRITE, Place, estimate
from moeconv.measure.figures import Disk, Figures, Rates
from moeconv.workload import Workload

GB = 10**9
FIGURES = Figures(
    threads=4,
    start_seconds=1.0,
    rates={
        "memory 16": Rates("16 bits to 16", 10.0, 20.0),
        "mxfp4": Rates("MXFP4", 2.0, 8.0),
        "copy": Rates("copying rows", 5.0, 10.0),
        "transpose": Rates("transposing", 4.0, 8.0),
        "digest": Rates("digests", 10.0, 40.0),
    },
)
SOURCE = Disk(read=Rates("read", 1.0, 4.0), threads=8)
OUTPUT = Disk(write=Rates("write", 1.0, 2.0), threads=8)
PLACE = Place(SOURCE, OUTPUT, 8)
WORK = Workload(2 * GB, 8 * GB, {"mxfp4": 8 * GB, "digest": 8 * GB}, {})


def seconds(work: Workload = WORK, figures: Figures = FIGURES, place: Place = PLACE) -> float:
    found = estimate(work, figures, place)
    assert found is not None
    return found.seconds


def test_every_bound_by_hand() -> None:
    found = estimate(WORK, FIGURES, PLACE)
    assert found is not None
    assert {bound.name: bound.seconds for bound in found.bounds} == pytest.approx(
        {
            START: 1.0,
            READ: 2 / 4,
            WRITE: 8 / 2,
            DECODE: 8 / 8 + 8 / 40,
            MEMORY: (2 + 2 * 8 + 8) / (2 * 20),
        }
    )
    assert found.seconds == pytest.approx(1.0 + 4.0)
    assert (found.limit.name, found.limit.gb_per_second) == (WRITE, pytest.approx(2.0))
    assert found.lacking == ()


SLOW_MEMORY = {**FIGURES.rates, "memory 16": Rates("16 bits to 16", 0.5, 1.0)}
TURNED = {"mxfp4": 8 * GB, "transpose": 40 * GB}


@pytest.mark.parametrize(
    ("work", "figures", "place", "limit", "expected"),
    [
        (WORK._replace(read_nbytes=40 * GB), FIGURES, PLACE, READ, 1 + 10),
        (WORK, FIGURES, PLACE, WRITE, 1 + 4),
        (WORK._replace(work=TURNED), FIGURES, PLACE, DECODE, 1 + 8 / 8 + 40 / 8),
        (WORK, replace(FIGURES, rates=SLOW_MEMORY), PLACE, MEMORY, 1 + 26 / 2),
        (WORK, replace(FIGURES, start_seconds=9.0), PLACE, START, 9 + 4),
    ],
)
def test_what_takes_longest_is_the_limit(
    work: Workload, figures: Figures, place: Place, limit: str, expected: float
) -> None:
    found = estimate(work, figures, place)
    assert found is not None
    assert (found.limit.name, found.seconds) == (limit, pytest.approx(expected))


def test_copies_and_transposes_count_as_decoding() -> None:
    work = WORK._replace(work={"mxfp4": 80 * GB, "copy": 30 * GB, "transpose": 24 * GB})
    assert seconds(work) == pytest.approx(1 + 80 / 8 + 30 / 10 + 24 / 8)


@pytest.mark.parametrize(
    ("jobs", "expected"),
    [
        (1, 1 + 2 / 1 + 8 / 1 + 8 / 2 + 8 / 10),  # one after another, on one thread
        (2, 1 + max(2 / 2, 8 / 2, 8 / 4 + 8 / 20)),
        (4, 1 + max(2 / 4, 8 / 2, 8 / 8 + 8 / 40)),
        (80, 1 + max(2 / 4, 8 / 2, 8 / 8 + 8 / 40)),
    ],
)
def test_tasks_in_flight(jobs: int, expected: float) -> None:
    assert seconds(place=PLACE._replace(jobs=jobs)) == pytest.approx(expected)


def test_more_threads_than_one_never_make_it_slower() -> None:
    noisy = OUTPUT._replace(write=Rates("write", 2.0, 1.9))
    assert seconds(place=PLACE._replace(output=noisy, jobs=2)) == pytest.approx(1 + 8 / 2.0)


@pytest.mark.parametrize(
    "place",
    [PLACE._replace(source=Disk()), PLACE._replace(output=Disk()), Place(OUTPUT, SOURCE, 8)],
)
def test_no_estimate_for_a_disk_that_was_not_measured(place: Place) -> None:
    assert estimate(WORK, FIGURES, place) is None


def test_what_was_not_measured_is_named() -> None:
    work = WORK._replace(work={**WORK.work, "ggml IQ2_XS": GB}, slow={"nf4": GB})
    found = estimate(work, FIGURES, PLACE)
    assert found is not None
    assert found.lacking == ("ggml IQ2_XS", "nf4")
    assert found.seconds == pytest.approx(5.0)
