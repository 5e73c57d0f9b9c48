"""Plan -> tasks: which source matrices are read together, and every output byte that they fill.

A task reads one slot of one weight (a large one in runs of rows; several weights where their
elements lie woven in one output) and writes all regions that it feeds, on every rank. A region is a
run of whole output rows: contiguous bytes, written and digested by one task.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import gcd, lcm
from typing import NamedTuple

from moeconv.arrange import PAGE, OutFile, OutTensor
from moeconv.codecs import weight_block
from moeconv.codecs.amx import packed_rows
from moeconv.collector import paused
from moeconv.layouts.base import Fill
from moeconv.rects import Rect, join_rects
from moeconv.types import DTYPE_BITS, Key, Span, Weight

TASK_NBYTES = 64 << 20  # larger weights are read in runs of rows


class Member(NamedTuple):
    """Rows of one slot of a weight, with all of its columns."""

    weight: int
    slot: int
    rows: Span


class Region(NamedTuple):
    """Rows [start, stop) of a slot's output matrix (columns, where it is stored transposed).

    `offset`, `nbytes`: of the file. Without rects every element is the tensor's constant.
    """

    file: int
    tensor: int
    start: int
    stop: int
    offset: int
    nbytes: int
    rects: tuple[Rect, ...]


class Task(NamedTuple):
    """One unit of work, memory, resume and distribution."""

    number: int
    members: tuple[Member, ...]
    regions: tuple[Region, ...]


class _Target(NamedTuple):
    file: int
    tensor: int
    slot: int
    rect: Rect


def build_tasks(weights: Sequence[Weight], files: Sequence[OutFile]) -> tuple[Task, ...]:
    """Return all tasks in the order of the bytes that they write; the same for the same plan."""
    with paused():
        targets = _targets(files)
        bundles = _bundles(weights, files, targets)
        tasks = [
            task for bundle in bundles for task in _bundle_tasks(bundle, weights, files, targets)
        ]
        tasks += _constants(files)
        tasks.sort(key=lambda task: (task.regions[0].file, task.regions[0].offset))
        return tuple(Task(number, task.members, task.regions) for number, task in enumerate(tasks))


_Targets = Mapping[Key, list[tuple[int, int, int, Fill]]]  # key -> (file, tensor, slot, fill)


def _targets(files: Sequence[OutFile]) -> _Targets:
    found: dict[Key, list[tuple[int, int, int, Fill]]] = defaultdict(list)
    for file_index, file in enumerate(files):
        for tensor_index, tensor in enumerate(file.tensors):
            for fill in tensor.draft.fills:
                for slot, expert in enumerate(fill.experts or (None,)):
                    if fill.experts is None or expert is not None:
                        key = Key(fill.stack, fill.layer, expert, fill.name)
                        found[key].append((file_index, tensor_index, slot, fill))
    return found


def _slot_targets(
    weight: Weight, slot: int, targets: _Targets, member: int = 0
) -> Iterator[_Target]:
    """Yield where the rows of a slot go, in the weight's own rows."""
    for key, rows in weight.keys(slot):
        for file, tensor, out_slot, fill in targets.get(key, ()):
            first = rows.start + fill.rows.start * rows.step
            taken = Span(first, first + fill.rows.length * rows.step, rows.step)
            rect = Rect(
                member,
                taken,
                fill.cols,
                fill.at_row,
                fill.row_step,
                fill.at_col,
                fill.own_rows,
                fill.own_cols,
            )
            yield _Target(file, tensor, out_slot, rect)


_Pair = tuple[int, int]  # (weight, slot)


def _bundles(
    weights: Sequence[Weight], files: Sequence[OutFile], targets: _Targets
) -> list[list[_Pair]]:
    """Return the (weight, slot) pairs that must be read together: those woven in one output."""
    woven = {
        (file_index, tensor_index)
        for file_index, file in enumerate(files)
        for tensor_index, tensor in enumerate(file.tensors)
        if any(_is_woven(tensor, fill) for fill in tensor.draft.fills)
    }
    parent: dict[_Pair, _Pair] = {}
    owner: dict[tuple[int, int, int], _Pair] = {}
    for index, weight in enumerate(weights):
        for slot in range(weight.slots or 1):
            found = [row for key, _ in weight.keys(slot) for row in targets.get(key, ())]
            if not found:
                continue
            pair = parent[index, slot] = (index, slot)
            for file, tensor, out_slot, _ in found:
                if (file, tensor) in woven:
                    first = owner.setdefault((file, tensor, out_slot), pair)
                    parent[_root(parent, pair)] = _root(parent, first)
    bundles: dict[_Pair, list[_Pair]] = {}
    for pair in parent:
        bundles.setdefault(_root(parent, pair), []).append(pair)
    return list(bundles.values())


def _root(
    parent: Mapping[tuple[int, int], tuple[int, int]], pair: tuple[int, int]
) -> tuple[int, int]:
    while parent[pair] != pair:
        pair = parent[pair]
    return pair


def _is_woven(tensor: OutTensor, fill: Fill) -> bool:
    """Return whether a fill shares its output rows with others."""
    draft = tensor.draft
    if draft.transposed:
        return fill.own_rows != draft.rows
    return fill.own_cols != draft.cols or fill.row_step != 1


