"""Plan -> how many bytes a conversion reads, decodes, copies and writes: what an estimate needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from moeconv.decoding import has_kernel, is_copy
from moeconv.device.ways import CPU, KERNEL, way_of
from moeconv.layouts.base import Draft
from moeconv.measure.figures import COPY, DIGEST, TRANSPOSE, rate_key
from moeconv.plan import Plan
from moeconv.tasks import Region, Task
from moeconv.types import DTYPE_BITS, Weight

VALUE_BITS = 16  # turning takes its time per value: it is counted as if each had so many


class Workload(NamedTuple):
    """Bytes that a conversion reads and writes, and those of each kind of work by key of rates.

    `slow`: output bytes of codecs without a kernel, which take their reference.
    `device`: what of the work a GPU does, by key; `up_nbytes`, `down_nbytes`: what goes there and
    comes back for it.
    """

    read_nbytes: int
    written_nbytes: int
    work: Mapping[str, int]
    slow: Mapping[str, int]
    device: Mapping[str, int] = {}
    up_nbytes: int = 0
    down_nbytes: int = 0


class _Tally:
    """A workload while tasks are added to it."""

    def __init__(self, plan: Plan, gpu: bool) -> None:
        self._plan = plan
        self._gpu = gpu
        self.read = self.up = 0.0
        self.written = self.down = 0
        self.work: Counter[str] = Counter()
        self.slow: Counter[str] = Counter()
        self.device: Counter[str] = Counter()

    def add(self, task: Task, regions: Sequence[Region]) -> None:
        """Add what a task does for these of its regions."""
        drafts = [self._plan.files[one.file].tensors[one.tensor].draft for one in regions]
        weights = [self._plan.weights[one.weight] for one in task.members]
        turned = any(draft.transposed for draft in drafts)
        for member, weight in zip(task.members, weights, strict=True):
            stored = _slot_nbytes(weight) * member.rows.length / max(weight.rows, 1)
            self.read += stored
            for dtype in {draft.decoded for draft in drafts}:
                if not is_copy(weight, dtype):
                    elements = member.rows.length * weight.cols
                    self._decode(weight, elements * DTYPE_BITS[dtype] // 8, stored)
                    by_kernel = has_kernel(weight) and not self._on_device(weight)
                    if by_kernel and turned != weight.transposed:  # strips, which are turned
                        self.work[TRANSPOSE] += elements * VALUE_BITS // 8
        for region, draft in zip(regions, drafts, strict=True):
            self.written += region.nbytes
            if draft.constant is None:
                weight = weights[region.rects[0].member]
                laid = turned and (self._on_device(weight) or has_kernel(weight))
                self._assemble(region, draft, weight, laid)

    def _on_device(self, weight: Weight) -> bool:
        return self._gpu and way_of(weight) != CPU

    def _decode(self, weight: Weight, nbytes: int, stored: float) -> None:
        key = rate_key(weight.codec, weight.params)
        if self._on_device(weight):
            self.up, self.down = self.up + stored, self.down + nbytes
            (self.device if way_of(weight) == KERNEL else self.slow)[key] += nbytes
        elif not has_kernel(weight):
            self.slow[key] += nbytes
        else:
            self.work[key] += nbytes

    def _assemble(self, region: Region, draft: Draft, weight: Weight, laid: bool) -> None:
        kind = _assembly(region, draft, weight, laid)
        bits = VALUE_BITS if kind == TRANSPOSE else DTYPE_BITS[draft.decoded]
        nbytes = _area(region) * bits // 8
        if draft.encode and self._gpu:
            self.up, self.down = self.up + nbytes, self.down + region.nbytes
            self.device[kind] += nbytes
        elif kind:
            self.work[kind] += nbytes


def workload_of(
    plan: Plan, tasks: Sequence[Task], files: frozenset[int], *, gpu: bool = False
) -> Workload:
    """Return what the tasks of a plan do for these of its files, decoding on a GPU or the CPU."""
    tally = _Tally(plan, gpu)
    for task in tasks:
        if regions := [region for region in task.regions if region.file in files]:
            tally.add(task, regions)
    work = {**tally.work, DIGEST: tally.written}
    up = round(tally.up)
    return Workload(
        round(tally.read), tally.written, work, tally.slow, tally.device, up, tally.down
    )


def _slot_nbytes(weight: Weight) -> float:
    """Return the stored bytes of one of a weight's matrices."""
    return sum(ref.nbytes for ref in weight.parts.values()) / (weight.slots or 1)


def _area(region: Region) -> int:
    """Return the elements that a region's rectangles fill."""
    return sum(rect.rows.length * rect.cols.length for rect in region.rects)


def _assembly(region: Region, draft: Draft, weight: Weight, laid: bool) -> str:
    """Return the key of what makes a region's bytes of decoded values; "" where they lie as is.

    `laid`: they were decoded along columns.
    """
    if draft.encode:
        return draft.encode
    copied = is_copy(weight, draft.dtype)
    if draft.transposed != (weight.transposed if copied else laid):
        return TRANSPOSE
    rect = region.rects[0]
    lines, wanted = (
        (rect.rows.length, weight.rows) if draft.transposed else (rect.cols.length, weight.cols)
    )
    alone = len(region.rects) == 1 and rect.rows.step == 1 and lines == wanted
    return "" if alone else COPY
