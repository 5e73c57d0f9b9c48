"""Plain writes through the page cache, their dirty pages kept bounded."""

from __future__ import annotations

import contextlib
import threading
from collections import deque

from moeconv.store import system
from moeconv.store.buffers import Bytes

PIECE_NBYTES = 8 << 20
FOLLOW_MIN_NBYTES = 64 << 10  # smaller pieces are left to the kernel and to fdatasync
DIRTY_NBYTES = 64 << 20  # of one file, written and not yet known to be on the disk


class CachedWriter:
    """Writes through a descriptor it does not own; the oldest pieces are awaited and dropped."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()
        self._pieces: deque[tuple[int, int]] = deque()
        self._dirty_nbytes = 0
        self._works = True

    def write(self, offset: int, view: Bytes) -> None:
        """Write all of `view` [nbytes] uint8 at `offset`."""
        for start in range(0, view.size, PIECE_NBYTES):
            piece = view[start : start + PIECE_NBYTES]
            system.write_all(self._fd, piece.data, offset + start)
            if piece.size >= FOLLOW_MIN_NBYTES:
                self._follow(offset + start, piece.size)

    def _follow(self, offset: int, nbytes: int) -> None:
        """Start writing a piece back, and wait for older ones above the bound."""
        if not self._works:
            return
        try:
            system.start_writeback(self._fd, offset, nbytes)
            for old_offset, old_nbytes in self._overdue(offset, nbytes):
                system.await_writeback(self._fd, old_offset, old_nbytes)
                with contextlib.suppress(OSError):  # advice only
                    system.drop_pages(self._fd, old_offset, old_nbytes)
        except OSError as error:
            if error.errno not in system.UNSUPPORTED:
                raise
            self._works = False

    def _overdue(self, offset: int, nbytes: int) -> list[tuple[int, int]]:
        overdue = []
        with self._lock:
            self._pieces.append((offset, nbytes))
            self._dirty_nbytes += nbytes
            while self._dirty_nbytes > DIRTY_NBYTES:
                overdue.append(self._pieces.popleft())
                self._dirty_nbytes -= overdue[-1][1]
        return overdue
