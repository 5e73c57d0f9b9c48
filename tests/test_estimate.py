"""What bounds a conversion: each bound in turn, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moeconv.estimate import DECODE, MEMORY, READ, START, WRITE, Bound, Place, estimate, together
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


MANY = 10_000  # so many tasks in flight that the slowest alone decides


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
    assert (found.limit.name, found.limit.gb_per_second) == (WRITE, pytest.approx(2.0))
    assert found.lacking == ()


SLOW_MEMORY = {**FIGURES.rates, "memory 16": Rates("16 bits to 16", 0.5, 1.0)}
TURNED = {"mxfp4": 8 * GB, "transpose": 40 * GB}


@pytest.mark.parametrize(
    ("work", "figures", "limit", "expected"),
    [
        (WORK._replace(read_nbytes=40 * GB), FIGURES, READ, 1 + 10),
        (WORK, FIGURES, WRITE, 1 + 4),
        (WORK._replace(work=TURNED), FIGURES, DECODE, 1 + 8 / 8 + 40 / 8),
        (WORK, replace(FIGURES, rates=SLOW_MEMORY), MEMORY, 1 + 26 / 2),
        (WORK, replace(FIGURES, start_seconds=9.0), START, 9 + 4),
    ],
)
def test_what_takes_longest_is_the_limit(
    work: Workload, figures: Figures, limit: str, expected: float
) -> None:
    found = estimate(work, figures, PLACE._replace(jobs=MANY))
    assert found is not None
    assert (found.limit.name, found.seconds) == (limit, pytest.approx(expected, rel=1e-3))


def test_copies_and_transposes_count_as_decoding() -> None:
    work = WORK._replace(work={"mxfp4": 80 * GB, "copy": 30 * GB, "transpose": 24 * GB})
    expected = 1 + 80 / 8 + 30 / 10 + 24 / 8
    assert seconds(work, place=PLACE._replace(jobs=MANY)) == pytest.approx(expected, rel=1e-3)


def test_one_task_in_flight_does_one_thing_after_another() -> None:
    expected = 1 + 2 / 1 + 8 / 1 + 8 / 2 + 8 / 10
    assert seconds(place=PLACE._replace(jobs=1)) == pytest.approx(expected)


def test_few_tasks_in_flight_are_no_faster_than_their_threads() -> None:
    found = estimate(WORK, FIGURES, PLACE._replace(jobs=2))
    assert found is not None
    read, write, decode = found.bounds[1:4]
    assert read.seconds == pytest.approx(2 / 2)
    assert write.seconds == pytest.approx(8 / 2)
    assert decode.seconds == pytest.approx(8 / 4 + 8 / 20)


def test_more_tasks_in_flight_are_never_slower() -> None:
    found = [seconds(place=PLACE._replace(jobs=jobs)) for jobs in range(1, 20)]
    assert found == sorted(found, reverse=True)
    assert found[-1] > 1 + 4


@pytest.mark.parametrize(
    ("stations", "jobs", "expected"),
    [
        ([(1, 1), (1, 1)], 1, 2.0),
        ([(1, 1), (1, 1)], 2, 1.5),  # by hand: each finds the other in half of its visits
        ([(1, 1), (1, 1)], 3, 4 / 3),
        ([(1, 2), (1, 1)], 1, 3.0),
        ([(3, 3), (0, 0)], 5, 3.0),
    ],
)
def test_stations_together(stations: list[tuple[float, float]], jobs: int, expected: float) -> None:
    bounds = [Bound("", 0, seconds, one) for seconds, one in stations]
    assert together(bounds, jobs) == pytest.approx(expected)


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
    assert found.seconds == pytest.approx(seconds())
