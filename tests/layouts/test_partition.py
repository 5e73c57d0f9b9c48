"""Ranges per rank, against the table that Gaudi's loader and vLLM give for real sizes."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeconv.errors import Refused
from moeconv.layouts.partition import (
    Part,
    Rank,
    all_ranks,
    even,
    heads,
    kv_heads,
    mapped_experts,
    padded,
    place_experts,
    vocab,
)


def rank(number: int, ranks: int, tp: int | None = None) -> Rank:
    return Rank(number, number % (tp or ranks), tp or ranks, ranks)


# E = 10 over 4 ranks, as vLLM's determine_expert_map gives them
PLACED = {
    "linear": [(0, 1, 2), (3, 4, 5), (6, 7), (8, 9)],
    "round-robin": [(0, 4, 8), (1, 5, 9), (2, 6), (3, 7)],
}


@pytest.mark.parametrize("placement", PLACED)
def test_ten_experts_on_four_ranks(placement: str) -> None:
    found = [place_experts(10, rank(number, 4), placement) for number in range(4)]
    assert found == PLACED[placement]


def test_redundant_experts_are_the_first_ones_once_more() -> None:
    found = [place_experts(6, rank(number, 4), "linear", 2) for number in range(4)]
    assert found == [(0, 1), (2, 3), (4, 5), (0, 1)]
    assert place_experts(2, rank(0, 1), "linear", 5) == (0, 1, 0, 1, 0, 1, 0)
    with pytest.raises(Refused, match="6 experts and 1 redundant"):
        place_experts(6, rank(0, 4), "linear", 1)


# gpt-oss: I = 2880
@pytest.mark.parametrize(("tp", "per"), [(1, 2880), (2, 1440), (4, 720), (8, 360)])
def test_gptoss_intermediate(tp: int, per: int) -> None:
    found = [even("I", 2880, index, tp) for index in range(tp)]
    assert found == [Part(index * per, (index + 1) * per, per) for index in range(tp)]


def test_uneven_parts_are_filled_up() -> None:
    found = [even("I", 10, index, 4, pad=True) for index in range(4)]
    assert found == [Part(0, 3, 3), Part(3, 6, 3), Part(6, 9, 3), Part(9, 10, 3)]
    assert even("I", 5, 3, 4, pad=True) == Part(5, 5, 2)  # nothing of its own
    with pytest.raises(Refused, match="10 is not divided by 4 ranks"):
        even("I", 10, 0, 4)


@given(st.integers(1, 500), st.integers(1, 16), st.one_of(st.none(), st.integers(1, 70)))
def test_parts_are_neighbours_of_one_extent(extent: int, count: int, multiple: int | None) -> None:
    parts = [padded(even("I", extent, i, count, pad=True), multiple) for i in range(count)]
    assert parts[0].start == 0
    assert parts[-1].stop == extent
    for one, other in pairwise(parts):
        assert one.stop == other.start
    (held,) = {part.extent for part in parts}
    assert held >= max(part.stop - part.start for part in parts)
    assert held % (multiple or 1) == 0
    assert held - (multiple or 1) < -(-extent // count)


# rank -> first row, of 2 and 8 kv heads of 64 rows each
KV = [(2, 1, [0]), (2, 2, [0, 64]), (2, 4, [0, 0, 64, 64]), (8, 2, [0, 256]), (1, 4, [0, 0, 0, 0])]


@pytest.mark.parametrize(("count", "tp", "starts"), KV)
def test_kv_heads(count: int, tp: int, starts: list[int]) -> None:
    found = [kv_heads("k", count * 64, count, rank(number, tp)) for number in range(tp)]
    assert [part.start for part in found] == starts
    width = max(count // tp, 1) * 64
    assert {part.stop - part.start for part in found} == {width}
    assert {part.extent for part in found} == {width}


@pytest.mark.parametrize(("count", "tp"), [(3, 2), (2, 3), (4, 6)])
def test_kv_heads_that_do_not_go(count: int, tp: int) -> None:
    with pytest.raises(Refused, match="neither divides the other"):
        kv_heads("k", count * 8, count, rank(0, tp))


def test_heads() -> None:
    assert heads("q", 64, 8, rank(3, 4)) == Part(48, 64, 16)
    with pytest.raises(Refused, match=r"--tp that work: 1, 2, 3, 6"):
        heads("q", 48, 6, rank(0, 4))


def test_vocabulary_is_padded_to_64() -> None:
    # 201088 = 3142 * 64, as gpt-oss'; 100 -> 128
    assert vocab("v", 201088, rank(1, 2)) == Part(100544, 201088, 100544)
    assert [vocab("v", 100, rank(n, 4)) for n in range(4)] == [
        Part(0, 32, 32),
        Part(32, 64, 32),
        Part(64, 96, 32),
        Part(96, 100, 32),
    ]
    assert vocab("v", 60, rank(3, 4)) == Part(48, 60, 16)
    assert vocab("v", 40, rank(3, 4)) == Part(40, 40, 16)
    with pytest.raises(Refused, match="not divided by --tp 3"):
        vocab("v", 100, rank(0, 3))


def test_ranks_of_data_parallel() -> None:
    assert [(one.number, one.tp_rank) for one in all_ranks(2, 3)] == [
        (0, 0),
        (1, 1),
        (2, 0),
        (3, 1),
        (4, 0),
        (5, 1),
    ]
    assert {(one.tp, one.ranks) for one in all_ranks(2, 3)} == {(2, 6)}


def test_expert_maps() -> None:
    assert mapped_experts([[2, 0], [1, 1]], rank(1, 2), 3) == (1, 1)
    for mapping in ([[0]], [[0], [5]], [[0], [-1]], [[0, 1], []]):
        with pytest.raises(Refused):
            mapped_experts(mapping, rank(0, 2), 3)
