"""One task: read its parts, decode them, write every region that they feed, digest it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from moeconv.codecs.base import Window
from moeconv.decoding import (
    Decoder,
    count_copied,
    is_copy,
)
from moeconv.errors import NonFiniteValue
from moeconv.held import TaskParts
from moeconv.kernels.cpu import Counts, copy_into
from moeconv.kernels.cpu.base import is_row_contiguous
from moeconv.kernels.cpu.floats import round_to
from moeconv.rects import Rect
from moeconv.store.buffers import Buffer, BufferPool
from moeconv.store.reader import Reader
from moeconv.store.writer import OutputFile
from moeconv.tasks import Region
from moeconv.types import DTYPE_BITS, Weight
from moeconv.work import Piece, Work

Array = npt.NDArray[Any]

# The array element that holds one output element.
ELEMENTS: Mapping[int, npt.DTypeLike] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
FLOAT_VIEWS = {"F32": np.float32, "F64": np.float64}


class Done(NamedTuple):
    """A finished task: the xxh3-128 of each region written, and what is not finite in it.

    `counts`: NaN and Inf of the source's experts; finite values of any weight that became Inf.
    """

    digests: tuple[str, ...]  # of the task's regions in order, in hex
    counts: Counts


class Context(NamedTuple):
    """What all tasks of a run share."""

    reader: Reader
    pool: BufferPool
    outputs: Mapping[int, OutputFile]  # only of the files that this run writes
    nonfinite: str
    decoder: Decoder


def process(work: Work, cut: Sequence[Piece], context: Context) -> Done:
    """Do a task in these pieces: write all of its regions, whose files are in `context.outputs`.

    Raises NonFiniteValue, IOFailed, BadSource.
    """
    hashes = [xxhash.xxh3_128() for _ in work.task.regions]
    total = Counts(0, 0, 0)
    parts = TaskParts(work, context.reader, context.pool)
    try:
        for piece in cut:
            counts = _Piece(work, piece, context, parts).run(hashes)
            total = total.plus(counts)
    finally:
        parts.give()
    return Done(tuple(one.hexdigest() for one in hashes), total)


class _Piece:
    """One piece in memory: decoded windows by member and dtype, then its regions."""

    def __init__(self, work: Work, piece: Piece, context: Context, parts: TaskParts) -> None:
        self.work = work
        self.piece = piece
        self.context = context
        self.parts = parts
        self.buffers: list[Buffer] = []

    def run(self, hashes: Sequence[Any]) -> Counts:
        """Decode and write the piece; return what its experts hold."""
        try:
            decoded, counts = self.decode()
            for index, region in self.piece.regions:
                data = self.assemble(region, decoded)
                self.context.outputs[region.file].write(region.offset, data)
                hashes[index].update(data)
            return counts
        finally:
            for buffer in self.buffers:
                buffer.give()

    def take(self, nbytes: int, phase: int = 0) -> npt.NDArray[np.uint8]:
        """Return memory that is given back when the piece is done."""
        buffer = self.context.pool.take(nbytes, phase)
        self.buffers.append(buffer)
        return buffer.array

    def decode(self) -> tuple[dict[tuple[int, str], Array], Counts]:
        """Return (member, dtype) -> elements [rows, cols] as bits, and the counts.

        NaN and Inf of the experts; overflows of every weight.
        """
        decoded: dict[tuple[int, str], Array] = {}
        nan = inf = overflow = 0
        phase = self.piece.regions[0][1].offset if self.piece.regions else 0
        members = zip(self.work.weights, self.piece.windows, strict=True)
        for index, (weight, window) in enumerate(members):
            copied = any(is_copy(weight, dtype) for dtype in self.work.dtypes)
            parts, buffers = self.parts.of(self.piece, index, phase if copied else None)
            self.buffers += buffers
            for number, dtype in enumerate(self.work.dtypes):
                if is_copy(weight, dtype):
                    stored = parts["weight"]
                    array = stored.T if weight.transposed else stored
                    counts = count_copied(stored, dtype) if weight.is_expert else Counts(0, 0, 0)
                else:
                    array = self.room(weight, window, dtype, phase)
                    counts = self.context.decoder.decode(weight, parts, window, dtype, array)
                    self.check_overflow(weight, dtype, counts)
                    overflow += counts.overflow
                decoded[index, dtype] = array.view(ELEMENTS[array.itemsize])
                if weight.is_expert and number == 0:
                    nan, inf = nan + counts.nan, inf + counts.inf
        return decoded, Counts(nan, inf, overflow)

    def room(self, weight: Weight, window: Window, dtype: str, phase: int) -> Array:
        """Return memory [rows, cols] for a decoded window, as the output lies if that is free."""
        memory = self.take(window.rows * window.cols * DTYPE_BITS[dtype] // 8, phase)
        flat = memory.view(FLOAT_VIEWS.get(dtype, np.uint16))
        if self.work.transposed and self.context.decoder.any_order(weight):
            return flat.reshape(window.cols, window.rows).T
        return flat.reshape(window.rows, window.cols)

    def check_overflow(self, weight: Weight, dtype: str, counts: Counts) -> None:
        """Raise NonFiniteValue where finite values became Inf, unless --nonfinite keep."""
        if counts.overflow and self.context.nonfinite == "error":
            ref = next(iter(weight.parts.values()))
            raise NonFiniteValue(
                f"{counts.overflow} finite values of '{weight.name}' are too large for {dtype}",
                where=ref.file,
                hint="--dtype bf16 holds them; --nonfinite keep --overwrite writes them as Inf",
            )

    def assemble(
        self, region: Region, decoded: Mapping[tuple[int, str], Array]
    ) -> npt.NDArray[np.uint8]:
        """Return a region's bytes: a view of the decoded values where they lie as they should."""
        dtype = self.work.dtype(region)
        draft = self.work.draft(region)
        if draft.constant is not None:
            return _constant(dtype, draft.constant, region.nbytes)
        if draft.encode:
            return self.encode(region, decoded)
        transposed = draft.transposed
        if len(region.rects) == 1:
            view = self.source(region.rects[0], decoded, dtype)
            view = view.T if transposed else view
            if view.flags.c_contiguous and view.nbytes == region.nbytes:
                return view.reshape(-1).view(np.uint8)
        memory = self.take(region.nbytes, region.offset)
        filled = sum(rect.rows.length * rect.cols.length for rect in region.rects)
        lines = region.stop - region.start
        itemsize = DTYPE_BITS[dtype] // 8
        if filled * itemsize != region.nbytes:
            memory[:] = 0
        matrix = memory.view(ELEMENTS[itemsize]).reshape(lines, -1)
        if transposed:
            matrix = matrix.T
        for rect in region.rects:
            row = rect.at_row - (0 if transposed else region.start)
            col = rect.at_col - (region.start if transposed else 0)
            rows = slice(row, row + rect.rows.length * rect.row_step, rect.row_step)
            target = matrix[rows, col : col + rect.cols.length]
            if target.size:
                copy_into(target, self.source(rect, decoded, dtype))
        return memory

    def encode(
        self, region: Region, decoded: Mapping[tuple[int, str], Array]
    ) -> npt.NDArray[np.uint8]:
        """Return a region's bytes packed from its one rectangle; NonFiniteValue names where."""
        draft = self.work.draft(region)
        (rect,) = region.rects
        values = self.source(rect, decoded, draft.decoded)
        if not is_row_contiguous(values):  # a copy of what is stored transposed
            memory = self.take(values.nbytes)
            turned = memory.view(values.dtype).reshape(values.shape)
            copy_into(turned, values)
            values = turned
        out = self.take(region.nbytes, region.offset)
        bad = self.context.decoder.encode(draft.encode, draft.part, values, out)
        if bad >= 0:
            weight = self.work.weights[rect.member]
            fill = draft.fills[0]
            expert = fill.experts[0] if fill.experts else 0
            raise NonFiniteValue(
                f"'{weight.name}' holds NaN or Inf, which {draft.encode} cannot hold: expert "
                f"{expert}, row {fill.rows.start + region.start + bad} of {fill.name}",
                where=next(iter(weight.parts.values())).file,
                hint="the checkpoint is damaged; --dtype bf16 writes such values as they are",
            )
        return out

    def source(self, rect: Rect, decoded: Mapping[tuple[int, str], Array], dtype: str) -> Array:
        """Return the view of the decoded window that a rectangle takes."""
        window = self.piece.windows[rect.member]
        rows = slice(
            rect.rows.start - window.row_start, rect.rows.stop - window.row_start, rect.rows.step
        )
        cols = slice(rect.cols.start - window.col_start, rect.cols.stop - window.col_start)
        return decoded[rect.member, dtype][rows, cols]


def _constant(dtype: str, value: float, nbytes: int) -> npt.NDArray[np.uint8]:
    """Return the bytes of a tensor whose elements are all `value`."""
    width = 4 if dtype == "F32" else 2
    source = np.full((1, nbytes // width), value, np.float32)
    if dtype == "F32":
        return source.reshape(-1).view(np.uint8)
    out = np.empty(source.shape, np.uint16)
    round_to(dtype, source, out)
    return out.reshape(-1).view(np.uint8)
