"""Plan -> how many bytes a conversion reads, decodes, copies and writes: what an estimate needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from moeconv.decoding import is_copy
from moeconv.kernels.cpu import KERNELS
from moeconv.layouts.base import Draft
from moeconv.measure.figures import COPY, DIGEST, TRANSPOSE, rate_key
from moeconv.plan import Plan
from moeconv.tasks import Region, Task
from moeconv.types import DTYPE_BITS, Weight

VALUE_BITS = 16  # turning takes its time per value: it is counted as if each had so many


class Workload(NamedTuple):
    """Bytes that a conversion reads and writes, and those of each kind of work by key of rates.

    `slow`: output bytes of codecs without a kernel, which take their reference.
    """

    read_nbytes: int
    written_nbytes: int
    work: Mapping[str, int]
    slow: Mapping[str, int]


def workload_of(plan: Plan, tasks: Sequence[Task], files: frozenset[int]) -> Workload:
    """Return what the tasks of a plan do for these of its files, decoding on the CPU."""
    read, written = 0.0, 0
    work: Counter[str] = Counter()
    slow: Counter[str] = Counter()
    for task in tasks:
        regions = [region for region in task.regions if region.file in files]
        if not regions:
            continue
        drafts = [plan.files[one.file].tensors[one.tensor].draft for one in regions]
        for member in task.members:
            weight = plan.weights[member.weight]
            rows = member.rows.length
            read += _slot_nbytes(weight) * rows / max(weight.rows, 1)
            for dtype in {draft.decoded for draft in drafts}:
                if not is_copy(weight, dtype):
                    nbytes = rows * weight.cols * DTYPE_BITS[dtype] // 8
                    known = weight.codec in KERNELS
                    (work if known else slow)[rate_key(weight.codec, weight.params)] += nbytes
                    if known and weight.transposed:  # decoded as stored, then turned
                        work[TRANSPOSE] += rows * weight.cols * VALUE_BITS // 8
        for region, draft in zip(regions, drafts, strict=True):
            written += region.nbytes
            kind = _assembly(region, draft, [plan.weights[one.weight] for one in task.members])
            if kind:
                bits = VALUE_BITS if kind == TRANSPOSE else DTYPE_BITS[draft.decoded]
                work[kind] += _area(region) * bits // 8
    work[DIGEST] += written
    return Workload(round(read), written, dict(work), dict(slow))


def _slot_nbytes(weight: Weight) -> float:
    """Return the stored bytes of one of a weight's matrices."""
    return sum(ref.nbytes for ref in weight.parts.values()) / (weight.slots or 1)


def _area(region: Region) -> int:
    """Return the elements that a region's rectangles fill."""
    return sum(rect.rows.length * rect.cols.length for rect in region.rects)


def _assembly(region: Region, draft: Draft, weights: Sequence[Weight]) -> str:
    """Return the key of what makes a region's bytes of decoded values; "" where they lie as is."""
    if draft.encode:
        return draft.encode
    if draft.constant is not None:
        return ""
    rect = region.rects[0]
    weight = weights[rect.member]
    turned = draft.transposed != (weight.transposed and is_copy(weight, draft.dtype))
    if turned:
        return TRANSPOSE
    lines, wanted = (
        (rect.rows.length, weight.rows) if draft.transposed else (rect.cols.length, weight.cols)
    )
    alone = len(region.rects) == 1 and rect.rows.step == 1 and lines == wanted
    return "" if alone else COPY