def _bundle_tasks(
    bundle: Sequence[tuple[int, int]],
    weights: Sequence[Weight],
    files: Sequence[OutFile],
    targets: _Targets,
) -> Iterator[Task]:
    found: dict[tuple[int, int, int], list[Rect]] = defaultdict(list)
    for member, (index, slot) in enumerate(bundle):
        for file, tensor, out_slot, rect in _slot_targets(weights[index], slot, targets, member):
            found[file, tensor, out_slot].append(rect)
    joined = {
        place: join_rects(rects) if len(rects) > 1 else tuple(rects)
        for place, rects in found.items()
    }
    index, slot = bundle[0]
    for rows in _chunks(bundle, weights, files, joined):
        members = tuple(Member(i, s, rows or Span(0, weights[i].rows)) for i, s in bundle)
        regions = [
            region
            for (file, tensor, out_slot), rects in joined.items()
            for region in _regions(
                files[file].tensors[tensor],
                (file, tensor, out_slot),
                _cut(rects, rows) if rows is not None else rects,
            )
        ]
        if regions:
            regions.sort(key=lambda region: (region.file, region.offset))
            yield Task(0, members, tuple(regions))


def _chunks(
    bundle: Sequence[tuple[int, int]],
    weights: Sequence[Weight],
    files: Sequence[OutFile],
    joined: Mapping[tuple[int, int, int], Sequence[Rect]],
) -> Iterable[Span | None]:
    """Return the runs of rows in which one large weight is read; (None,): whole."""
    weight = weights[bundle[0][0]]
    drafts = [files[file].tensors[tensor].draft for file, tensor, _ in joined]
    bits = max(DTYPE_BITS[draft.decoded] for draft in drafts)
    row_nbytes = weight.cols * bits // 8
    plain = all(rect.row_step == 1 and rect.rows.step == 1 for r in joined.values() for rect in r)
    turned = any(draft.transposed for draft in drafts)
    if len(bundle) > 1 or not plain or turned or weight.rows * row_nbytes <= TASK_NBYTES:
        return (None,)
    block_rows, _ = weight_block(weight)
    page_rows = PAGE // gcd(PAGE, max(row_nbytes, 1))
    block_rows = lcm(block_rows, *(packed_rows(draft.encode) for draft in drafts))
    unit = lcm(block_rows, page_rows) if block_rows < weight.rows else weight.rows
    step = max(TASK_NBYTES // max(row_nbytes, 1) // unit, 1) * unit
    return [Span(at, min(at + step, weight.rows)) for at in range(0, weight.rows, step)]


def _cut(rects: Iterable[Rect], rows: Span) -> tuple[Rect, ...]:
    """Return the parts of plain rectangles that lie in `rows`; padding goes with the last row."""
    cut = []
    for rect in rects:
        start, stop = max(rect.rows.start, rows.start), min(rect.rows.stop, rows.stop)
        empty = rect.rows.length == 0
        if stop <= start and not (empty and rows.start == 0):
            continue
        if empty:
            cut.append(rect)
            continue
        padding = rect.own_rows - rect.rows.length if stop == rect.rows.stop else 0
        cut.append(
            rect._replace(
                rows=Span(start, stop),
                at_row=rect.at_row + start - rect.rows.start,
                own_rows=stop - start + padding,
            )
        )
    return tuple(cut)


def _regions(
    tensor: OutTensor, place: tuple[int, int, int], rects: Sequence[Rect]
) -> Iterator[Region]:
    """Yield the runs of whole output rows that rectangles of one slot fill."""
    draft = tensor.draft
    file, tensor_index, slot = place
    major, minor = (draft.cols, draft.rows) if draft.transposed else (draft.rows, draft.cols)
    line_nbytes = minor * DTYPE_BITS[draft.dtype] // 8
    if draft.encode:
        line_nbytes = tensor.nbytes // draft.rows
    base = tensor.offset + slot * major * line_nbytes
    for start, stop, group in _clusters(rects, transposed=draft.transposed):
        yield Region(
            file,
            tensor_index,
            start,
            stop,
            base + start * line_nbytes,
            (stop - start) * line_nbytes,
            tuple(group),
        )


def _clusters(rects: Sequence[Rect], *, transposed: bool) -> list[tuple[int, int, list[Rect]]]:
    """Return (start, stop, rects) of runs along the output's first axis that do not overlap."""
    if len(rects) == 1:
        start, stop = _extent(rects[0], transposed)
        return [(start, stop, list(rects))] if stop > start else []
    clusters: list[tuple[int, int, list[Rect]]] = []
    for start, stop, rect in sorted((*_extent(rect, transposed), rect) for rect in rects):
        if stop <= start:
            continue
        if clusters and start < clusters[-1][1]:
            low, high, group = clusters[-1]
            clusters[-1] = (low, max(high, stop), [*group, rect])
        else:
            clusters.append((start, stop, [rect]))
    return clusters


def _extent(rect: Rect, transposed: bool) -> tuple[int, int]:
    if transposed:
        return rect.at_col, rect.at_col + rect.own_cols
    if rect.own_rows == 0:
        return rect.at_row, rect.at_row
    return rect.at_row, rect.at_row + (rect.own_rows - 1) * rect.row_step + 1


def _constants(files: Sequence[OutFile]) -> Iterator[Task]:
    """Yield one task per file for the tensors that have no source."""
    for file_index, file in enumerate(files):
        regions = tuple(
            Region(file_index, index, 0, 1, tensor.offset, tensor.nbytes, ())
            for index, tensor in enumerate(file.tensors)
            if tensor.draft.constant is not None
        )
        if regions:
            yield Task(0, (), regions)
