"""What bounds a conversion: each bound in turn, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moeconv.estimate import (
    DECODE,
    DEVICE,
    DOWN,
    MEMORY,
    READ,
    START,
    UP,
    WRITE,
    Bound,
    Place,
    estimate,
    together,
)
from moeconv.measure.figures import Device, Disk, Figures, Rates
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


GPU = Device(3.0, 20.0, 25.0, 3000.0, {"mxfp4": Rates("MXFP4", 500.0, 500.0)})
ON_GPU = WORK._replace(
    work={"digest": 8 * GB}, device={"mxfp4": 8 * GB}, up_nbytes=2 * GB, down_nbytes=8 * GB
)


@pytest.mark.parametrize("cards", [1, 4])
def test_gpus_share_what_they_decode(cards: int) -> None:
    found = estimate(ON_GPU, FIGURES, PLACE._replace(device=GPU, cards=cards, jobs=MANY))
    assert found is not None
    seconds = {bound.name: bound.seconds for bound in found.bounds}
    assert seconds[UP] == pytest.approx(2 / 20 / cards)
    assert seconds[DEVICE] == pytest.approx(8 / 500 / cards)
    assert seconds[DOWN] == pytest.approx(8 / 25 / cards)
    assert seconds[DECODE] == pytest.approx(8 / 40)
    assert (found.limit.name, found.seconds) == (WRITE, pytest.approx(3 + 4, rel=1e-3))


@pytest.mark.parametrize(
    ("device", "limit"),
    [
        (GPU._replace(up=0.1), UP),
        (GPU._replace(down=0.5), DOWN),
        (GPU._replace(rates={"mxfp4": Rates("MXFP4", 0.5, 0.5)}), DEVICE),
    ],
)
def test_a_gpu_can_be_the_limit(device: Device, limit: str) -> None:
    found = estimate(ON_GPU, FIGURES, PLACE._replace(device=device, cards=1))
    assert found is not None and found.limit.name == limit


def test_a_gpu_that_was_not_measured() -> None:
    assert estimate(ON_GPU, FIGURES, PLACE._replace(cards=1)) is None
    other = GPU._replace(rates={})
    found = estimate(ON_GPU, FIGURES, PLACE._replace(device=other, cards=1))
    assert found is not None and found.lacking == ("mxfp4",)


def test_one_disk_reads_and_writes_in_turn() -> None:
    shared = PLACE._replace(shared=True, jobs=MANY)
    assert seconds(place=shared) == pytest.approx(1 + 2 / 4 + 8 / 2, rel=1e-3)
    found = estimate(WORK, FIGURES, shared)
    assert found is not None and [one.name for one in found.bounds][1:3] == [READ, WRITE]


def test_no_disk_reads_what_the_page_cache_holds() -> None:
    found = estimate(WORK, FIGURES, PLACE._replace(cached=0.75))
    assert found is not None
    by_name = {bound.name: bound.seconds for bound in found.bounds}
    assert by_name[READ] == pytest.approx(0.5 / 4)
    assert by_name[DECODE] == pytest.approx(8 / 8 + 8 / 40 + 1.5 / 10)  # and a copy
