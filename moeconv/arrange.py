"""Drafts -> files: which tensor lies where, so that large ones start on page boundaries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moeconv.layouts.base import Draft
from moeconv.store.safetensors import build_header
from moeconv.types import Json, tensor_nbytes

PAGE = 4096
LARGE = 1 << 20  # tensors of this many bytes or more start on a page
MOST_ODD_FILES = 16  # further files opened for large tensors that are no multiple of a page


class OutTensor(NamedTuple):
    """A draft at its place: `offset` from the start of the file."""

    draft: Draft
    offset: int
    nbytes: int


class OutFile(NamedTuple):
    """One output file; `header` is what it starts with."""

    name: str
    rank: int
    tensors: tuple[OutTensor, ...]
    header: bytes
    nbytes: int

    def describe(self) -> Json:
        """Return what decides the file's bytes, as JSON values."""
        return [self.name, self.nbytes, [_describe(tensor) for tensor in self.tensors]]


def _describe(tensor: OutTensor) -> Json:
    draft = tensor.draft
    return [
        draft.name,
        draft.dtype,
        draft.shape,
        tensor.offset,
        draft.transposed,
        draft.constant,
        [tuple(fill) for fill in draft.fills],
        *((draft.encode, draft.part) if draft.encode else ()),
    ]


def draft_nbytes(draft: Draft) -> int:
    """Return the bytes of a draft's tensor."""
    return tensor_nbytes(draft.dtype, draft.shape)


def arrange_hf(
    drafts: Sequence[Draft], max_nbytes: int
) -> tuple[tuple[OutFile, ...], tuple[str, ...]]:
    """Return (model-0000i-of-0000n files, notes): filled in order up to max_nbytes each."""
    bins, notes = _bins(drafts, max_nbytes)
    files = tuple(
        _lay_out(f"model-{index:05d}-of-{len(bins):05d}.safetensors", 0, group, {"format": "pt"})
        for index, group in enumerate(bins, 1)
    )
    return files, notes


def arrange_ranks(
    drafts: Sequence[Draft], ranks: int, max_nbytes: int | None
) -> tuple[tuple[OutFile, ...], tuple[str, ...]]:
    """Return (model-rank-r-part-p files, notes): one part, unless max_nbytes or pages ask more."""
    per_rank: list[list[Draft]] = [[] for _ in range(ranks)]
    for draft in drafts:
        per_rank[draft.rank].append(draft)
    files: list[OutFile] = []
    notes: dict[str, None] = {}
    for rank, mine in enumerate(per_rank):
        bins, found = _bins(mine, max_nbytes)
        notes.update(dict.fromkeys(found))
        files += [
            _lay_out(f"model-rank-{rank}-part-{part}.safetensors", rank, group, {})
            for part, group in enumerate(bins)
        ]
    return tuple(files), tuple(notes)


def arrange_layers(
    drafts: Sequence[Draft], max_nbytes: int | None
) -> tuple[tuple[OutFile, ...], tuple[str, ...]]:
    """Return (one file per layer, more where max_nbytes asks for it; notes).

    kt-kernel reads every .safetensors file below a directory and tells them apart by their names
    alone: no model has files of these.
    """
    layers: dict[int, list[Draft]] = {}
    for draft in drafts:
        layers.setdefault(draft.layer or 0, []).append(draft)
    files: list[OutFile] = []
    for layer, mine in sorted(layers.items()):
        bins = _pairs_kept(mine, max_nbytes)
        for part, group in enumerate(bins):
            name = f"moeconv-experts-layer-{layer:05d}"
            if len(bins) > 1:
                name += f"-part-{part:05d}"
            files.append(_lay_out(f"{name}.safetensors", 0, group, {"format": "pt"}))
    return tuple(files), ()


def _pairs_kept(drafts: Sequence[Draft], max_nbytes: int | None) -> list[list[Draft]]:
    """Return the drafts per file, in order; a scale stays with the weight before it."""
    pairs: list[list[Draft]] = []
    for draft in drafts:
        if pairs and draft.part == "scale" and pairs[-1][-1].part == "weight":
            pairs[-1].append(draft)
        else:
            pairs.append([draft])
    bins: list[list[Draft]] = [[]]
    filled = 0
    for pair in pairs:
        nbytes = sum(draft_nbytes(draft) for draft in pair)
        if bins[-1] and max_nbytes is not None and filled + nbytes > max_nbytes:
            bins.append([])
            filled = 0
        bins[-1] += pair
        filled += nbytes
    return bins


def _bins(
    drafts: Sequence[Draft], max_nbytes: int | None
) -> tuple[list[list[Draft]], tuple[str, ...]]:
    """Return the drafts per file: within the limit, at most one large odd tensor in each."""
    bins: list[list[Draft]] = [[]]
    filled = 0
    for draft in drafts:
        nbytes = draft_nbytes(draft)
        if bins[-1] and max_nbytes is not None and filled + nbytes > max_nbytes:
            bins.append([])
            filled = 0
        bins[-1].append(draft)
        filled += nbytes
    odd = [draft for group in bins for draft in [d for d in group if _is_odd(d)][1:]]
    if not odd:
        return bins, ()
    if len(odd) > MOST_ODD_FILES:
        return bins, (f"{len(odd)} large tensors do not start on a page: no multiple of {PAGE}",)
    moved = {id(draft) for draft in odd}
    kept = [[draft for draft in group if id(draft) not in moved] for group in bins]
    return kept + [[draft] for draft in odd], ()


def _is_odd(draft: Draft) -> bool:
    nbytes = draft_nbytes(draft)
    return nbytes >= LARGE and nbytes % PAGE != 0


def _lay_out(name: str, rank: int, drafts: Sequence[Draft], metadata: dict[str, str]) -> OutFile:
    """Return the file: large tensors first, whole pages before odd ones, small ones last."""
    ordered = sorted(
        drafts, key=lambda draft: 2 if draft_nbytes(draft) < LARGE else int(_is_odd(draft))
    )
    ordered = _small_by_alignment(ordered)
    header = build_header(
        [(draft.name, draft.dtype, draft.shape, draft_nbytes(draft)) for draft in ordered],
        metadata,
        align=PAGE,
    )
    tensors = []
    offset = len(header)
    for draft in ordered:
        nbytes = draft_nbytes(draft)
        tensors.append(OutTensor(draft, offset, nbytes))
        offset += nbytes
    return OutFile(name, rank, tuple(tensors), header, offset)


def _small_by_alignment(ordered: Sequence[Draft]) -> list[Draft]:
    """Return the drafts with the small ones by falling element size, so that each is aligned."""
    large = [draft for draft in ordered if draft_nbytes(draft) >= LARGE]
    small = [draft for draft in ordered if draft_nbytes(draft) < LARGE]
    return large + sorted(small, key=lambda draft: -tensor_nbytes(draft.dtype, (1,)))
