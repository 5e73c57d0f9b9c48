"""Which rows, columns and experts each rank holds: tensor, data and expert parallelism.

Ranges as vLLM 0.32 computes them; docs/layouts.md shows them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moeconv.errors import Refused

VOCAB_MULTIPLE = 64  # vLLM's DEFAULT_VOCAB_PADDING_SIZE


class Part(NamedTuple):
    """Source elements [start, stop) of an axis; their `extent` on the rank, zeros at the end."""

    start: int
    stop: int
    extent: int


class Rank(NamedTuple):
    """One process: `number` = dp_rank * tp + tp_rank."""

    number: int
    tp_rank: int
    tp: int
    ranks: int


def all_ranks(tp: int, dp: int) -> tuple[Rank, ...]:
    """Return the ranks in order of their global index."""
    return tuple(Rank(index, index % tp, tp, tp * dp) for index in range(tp * dp))


def divisors(extent: int, most: int = 64) -> list[int]:
    """Return the numbers up to `most` that divide an extent."""
    return [count for count in range(1, most + 1) if extent % count == 0]


def even(what: str, extent: int, index: int, count: int, *, pad: bool = False) -> Part:
    """Return part `index` of `count` equal parts; Refused unless they divide or `pad` is set."""
    if extent % count and not pad:
        works = ", ".join(str(one) for one in divisors(extent))
        raise Refused(
            f"{what} {extent} is not divided by {count} ranks",
            hint=f"rank counts that work: {works}; or --uneven pad",
        )
    per = -(-extent // count)
    return Part(min(index * per, extent), min((index + 1) * per, extent), per)


def whole(extent: int) -> Part:
    """Return the whole axis: replicated on every rank."""
    return Part(0, extent, extent)


def heads(what: str, rows: int, count: int, rank: Rank) -> Part:
    """Return the rows of this rank's attention heads; Refused unless tp divides the heads."""
    if count % rank.tp or rows % count:
        works = ", ".join(str(one) for one in divisors(count))
        raise Refused(
            f"{count} attention heads ({what}, {rows} rows) are not divided by --tp {rank.tp}",
            hint=f"--tp that work: {works}",
        )
    return even(what, rows, rank.tp_rank, rank.tp)


def kv_heads(what: str, rows: int, count: int, rank: Rank) -> Part:
    """Return the rows of this rank's key/value heads: each on tp / count ranks where tp > count."""
    if rank.tp < count or rank.tp % count or rows % count:
        if count % rank.tp or rows % count:
            raise Refused(
                f"{count} key/value heads ({what}, {rows} rows) and --tp {rank.tp}: "
                "neither divides the other",
                hint=f"--tp that work: divisors and multiples of {count}",
            )
        return even(what, rows, rank.tp_rank, rank.tp)
    per = rows // count
    head = rank.tp_rank // (rank.tp // count)
    return Part(head * per, (head + 1) * per, per)


def vocab(what: str, rows: int, rank: Rank) -> Part:
    """Return the rows of a vocabulary that is padded to a multiple of 64 and split over tp."""
    padded = -(-rows // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    if padded % rank.tp:
        works = ", ".join(str(one) for one in divisors(padded))
        raise Refused(
            f"{what}: {rows} rows, padded to {padded}, are not divided by --tp {rank.tp}",
            hint=f"--tp that work: {works}",
        )
    part = even(what, padded, rank.tp_rank, rank.tp)
    return Part(min(part.start, rows), min(part.stop, rows), part.extent)


def padded(part: Part, multiple: int | None) -> Part:
    """Return the part with its extent rounded up to a multiple, zeros at the end."""
    if not multiple:
        return part
    return Part(part.start, part.stop, -(-part.extent // multiple) * multiple)


def physical_experts(experts: int, redundant: int) -> tuple[int, ...]:
    """Return physical -> logical: all experts, then the first ones once more."""
    return (*range(experts), *(index % experts for index in range(redundant)))


def place_experts(experts: int, rank: Rank, placement: str, redundant: int = 0) -> tuple[int, ...]:
    """Return the logical experts on a rank, in slot order.

    linear: the first `count % ranks` ranks hold one more; round-robin: every ranks-th.
    """
    physical = physical_experts(experts, redundant)
    if redundant and len(physical) % rank.ranks:
        raise Refused(
            f"{experts} experts and {redundant} redundant ones are not divided by {rank.ranks}"
            " ranks",
            hint="choose --redundant-experts so that all ranks hold equally many",
        )
    if placement == "round-robin":
        return physical[rank.number :: rank.ranks]
    base, more = divmod(len(physical), rank.ranks)
    start = rank.number * base + min(rank.number, more)
    return physical[start : start + base + (rank.number < more)]


def mapped_experts(mapping: Sequence[Sequence[int]], rank: Rank, experts: int) -> tuple[int, ...]:
    """Return the experts that an --expert-map gives a rank; Refused where it does not fit."""
    if len(mapping) != rank.ranks:
        raise Refused(f"--expert-map has {len(mapping)} ranks; there are {rank.ranks}")
    missing = set(range(experts)) - {expert for row in mapping for expert in row}
    wrong = {expert for row in mapping for expert in row} - set(range(experts))
    if missing or wrong:
        raise Refused(
            f"--expert-map leaves out experts {sorted(missing)[:5]} and names unknown ones "
            f"{sorted(wrong)[:5]}",
            hint=f"every expert from 0 to {experts - 1} must be on some rank",
        )
    return tuple(mapping[rank.number])
