"""A finished output -> which experts, bytes and pages lie on which rank or NUMA part."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from moeconv.finished import Finished, RecordedFile
from moeconv.types import Json, TensorRef

PAGE = 4096
_EXPERT = re.compile(r"\.(?:experts|ffn_[a-z]+_exps)\.(\d+)\.")


class _At(NamedTuple):
    """A rank, and its NUMA part; None where kt-kernel cuts, or nothing does."""

    rank: int
    numa: int | None


class _Held:
    """What lies at one place; pages are (file, page) where another place's bytes lie too."""

    def __init__(self) -> None:
        self.tensors = 0
        self.nbytes = 0
        self.pages = 0
        self.shared: set[tuple[int, int]] = set()
        self.experts: set[int] = set()


def output_map(finished: Finished, names: Iterable[str]) -> list[Json]:
    """Return rank, numa, experts, tensors, nbytes, pages and shared_pages of each place.

    Read from the headers of the files called `names`. `pages`: 4 KiB pages of the files that hold
    a byte of the place; `shared_pages`: those of them that hold another place's bytes too.
    """
    from moeconv.load import numa_part
    from moeconv.store.safetensors import read_header

    wanted = set(names)
    places: dict[_At, _Held] = {}
    for index, file in enumerate(finished.files):
        if file.name not in wanted:
            continue
        tensors = read_header(finished.root / file.name, file.name).tensors
        _add(places, index, [(_At(file.rank, numa_part(file, one.name)), one) for one in tensors])
        _add_ranks(places, file)
    per_rank = finished.facts["layout_facts"].get("experts")
    return [_row(at, held, per_rank) for at, held in sorted(places.items(), key=_order)]


def _add_ranks(places: dict[_At, _Held], file: RecordedFile) -> None:
    """Give a rank whose files hold nothing a row."""
    if not any(at.rank == file.rank for at in places):
        places[_At(file.rank, None)] = _Held()


def _order(item: tuple[_At, _Held]) -> tuple[int, int]:
    return item[0].rank, -1 if item[0].numa is None else item[0].numa


def _add(places: dict[_At, _Held], file: int, tensors: Sequence[tuple[_At, TensorRef]]) -> None:
    """Count one file's tensors, which are in the order of their bytes."""
    page, owners = -1, set[_At]()  # of the last page so far
    for at, ref in tensors:
        held = places.setdefault(at, _Held())
        held.tensors += 1
        held.nbytes += ref.nbytes
        found = _EXPERT.search(ref.name)
        if found is not None:
            held.experts.add(int(found[1]))
        if not ref.nbytes:
            continue
        first, last = ref.offset // PAGE, (ref.offset + ref.nbytes - 1) // PAGE
        if first != page:
            owners = set()
        held.pages += last - first + (at not in owners)
        owners.add(at)
        if len(owners) > 1:
            for owner in owners:
                places[owner].shared.add((file, first))
        if last != first:
            owners = {at}
        page = last


def _row(at: _At, held: _Held, per_rank: Json) -> Mapping[str, Json]:
    experts: Json = sorted(held.experts)
    if isinstance(per_rank, list) and at.rank < len(per_rank):
        experts = per_rank[at.rank]
    return {
        "rank": at.rank,
        "numa": at.numa,
        "experts": experts,
        "tensors": held.tensors,
        "nbytes": held.nbytes,
        "pages": held.pages,
        "shared_pages": len(held.shared),
    }
