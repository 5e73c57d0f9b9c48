from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeconv.store.buffers import PAGE_NBYTES, BufferPool, address, aligned, size_class

KIB, MIB = 1 << 10, 1 << 20


@given(st.integers(0, 3 * MIB), st.integers(0, 3 * PAGE_NBYTES))
def test_aligned_has_the_length_and_the_phase(nbytes: int, phase: int) -> None:
    data = aligned(nbytes, phase)
    assert (data.dtype, data.shape) == (np.dtype(np.uint8), (nbytes,))
    assert nbytes == 0 or address(data) % PAGE_NBYTES == phase % PAGE_NBYTES
    assert not data.any()
    data[:] = 255
    assert data.sum(dtype=np.int64) == 255 * nbytes


SIZE_CLASSES = (
    (1, 64 * KIB),
    (64 * KIB, 64 * KIB),
    (64 * KIB + 1, 80 * KIB),
    (80 * KIB, 80 * KIB),
    (100 * KIB, 112 * KIB),
    (112 * KIB + 1, 128 * KIB),
    (MIB, MIB),
    (5 * MIB + 1, 6 * MIB),
)


@pytest.mark.parametrize(("nbytes", "expected"), SIZE_CLASSES)
def test_size_classes(nbytes: int, expected: int) -> None:
    assert size_class(nbytes) == expected


@given(st.integers(64 * KIB, 1 << 40))
def test_a_size_class_wastes_at_most_a_quarter_and_is_whole_pages(nbytes: int) -> None:
    found = size_class(nbytes)
    assert nbytes <= found <= nbytes * 1.25 + 1
    assert found % PAGE_NBYTES == 0
    assert size_class(found) == found


def test_given_memory_is_lent_again_and_lent_memory_is_not() -> None:
    pool = BufferPool(8 * MIB)
    with pool.take(MIB) as first, pool.take(MIB) as second:
        places = {address(first.array), address(second.array)}
        assert len(places) == 2
    with pool.take(MIB - 100) as again:
        assert address(again.array) in places
        assert again.array.size == MIB - 100


def test_a_phase_moves_the_address_within_the_same_memory() -> None:
    pool = BufferPool(8 * MIB)
    with pool.take(MIB, phase=5000) as buffer:
        assert address(buffer.array) % PAGE_NBYTES == 5000 - PAGE_NBYTES
        assert buffer.array.size == MIB


def test_giving_twice_keeps_once() -> None:
    pool = BufferPool(8 * MIB)
    buffer = pool.take(MIB)
    buffer.give()
    buffer.give()
    assert pool.idle_nbytes == MIB
    assert buffer.array.size == 0
    with pool.take(MIB) as first, pool.take(MIB) as second:
        assert address(first.array) != address(second.array)


def test_idle_memory_is_bounded_and_the_oldest_goes_first() -> None:
    pool = BufferPool(3 * MIB)
    buffers = [pool.take(MIB) for _ in range(5)]
    places = [address(buffer.array) for buffer in buffers]
    for buffer in buffers:
        buffer.give()
        assert pool.idle_nbytes <= 3 * MIB
    kept = {address(pool.take(MIB).array) for _ in range(3)}
    assert kept == set(places[2:])
    pool.take(4 * MIB).give()
    assert pool.idle_nbytes == 0
    pool.take(MIB).give()
    pool.clear()
    assert pool.idle_nbytes == 0


def test_threads_never_hold_the_same_memory() -> None:
    pool = BufferPool(2 * MIB)
    clashes = []

    def work(mark: int) -> None:
        for turn in range(300):
            with pool.take(64 * KIB + (turn % 3) * 16 * KIB, phase=turn) as buffer:
                buffer.array[:] = mark
                if not (buffer.array == mark).all():
                    clashes.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not clashes
    assert pool.idle_nbytes <= 2 * MIB
