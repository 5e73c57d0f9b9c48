"""Page-aligned memory that is reused.

Touching a fresh page costs a fault and a clearing; a page used before costs neither.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections import OrderedDict
from collections.abc import Callable
from types import TracebackType

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

PAGE_NBYTES = 4096
SMALLEST_CLASS_NBYTES = 64 << 10
STEPS_PER_OCTAVE = 4  # sizes 2^k * (1, 1.25, 1.5, 1.75): at most a quarter unused, and untouched
HUGE_NBYTES = 4 << 20  # huge pages from here on: they fill several times faster


def aligned(nbytes: int, phase: int = 0) -> Bytes:
    """Return fresh zeroed bytes whose address is congruent to `phase` modulo 4096.

    [nbytes] uint8; the memory goes back to the system when the last view of it dies.
    """
    shift = phase % PAGE_NBYTES
    return pages(nbytes + shift)[shift : shift + nbytes]


def address(data: Bytes) -> int:
    """Return the address of the first byte."""
    return int(data.__array_interface__["data"][0])


def pages(nbytes: int) -> Bytes:
    """Return fresh zeroed whole pages of at least `nbytes`, huge ones where that is much."""
    length = max(-(-nbytes // PAGE_NBYTES) * PAGE_NBYTES, PAGE_NBYTES)
    # Private: Python's default is shared, which is shmem and has no huge pages.
    region = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if length >= HUGE_NBYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages
            region.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(region, dtype=np.uint8)


def size_class(nbytes: int) -> int:
    """Return the size of memory that serves a request of `nbytes`: the next step of its octave."""
    if nbytes <= SMALLEST_CLASS_NBYTES:
        return SMALLEST_CLASS_NBYTES
    step = (1 << ((nbytes - 1).bit_length() - 1)) // STEPS_PER_OCTAVE
    return -(-nbytes // step) * step


class Buffer:
    """Bytes lent by a pool: `array` [nbytes] uint8, whatever was in it before.

    Leaving the `with` block (or `give`) lends the memory to the next taker: keep no view of it.
    """

    __slots__ = ("_memory", "_pool", "array")

    def __init__(self, pool: BufferPool, memory: Bytes, array: Bytes) -> None:
        self._pool = pool
        self._memory: Bytes | None = memory
        self.array = array

    def give(self) -> None:
        """Hand the memory back; a second time does nothing."""
        memory, self._memory = self._memory, None
        if memory is not None:
            self.array = memory[:0]
            self._pool._keep(memory)

    def __enter__(self) -> Buffer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.give()


class BufferPool:
    """A thread-safe pool that keeps at most `max_bytes` of idle memory for the next takers.

    It does not bound what is lent: admission of tasks does. `make` returns fresh memory, page
    aligned.
    """

    def __init__(self, max_bytes: int, make: Callable[[int], Bytes] = pages) -> None:
        self._max_bytes = max_bytes
        self._make = make
        self._lock = threading.Lock()
        self._idle: OrderedDict[int, Bytes] = OrderedDict()  # by address, oldest first
        self._idle_nbytes = 0

    @property
    def idle_nbytes(self) -> int:
        """Return the bytes kept for the next takers."""
        return self._idle_nbytes

    def take(self, nbytes: int, phase: int = 0) -> Buffer:
        """Return a buffer whose address is congruent to `phase` modulo 4096; its bytes are junk."""
        shift = phase % PAGE_NBYTES
        memory = self._reuse(size_class(nbytes + shift))
        return Buffer(self, memory, memory[shift : shift + nbytes])

    def clear(self) -> None:
        """Give all idle memory back to the system."""
        with self._lock:
            self._idle.clear()
            self._idle_nbytes = 0

    def _reuse(self, nbytes: int) -> Bytes:
        with self._lock:
            # Newest first: its pages are the likeliest to be in the caches.
            found = next((k for k in reversed(self._idle) if self._idle[k].size == nbytes), None)
            if found is not None:
                self._idle_nbytes -= nbytes
                return self._idle.pop(found)
        return self._make(nbytes)

    def _keep(self, memory: Bytes) -> None:
        with self._lock:
            self._idle[address(memory)] = memory
            self._idle_nbytes += memory.size
            while self._idle_nbytes > self._max_bytes:
                _, dropped = self._idle.popitem(last=False)
                self._idle_nbytes -= dropped.size
