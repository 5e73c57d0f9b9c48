"""Memory of several devices, lent in whole pieces: who asks waits until one has room.

So a device never runs out of memory: what decodes there was let in because it fits.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

MOST_PASSING = 64  # pieces that are lent past one who waits: few enough to end, many to stay busy
ALIGNMENT_NBYTES = 512  # as torch aligns its own allocations: any vector load is aligned then


class Place(NamedTuple):
    """A lent piece: `nbytes` at `offset` of the arena of `card`."""

    card: int
    offset: int
    nbytes: int


def aligned_nbytes(nbytes: int) -> int:
    """Return the bytes that a piece takes of an arena."""
    return max(-(-nbytes // ALIGNMENT_NBYTES), 1) * ALIGNMENT_NBYTES


class _Turn:
    """One who waits, and how many who came later were lent a piece before."""

    def __init__(self) -> None:
        self.passed = 0


class Arenas:
    """Arenas of these sizes in bytes, one per card; any number of threads may ask.

    Small pieces pass a large one that waits, MOST_PASSING times: then nothing is lent before it.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = tuple(sizes)
        self._lent: list[list[Place]] = [[] for _ in sizes]  # by card, in the order of offsets
        self._waiting: list[_Turn] = []  # first come, first
        self._changed = threading.Condition()

    def fits(self, nbytes: int) -> bool:
        """Return whether an empty arena has room for a piece."""
        return aligned_nbytes(nbytes) <= max(self._sizes, default=0)

    @contextmanager
    def lent(self, nbytes: int) -> Iterator[Place]:
        """Lend a piece on the card with the most room for the block; wait until there is one.

        Who holds a piece must not ask for another. ValueError where no arena could ever hold it:
        waiting would never end.
        """
        wanted = aligned_nbytes(nbytes)
        if not self.fits(nbytes):
            raise ValueError(f"{nbytes} bytes are more than any arena of {self._sizes}")
        with self._changed:
            place = self._await(wanted)
            mine = self._lent[place.card]
            mine.append(place)
            mine.sort(key=lambda one: one.offset)
        try:
            yield place
        finally:
            with self._changed:
                self._lent[place.card].remove(place)
                self._changed.notify_all()

    def _await(self, nbytes: int) -> Place:
        """Return a free piece as soon as there is one and nobody has to go before."""
        turn = _Turn()
        self._waiting.append(turn)
        try:
            while self._is_held_up(turn) or (place := self._find(nbytes)) is None:
                self._changed.wait()
        finally:
            ahead = self._waiting.index(turn)
            self._waiting.pop(ahead)
            self._changed.notify_all()  # whoever was held up by this one
        for earlier in self._waiting[:ahead]:
            earlier.passed += 1
        return place

    def _is_held_up(self, turn: _Turn) -> bool:
        """Return whether the first who waits was passed often enough; nobody was more often."""
        first = self._waiting[0]
        return first is not turn and first.passed >= MOST_PASSING

    def _find(self, nbytes: int) -> Place | None:
        """Return the first hole that is large enough, on the card with most memory free."""
        free = [
            size - sum(place.nbytes for place in lent)
            for size, lent in zip(self._sizes, self._lent, strict=True)
        ]
        for card in sorted(range(len(free)), key=lambda index: -free[index]):
            offset = 0
            for place in self._lent[card]:
                if place.offset - offset >= nbytes:
                    break
                offset = place.offset + place.nbytes
            if self._sizes[card] - offset >= nbytes:
                return Place(card, offset, nbytes)
        return None
