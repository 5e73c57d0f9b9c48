"""Which of a plan's weights a GPU decodes, and how: told from tables, without torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from moeconv.arrange import OutFile
from moeconv.decoding import is_copy
from moeconv.kernels import gpu
from moeconv.kernels.cpu.ggml import BLOCK_TYPES
from moeconv.tasks import Task
from moeconv.types import Weight

KERNEL, REFERENCE, CPU = "kernel", "reference", "cpu"
# Not worth a GPU without a kernel: another project's numpy code, tables, and scales read finer.
ON_CPU = ("ggml", "raw", "repeated")


def way_of(weight: Weight) -> str:
    """Return how a weight is decoded where there is a GPU.

    KERNEL: by its Triton kernel; REFERENCE: by torch on the device; CPU: as without a GPU.
    """
    if weight.codec == "ggml" and weight.params["type"] not in BLOCK_TYPES:
        return CPU  # gguf-py's decoder, whose memory is the host's
    return way_of_codec(weight.codec, turned=weight.transposed)


def way_of_codec(codec: str, *, turned: bool = False) -> str:
    """Return how a codec is decoded where there is a GPU; `turned`: parts lie [cols, rows]."""
    if gpu.has_kernel(codec, turned=turned):
        return KERNEL
    return CPU if codec in ON_CPU else REFERENCE


class Decoded(NamedTuple):
    """What of a plan is decoded or packed: in which ways, and the output bytes that come of it."""

    ways: frozenset[str]
    nbytes: int


def decoded_by(
    tasks: Iterable[Task], weights: Sequence[Weight], files: Sequence[OutFile]
) -> Decoded:
    """Return what a GPU could do of these tasks: what is copied, or decoded on the CPU, is left."""
    found: set[str] = set()
    nbytes = 0
    for task in tasks:
        drafts = [files[one.file].tensors[one.tensor].draft for one in task.regions]
        dtypes = {draft.decoded for draft in drafts}
        members = (weights[member.weight] for member in task.members)
        ways = {
            way_of(weight)
            for weight in members
            if not all(is_copy(weight, dtype) for dtype in dtypes)
        }
        if any(draft.encode for draft in drafts):
            ways.add(KERNEL)
        if ways - {CPU}:
            nbytes += sum(region.nbytes for region in task.regions)
        found |= ways - {CPU}
    return Decoded(frozenset(found), nbytes)
