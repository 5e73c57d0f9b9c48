"""A task in pieces that fit in memory: what each of them takes, and how small they have to be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import lcm

from moeconv.codecs import CODECS, weight_block
from moeconv.codecs.amx import packed_rows
from moeconv.codecs.base import Window
from moeconv.decoding import TOLD_THEIR_DTYPE, has_kernel, is_copy
from moeconv.kernels.cpu.scratch import RULES
from moeconv.parts import PartRead, part_reads
from moeconv.store import direct, reader, writer
from moeconv.store.buffers import PAGE_NBYTES, size_class
from moeconv.strips import tile_of
from moeconv.tasks import Region
from moeconv.types import DTYPE_BITS, Span, Weight
from moeconv.work import Piece, Work, cut_piece, whole_piece

CONSTANT_TIMES = 3  # a constant's bytes, and its elements in float32


def lent_nbytes(nbytes: int) -> int:
    """Return the most memory that a pool takes for a buffer, at any phase."""
    return size_class(nbytes + PAGE_NBYTES - 1)


def piece_nbytes(work: Work, piece: Piece) -> int:
    """Return the most bytes that a piece has in memory: parts, decoded values, regions, scratch."""
    total = beside = written = 0  # beside: what reading or writing takes at once
    for _, region in piece.regions:
        total += _region_nbytes(work, piece, region)
        written = max(written, region.nbytes)
    for member, weight, window in zip(work.task.members, work.weights, piece.windows, strict=True):
        reads = part_reads(weight, member.slot, window)
        total += sum(lent_nbytes(read.nbytes) for read in reads)
        if not piece.held:
            beside = max(beside, _reading_nbytes(reads))
        total += _decoding_nbytes(work, weight, window, reads)
    if piece.held:
        total += _kept_nbytes(work, piece.held)
        beside = max(beside, _reading_nbytes(_reads(work, piece.held)))
    if written >= writer.DIRECT_MIN_NBYTES:
        beside = max(beside, _bounce_nbytes(written, writer.BOUNCE_NBYTES))
    return total + beside


def cut_nbytes(work: Work, cut: Iterable[Piece]) -> int:
    """Return the most bytes that a task in these pieces has in memory at once."""
    return max(piece_nbytes(work, piece) for piece in cut)


def _kept_nbytes(work: Work, windows: Sequence[Window]) -> int:
    """Return what the parts of windows of a task's members take."""
    return sum(lent_nbytes(read.nbytes) for read in _reads(work, windows))


def _bounce_nbytes(nbytes: int, most: int) -> int:
    """Return what goes by way of a bounce: past the page cache, what lies not as its pages do."""
    return lent_nbytes(min(most, nbytes + 2 * PAGE_NBYTES))


def _reading_nbytes(reads: Sequence[PartRead]) -> int:
    """Return the most memory that the reader takes: bounces, and what it reads to throw away."""
    spans = [read.scratch_nbytes for read in reads if read.scratch_nbytes]
    ranges = [read.nbytes for read in reads if not read.scratch_nbytes]
    gaps = sum(ranges) // direct.LEAST_WANTED if len(ranges) > 1 else 0
    total = max(map(lent_nbytes, spans), default=0)
    most = max(sum(ranges) + gaps, *spans, 0)
    if most >= reader.DIRECT_MIN_NBYTES:
        return total + _bounce_nbytes(most, reader.BOUNCE_NBYTES)
    return total + (lent_nbytes(gaps) if gaps else 0)


def _region_nbytes(work: Work, piece: Piece, region: Region) -> int:
    """Return what a region takes beside what its members were read or decoded to."""
    draft = work.draft(region)
    if draft.constant is not None:
        return region.nbytes * CONSTANT_TIMES
    if draft.encode:
        (rect,) = region.rects
        turned = work.weights[rect.member].transposed
        values = rect.rows.length * rect.cols.length * DTYPE_BITS[draft.decoded] // 8
        return lent_nbytes(region.nbytes) + (lent_nbytes(values) if turned else 0)
    return 0 if lies_ready(work, piece, region) else lent_nbytes(region.nbytes)


def lies_ready(work: Work, piece: Piece, region: Region) -> bool:
    """Return whether a region is all of the lines that its one member was read or decoded to."""
    if len(region.rects) != 1:
        return False
    (rect,), draft = region.rects, work.draft(region)
    weight, window = work.weights[rect.member], piece.windows[rect.member]
    along_columns = work.transposed and has_kernel(weight)
    if is_copy(weight, draft.dtype):
        along_columns = weight.transposed
    line, whole = rect.cols.length, window.cols
    if along_columns:
        line, whole = rect.rows.length, window.rows
    filled = rect.rows.length * rect.cols.length * DTYPE_BITS[draft.dtype] // 8
    return (
        along_columns == draft.transposed
        and rect.rows.step == 1
        and line == whole
        and filled == region.nbytes
    )


