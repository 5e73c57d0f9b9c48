"""The parts of a task's members: read for each of its pieces, or once for all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moeconv.parts import part_reads, read_parts
from moeconv.store.buffers import Buffer, BufferPool
from moeconv.store.reader import Reader
from moeconv.strips import parts_of
from moeconv.work import Piece, Work

Array = npt.NDArray[Any]
Parts = dict[str, Array]


class TaskParts:
    """What the pieces of one task are decoded from; `give` after the last of them."""

    def __init__(self, work: Work, reader: Reader, pool: BufferPool) -> None:
        self._work = work
        self._reader = reader
        self._pool = pool
        self._held: dict[int, Parts] = {}
        self._buffers: list[Buffer] = []

    def of(self, piece: Piece, index: int, phase: int | None) -> tuple[Parts, list[Buffer]]:
        """Return a member's parts [major, minor] for a piece, and the buffers to give back with it.

        `phase`: see read_parts.
        """
        member, weight = self._work.task.members[index], self._work.weights[index]
        if not piece.held:
            reads = part_reads(weight, member.slot, piece.windows[index])
            return read_parts(self._reader, self._pool, reads, phase)
        whole = piece.held[index]
        if index not in self._held:
            reads = part_reads(weight, member.slot, whole)
            self._held[index], buffers = read_parts(self._reader, self._pool, reads)
            self._buffers += buffers
        cut = parts_of(weight, self._held[index], whole, piece.windows[index])
        given, copies = {}, []
        for part, array in cut.items():
            given[part] = array
            if not array.flags.c_contiguous:
                copies.append(self._pool.take(array.nbytes))
                given[part] = copies[-1].array.view(array.dtype).reshape(array.shape)
                np.copyto(given[part], array)
        return given, copies

    def give(self) -> None:
        """Give back what is held."""
        for buffer in self._buffers:
            buffer.give()
