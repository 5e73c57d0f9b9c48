"""How much memory it takes to derive once more what a plan writes, and whether that is free."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from moeconv.codecs import CODECS, weight_block
from moeconv.errors import Refused
from moeconv.layouts.base import Fill
from moeconv.plan import Plan
from moeconv.rederive import Unit, key_of, source_rows, window_of
from moeconv.store.space import choose_memory, human, memory_limit
from moeconv.types import Place, element_count

DEFAULT_MEMORY_NBYTES = 1 << 30
TORCH_NBYTES = 144 << 20  # what importing torch takes
OTHER_NBYTES = 16  # per element beside what a reference holds: stored, picked, rounded, compared
PACKING_NBYTES = 24  # the same of what is packed as well
MARGIN_NBYTES = 32 << 20  # stacks, small blocks, and what torch makes at its first call


class Share(NamedTuple):
    """What all threads together may hold, and how many threads that is enough for."""

    memory_nbytes: int
    threads: int

    @property
    def is_short(self) -> bool:
        """Return whether nothing that was freed should be kept, though that is a sixth slower."""
        return self.memory_nbytes < DEFAULT_MEMORY_NBYTES


def least_nbytes(plan: Plan, units: Iterable[Unit]) -> int:
    """Return the bytes that any of these units can be derived with by one thread."""
    least = 0
    seen: set[object] = set()
    for unit in units:
        draft = plan.files[unit.file].tensors[unit.tensor].draft
        if draft.constant is not None:
            least = max(least, element_count(draft.shape) * OTHER_NBYTES)
            continue
        for fill in draft.fills:
            place = plan.model.places[key_of(fill, unit.slot)]
            weight = place.weight
            kind = (weight.codec, weight.rows, weight.cols, place.rows, fill.rows, fill.cols)
            if (kind, fill.own_cols, draft.encode) not in seen:
                seen.add((kind, fill.own_cols, draft.encode))
                least = max(least, _block_nbytes(place, fill, whole=bool(draft.encode)))
    return least


def _block_nbytes(place: Place, fill: Fill, *, whole: bool) -> int:
    """Return what deriving a fill's first block holds at once; `whole`: all of it, packed."""
    weight = place.weight
    taken = source_rows(place, fill)
    rows = taken if whole else taken[: weight_block(weight)[0]]
    elements = max(rows.size, 1) * fill.own_cols
    if rows.size and fill.cols.length:
        window = window_of(weight, rows, fill)
        elements = max(elements, (window.rows + 1) * (window.cols + 1))
    beside = PACKING_NBYTES if whole else OTHER_NBYTES
    return elements * (CODECS[weight.codec].reference_nbytes + beside)


def check_room(least: int, dst: Path) -> None:
    """Raise Refused unless what one thread needs is free, torch counted where it is not loaded."""
    needed = least + MARGIN_NBYTES + (0 if "torch" in sys.modules else TORCH_NBYTES)
    free = memory_limit()
    if needed > free:
        raise Refused(
            f"deriving values from the source once more takes {human(needed)} of memory, and "
            f"{human(free)} are free here",
            where=str(dst),
            hint="allow more memory; the output is finished and stays, nothing of it was verified: "
            "moeconv verify without --source needs little",
        )


def choose_share(given: int | None, threads: int, least: int) -> Share:
    """Return what deriving may hold, with torch loaded: never more than is free.

    `given` bounds it too, but a single thread may always hold `least`.
    """
    chosen = given or choose_memory(None, DEFAULT_MEMORY_NBYTES)
    memory = min(chosen, max(memory_limit() - MARGIN_NBYTES, least))
    return Share(memory, max(min(threads, memory // max(least, 1)), 1))