def _decoding_nbytes(work: Work, weight: Weight, window: Window, reads: Sequence[PartRead]) -> int:
    """Return what a window's values take, and what is needed to make them."""
    dtypes = [dtype for dtype in work.dtypes if not is_copy(weight, dtype)]
    if not dtypes:
        return 0
    elements = window.rows * window.cols
    total = sum(lent_nbytes(elements * DTYPE_BITS[dtype] // 8) for dtype in dtypes)
    if not has_kernel(weight):
        held = CODECS[weight.codec].reference_nbytes * (window.rows + 1) * (window.cols + 1)
        return total + held + sum(read.nbytes for read in reads)  # copies of what lies turned
    if work.transposed != weight.transposed:
        tiles = (tile_of(weight, window, DTYPE_BITS[dtype] // 8) for dtype in dtypes)
        total += max(lent_nbytes(tile.nbytes) for tile in tiles)
    return total + max(_scratch_nbytes(weight, reads, window, dtype) for dtype in dtypes)


def _scratch_nbytes(weight: Weight, reads: Sequence[PartRead], window: Window, dtype: str) -> int:
    """Return the most memory that a kernel takes beside parts, output and tiles."""
    if weight.codec in TOLD_THEIR_DTYPE:
        return 0
    wide = {read.part: read.nbytes * 2 for read in reads if read.ref.dtype in ("BF16", "F16")}
    rule = RULES.get(weight.codec)
    if rule is None:
        return sum(wide.values())
    taken = {read.part: wide.get(read.part, read.nbytes) for read in reads}
    return sum(wide.values()) + rule(taken, window, weight.params, dtype)


def pieces(work: Work, max_nbytes: int, most_nbytes: int = 0) -> tuple[Piece, ...]:
    """Return the task in pieces of at most max_nbytes each, as far as its blocks allow.

    `most_nbytes`: with parts that are held beside them, for they may take more than a task's share.
    """
    whole = whole_piece(work)
    nbytes = piece_nbytes(work, whole)
    if nbytes <= max_nbytes or not work.weights:
        return (whole,)
    length, block = _split_axis(work)
    if length <= block:
        return (whole,)
    cut = _cut_to_fit(work, (length, block), max_nbytes, ())
    if not _is_read_again(work, whole, cut):
        return cut
    kept = _kept_nbytes(work, whole.windows)
    allowed = min(kept + max_nbytes, max(max_nbytes, most_nbytes))
    if nbytes <= allowed:
        return (whole,)
    if allowed - kept < max_nbytes // 4:  # many thin pieces would cost more than reading again
        return cut
    held = _cut_to_fit(work, (length, block), allowed, whole.windows)
    return held if cut_nbytes(work, held) <= allowed else cut


def _cut_to_fit(
    work: Work, axis: tuple[int, int], max_nbytes: int, held: tuple[Window, ...]
) -> tuple[Piece, ...]:
    """Return equal pieces of at most max_nbytes each, as far as the blocks allow.

    `axis`: its (length, block).
    """
    length, block = axis
    fixed = _kept_nbytes(work, held) if held else 0
    step = length
    while True:
        cut = _cut_every(work, length, step, held)
        largest = cut_nbytes(work, cut)
        if largest <= max_nbytes or step == block:
            return cut
        fits = step * max(max_nbytes - fixed, 0) // max(largest - fixed, 1)
        step = max(min(-(-step // block) - 1, fits // block) * block, block)


def _is_read_again(work: Work, whole: Piece, cut: Sequence[Piece]) -> bool:
    """Return whether pieces ask for more than a 32nd more of the source than the whole task."""
    asked, once = (
        sum(read.asked_nbytes for piece in given for read in _reads(work, piece.windows))
        for given in (cut, (whole,))
    )
    return asked > once + once // 32


def _reads(work: Work, windows: Sequence[Window]) -> list[PartRead]:
    """Return what is read for windows of a task's members."""
    members = zip(work.task.members, work.weights, windows, strict=True)
    return [
        read
        for member, weight, window in members
        for read in part_reads(weight, member.slot, window)
    ]


def _cut_every(work: Work, length: int, step: int, held: tuple[Window, ...]) -> tuple[Piece, ...]:
    spans = (Span(at, min(at + step, length)) for at in range(0, length, step))
    return tuple(cut_piece(work, span)._replace(held=held) for span in spans)


def floor_nbytes(work: Work) -> int:
    """Return the bytes of the smallest pieces that a task can be cut into: of the largest one."""
    whole = piece_nbytes(work, whole_piece(work))
    if not work.weights:
        return whole
    length, block = _split_axis(work)
    if length <= block:
        return whole
    starts = {0, (length - 1) // block * block}
    for region in work.task.regions:  # where a rectangle ends its padding comes along
        for rect in region.rects:
            last = rect.cols.stop if work.transposed else rect.rows.stop - work.first_row
            starts.add(min(max(last - 1, 0), length - 1) // block * block)
    cut = (cut_piece(work, Span(at, min(at + block, length))) for at in starts)
    return min(whole, cut_nbytes(work, cut))


def _split_axis(work: Work) -> tuple[int, int]:
    """Return (length, block) of the axis along which a task is cut; (1, 1) where it cannot be."""
    block_rows = block_cols = 1
    for weight in work.weights:
        rows, cols = weight_block(weight)
        block_rows, block_cols = lcm(block_rows, rows), lcm(block_cols, cols)
    if work.transposed:
        lengths = {weight.cols for weight in work.weights}
        return (lengths.pop(), block_cols) if len(lengths) == 1 else (1, 1)
    steps = [
        rect.rows.step * packed_rows(work.draft(region).encode)
        for region in work.task.regions
        for rect in region.rects
    ]
    extents = {member.rows for member in work.task.members}
    if len(extents) != 1:
        return 1, 1
    return extents.pop().length, lcm(block_rows, *steps)
