"""Arenas: pieces never overlap, who does not fit waits, and the wait ends."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeconv.device.arena import ALIGNMENT_NBYTES, MOST_PASSING, Arenas, Place, aligned_nbytes

KIB = 1024


def disjoint(places: list[Place]) -> bool:
    ordered = sorted(places)
    return all(
        one.card != other.card or one.offset + one.nbytes <= other.offset
        for one, other in pairwise(ordered)
    )


@given(st.lists(st.tuples(st.integers(0, 6 * KIB), st.booleans()), max_size=40))
def test_pieces_lie_apart_and_within_their_arena(steps: list[tuple[int, bool]]) -> None:
    sizes = (8 * KIB, 16 * KIB)
    arenas = Arenas(sizes)
    held: list[tuple[ExitStack, Place]] = []
    for nbytes, give in steps:
        if held and (give or arenas._find(aligned_nbytes(nbytes)) is None):
            held.pop(len(held) // 2)[0].close()
        if arenas._find(aligned_nbytes(nbytes)) is None:
            continue  # it would wait for ever in one thread
        stack = ExitStack()
        place = stack.enter_context(arenas.lent(nbytes))
        held.append((stack, place))
        assert place.offset % ALIGNMENT_NBYTES == 0
        assert nbytes <= place.nbytes
        assert place.offset + place.nbytes <= sizes[place.card]
        assert disjoint([one for _, one in held])
    for stack, _ in held:
        stack.close()
    with arenas.lent(16 * KIB) as whole:  # everything came back
        assert whole == Place(1, 0, 16 * KIB)


def test_several_cards_share_the_work() -> None:
    arenas = Arenas((4 * KIB, 4 * KIB))
    with arenas.lent(KIB) as one, arenas.lent(KIB) as other:
        assert {one.card, other.card} == {0, 1}


def test_who_does_not_fit_waits_until_there_is_room() -> None:
    arenas = Arenas((4 * KIB,))
    got = threading.Event()

    def wait() -> None:
        with arenas.lent(3 * KIB):
            got.set()

    with arenas.lent(2 * KIB):
        thread = threading.Thread(target=wait)
        thread.start()
        assert not got.wait(0.05)
    assert got.wait(10)
    thread.join()


def test_who_fits_does_not_wait_for_who_does_not() -> None:
    """One who came before, and still does not fit, is woken as well and waits on."""
    arenas = Arenas((4 * KIB,))
    got, may_end = threading.Event(), threading.Event()

    def wait(nbytes: int, then: threading.Event) -> None:
        with arenas.lent(nbytes):
            then.set()
            may_end.wait(10)

    with ExitStack() as kept, arenas.lent(2 * KIB):
        kept.enter_context(arenas.lent(2 * KIB))
        waiting = []
        for number, (nbytes, then) in enumerate([(4 * KIB, threading.Event()), (KIB, got)], 1):
            waiting.append(threading.Thread(target=wait, args=(nbytes, then)))
            waiting[-1].start()
            while len(arenas._changed._waiters) < number:
                threading.Event().wait(0.001)
        kept.close()
        assert got.wait(5)
        may_end.set()
    for thread in waiting:
        thread.join()


def test_a_large_piece_is_not_passed_for_ever() -> None:
    arenas = Arenas((4 * KIB,))
    order: list[int] = []

    def take(nbytes: int) -> None:
        with arenas.lent(nbytes):
            order.append(nbytes)

    def start(nbytes: int) -> threading.Thread:
        thread = threading.Thread(target=take, args=(nbytes,))
        before = len(arenas._changed._waiters)
        thread.start()
        for _ in range(5000):
            if order or len(arenas._changed._waiters) > before:
                break
            threading.Event().wait(0.001)
        return thread

    held = ExitStack()
    held.enter_context(arenas.lent(2 * KIB))
    threads = [start(4 * KIB)]
    for _ in range(MOST_PASSING):  # at no time is all of the arena free
        following = ExitStack()
        following.enter_context(arenas.lent(2 * KIB))
        held.close()
        held = following
    threads.append(start(KIB))
    assert order == []  # though there is room
    held.close()
    for thread in threads:
        thread.join()
    assert order == [4 * KIB, KIB]
    assert arenas._waiting == []


def test_what_can_never_fit_is_an_error() -> None:
    arenas = Arenas((4 * KIB,))
    assert arenas.fits(4 * KIB) and not arenas.fits(4 * KIB + 1)
    with pytest.raises(ValueError, match="more than any arena"), arenas.lent(5 * KIB):
        pass
