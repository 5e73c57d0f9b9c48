"""Where every source tensor ends, and proof that every output element is written once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from moeconv.errors import UnrecognizedTensor
from moeconv.families.parts import CARRIERS
from moeconv.layouts.base import Draft, Fill
from moeconv.model import Model
from moeconv.types import Span, TensorRef, Weight, element_count

STATES = ("decoded", "copied", "codec part", "dropped", "not selected")
_Group = tuple[str, int | None, str]  # (stack, layer, key name)


class State(NamedTuple):
    """The one state of a source tensor; `rule` names why it is dropped."""

    ref: TensorRef
    state: str
    rule: str = ""


class Accounting(NamedTuple):
    """Every source tensor's state, and the output's tensors."""

    states: tuple[State, ...]
    output_tensors: int

    def totals(self) -> dict[str, tuple[int, int]]:
        """Return state -> (tensors, bytes)."""
        found = dict.fromkeys(STATES, (0, 0))
        for state in self.states:
            tensors, nbytes = found[state.state]
            found[state.state] = (tensors + 1, nbytes + state.ref.nbytes)
        return found


def account(
    model: Model, drafts: Sequence[Draft], unused: Mapping[str, str], *, partial: bool
) -> Accounting:
    """Return the accounting; UnrecognizedTensor for a tensor that the output uses only in part."""
    used = _coverage(drafts)
    states = [State(drop.ref, "dropped", drop.rule) for drop in model.dropped]
    for weight in model.weights:
        states += _weight_states(weight, used, unused, partial=partial)
    return Accounting(tuple(states), len(drafts))


class _Use(NamedTuple):
    windows: dict[tuple[int, ...] | None, set[tuple[Span, Span]]]
    dtypes: set[str]


def _coverage(drafts: Iterable[Draft]) -> Mapping[_Group, _Use]:
    """Return per key (without its expert): experts -> windows taken, and the dtypes it becomes."""
    found: dict[_Group, _Use] = defaultdict(lambda: _Use({}, set()))
    for draft in drafts:
        for fill in draft.fills:
            use = found[fill.stack, fill.layer, fill.name]
            use.windows.setdefault(fill.experts, set()).add((fill.rows, fill.cols))
            use.dtypes.add(draft.dtype)
    return found


def _weight_states(
    weight: Weight, used: Mapping[_Group, _Use], unused: Mapping[str, str], *, partial: bool
) -> list[State]:
    held = [
        (used.get((weight.stack, weight.layer, name)), rows)
        for name, rows in weight.projections
        if name not in unused or (weight.stack, weight.layer, name) in used
    ]
    uses = [use for use, _ in held]
    present = [use for use in uses if use is not None]
    rule = unused.get(weight.stack) or unused.get(weight.projections[0][0], "")
    if rule and not present:
        return [State(ref, "dropped", rule) for ref in weight.parts.values()]
    whole = len(present) == len(uses) and all(
        _covers(use, weight, rows) for use, (_, rows) in zip(present, held, strict=True)
    )
    if not whole:
        if partial:
            return [State(ref, "not selected") for ref in weight.parts.values()]
        ref = next(iter(weight.parts.values()))
        raise UnrecognizedTensor(
            f"'{ref.name}' would not be wholly in the output, and no rule drops it",
            where=ref.file,
            hint="this is a gap in the layout's table; --experts-only writes the experts alone",
        )
    same = weight.codec in ("float", "raw", "repeated") and all(
        use.dtypes == {str(weight.params["dtype"])} for use in present
    )
    return [State(ref, _part_state(part, same=same)) for part, ref in weight.parts.items()]


def _part_state(part: str, *, same: bool) -> str:
    if part not in CARRIERS:
        return "codec part"
    return "copied" if same else "decoded"


def _covers(use: _Use, weight: Weight, rows: Span) -> bool:
    """Return whether the windows cover a key of `rows` rows in each of the weight's experts."""
    wanted: set[int | None] = {None}
    if weight.is_expert:
        wanted = {weight.expert} if weight.slots is None else set(range(weight.slots))
    alone = use.windows.get((weight.expert,)) if weight.expert is not None else None
    if alone is not None and _whole(alone, rows.length, weight.cols):
        return True
    for experts, windows in use.windows.items():
        held: set[int | None] = {None} if experts is None else set(experts)
        if held & wanted and _whole(windows, rows.length, weight.cols):
            wanted -= held
    return not wanted


def _whole(windows: Iterable[tuple[Span, Span]], rows: int, cols: int) -> bool:
    """Return whether windows that cut one axis only cover [rows, cols]."""
    full_rows = {(w.start, w.stop) for r, w in windows if (r.start, r.stop) == (0, rows)}
    full_cols = {(r.start, r.stop) for r, w in windows if (w.start, w.stop) == (0, cols)}
    return _joined(full_rows, cols) or _joined(full_cols, rows)


def _joined(spans: Iterable[tuple[int, int]], extent: int) -> bool:
    at = 0
    for start, stop in sorted(spans):
        if start > at:
            return False
        at = max(at, stop)
    return at >= extent


def check_drafts(drafts: Iterable[Draft]) -> None:
    """Raise unless each draft's fills own every element of its matrices exactly once.

    A failure is a bug in a layout's table, not in the source.
    """
    seen: set[tuple[int, str]] = set()
    for draft in drafts:
        if (draft.rank, draft.name) in seen:
            raise AssertionError(f"{draft.name} is written twice on rank {draft.rank}")
        seen.add((draft.rank, draft.name))
        if draft.constant is not None:
            continue
        if element_count(draft.shape) != draft.slots * draft.rows * draft.cols and not draft.encode:
            raise AssertionError(f"{draft.name} has shape {draft.shape}, and other matrices")
        owned = sum(fill.own_rows * fill.own_cols for fill in draft.fills)
        if owned != draft.rows * draft.cols or _overlap(draft.fills):
            raise AssertionError(f"the fills of {draft.name} do not own each element once")


def _overlap(fills: Sequence[Fill]) -> bool:
    for index, one in enumerate(fills):
        for other in fills[:index]:
            rows = set(_owned_rows(one)) & set(_owned_rows(other)) if one.row_step > 1 else None
            meet_rows = (
                bool(rows)
                if rows is not None
                else one.at_row < other.at_row + other.own_rows * other.row_step
                and other.at_row < one.at_row + one.own_rows * one.row_step
            )
            meet_cols = (
                one.at_col < other.at_col + other.own_cols
                and other.at_col < one.at_col + one.own_cols
            )
            if meet_rows and meet_cols and one.own_rows and other.own_rows:
                return True
    return False


def _owned_rows(fill: Fill) -> range:
    return range(fill.at_row, fill.at_row + fill.own_rows * fill.row_step, fill.row_step)
