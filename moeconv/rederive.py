"""Output elements derived once more from the source, by another road than the conversion took.

The codecs' readable references decode (never the kernels), torch rounds, numpy's index arrays
place; tasks, pieces and joined rectangles have no part in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from moeconv.arrange import OutTensor
from moeconv.codecs import CODECS, weight_block
from moeconv.codecs.amx import FORMS, encode
from moeconv.codecs.base import Tile, Window, grow, part_slice
from moeconv.element_bits import BITS, bits_of, rounded_bits, show
from moeconv.layouts.base import Draft, Fill
from moeconv.plan import Plan
from moeconv.store.reader import Reader
from moeconv.torch_dtypes import torch_dtype
from moeconv.types import DTYPE_BITS, Key, Place, Weight, dtype_bits, element_count

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[Any]

BLOCK_NBYTES = 64 << 20  # of float32 values that one thread derives at once
NBYTES_PER_ELEMENT = 40  # what a reference, its result, and what is compared hold meanwhile
SEED = 0x6D6F65636F6E76  # of the choice of samples: "moeconv"


class Unit(NamedTuple):
    """One slot of one output tensor, by indices into the plan."""

    file: int
    tensor: int
    slot: int


class Checked(NamedTuple):
    """What was compared of a unit, and in words how it differs ("" if it does not)."""

    elements: int
    nbytes: int
    difference: str


class _Differing(NamedTuple):
    """How many elements of a block differ; the first one: row, col, its bits there and here."""

    elements: int
    row: int
    col: int
    there: int
    derived: int


def choose_units(plan: Plan, sample: float) -> tuple[Unit, ...]:
    """Return the share `sample` of all slots of all tensors, the same ones every time.

    At least one of every kind: of every name (numbers apart), dtype and codec.
    """
    chosen: list[Unit] = []
    least: dict[object, tuple[int, Unit]] = {}
    met: set[object] = set()
    limit = round(sample * 2**64)
    for unit, identity, kind in _identities(plan):
        rank = xxhash.xxh3_64_intdigest(identity.encode(), seed=SEED)
        if rank < limit:
            chosen.append(unit)
            met.add(kind)
        elif kind not in least or rank < least[kind][0]:
            least[kind] = (rank, unit)
    chosen += [unit for kind, (_, unit) in least.items() if kind not in met]
    return tuple(sorted(chosen))


def _identities(plan: Plan) -> Iterator[tuple[Unit, str, object]]:
    for file_index, file in enumerate(plan.files):
        for tensor_index, tensor in enumerate(file.tensors):
            draft = tensor.draft
            name = re.sub(r"\d+", "N", draft.name)
            for slot in range(slots_of(draft)):
                codecs = tuple(
                    plan.model.places[key_of(fill, slot)].weight.codec for fill in draft.fills
                )
                yield (
                    Unit(file_index, tensor_index, slot),
                    f"{file.name}\0{draft.name}\0{slot}",
                    (name, draft.dtype, codecs),
                )


def unit_nbytes(plan: Plan, unit: Unit) -> int:
    """Return the bytes that a unit has in the output."""
    tensor = plan.files[unit.file].tensors[unit.tensor]
    return tensor.nbytes // max(slots_of(tensor.draft), 1)


def slots_of(draft: Draft) -> int:
    """Return how many units a tensor is: a constant one is one, however many slots it has."""
    return draft.slots if draft.constant is None else 1


def key_of(fill: Fill, slot: int) -> Key:
    """Return what of the model a fill takes for a slot."""
    expert = None if fill.experts is None else fill.experts[slot]
    return Key(fill.stack, fill.layer, expert, fill.name)


def block_nbytes_within(memory_nbytes: int, jobs: int) -> int:
    """Return the float32 bytes of a block with which `jobs` threads keep within a memory."""
    return min(memory_nbytes // max(jobs, 1) * 4 // NBYTES_PER_ELEMENT, BLOCK_NBYTES)


class Deriver:
    """Derives units of a plan again and compares them with the output; shared by all threads."""

    def __init__(self, plan: Plan, source: Reader, output: Reader, block_nbytes: int) -> None:
        self._plan = plan
        self._source = source
        self._output = output
        self._elements = max(block_nbytes // 4, 1)

    def check(self, unit: Unit) -> Checked:
        """Return how a unit of the output compares; raises IOFailed, BadSource."""
        file = self._plan.files[unit.file]
        tensor = file.tensors[unit.tensor]
        draft = tensor.draft
        if draft.encode:
            return self._check_encoded(file.name, tensor)
        fills: tuple[Fill | None, ...] = (None,) if draft.constant is not None else draft.fills
        elements = 0
        problem = ""
        for fill in fills:
            found: _Differing | None = None
            for rows in self._row_blocks(draft, fill, unit.slot):
                expected = self._expected(draft, fill, unit.slot, rows)
                there = self._there(file.name, tensor, unit.slot, (fill, rows))
                elements += expected.size
                found = _add(found, _compare(expected, there, draft, fill, rows))
            if found is not None and not problem:
                problem = _words(draft, fill, unit.slot, found)
        whole = element_count(draft.shape) // max(slots_of(draft), 1)
        if elements != whole and not problem:
            problem = f"the plan fills {elements} of the {whole} elements of {draft.name}"
        return Checked(elements, elements * DTYPE_BITS[draft.dtype] // 8, problem)

    def _check_encoded(self, name: str, tensor: OutTensor) -> Checked:
        """Return how a packed tensor compares: its one fill, rounded to BF16 and encoded."""
        draft = tensor.draft
        (fill,) = draft.fills
        place = self._plan.model.places[key_of(fill, 0)]
        bits = self._values("BF16", place, source_rows(place, fill), fill)
        values = (bits.astype(np.uint32) << 16).view(np.float32)
        packed, scales = encode(values, FORMS[draft.encode])
        expected = packed if draft.part == "weight" else scales.view(np.uint8)
        there = np.empty(tensor.nbytes, np.uint8)
        self._output.read_into(name, tensor.offset, there)
        width = DTYPE_BITS[draft.dtype]
        derived, stored = (side.view(BITS[width]).reshape(1, -1) for side in (expected, there))
        found = _compare(derived, stored, draft, None, range(1))
        difference = _words(draft, fill, 0, found) if found is not None else ""
        return Checked(stored.size, tensor.nbytes, difference)

    def _row_blocks(self, draft: Draft, fill: Fill | None, slot: int) -> Iterator[range]:
        """Yield the rows that a fill owns, counted from its first, a block at a time."""
        if fill is None:
            yield range(1)
            return
        weight = self._plan.model.places[key_of(fill, slot)].weight
        block_rows, block_cols = weight_block(weight)
        width = max(fill.own_cols, min(weight.cols, fill.cols.length + 2 * block_cols), 1)
        step = max(self._elements // width // block_rows, 1) * block_rows
        for start in range(0, fill.own_rows, step):
            yield range(start, min(start + step, fill.own_rows))

    def _expected(self, draft: Draft, fill: Fill | None, slot: int, rows: range) -> Array:
        """Return the bits [rows, own_cols] that the source gives a part of a fill."""
        if fill is None:
            return _constant_bits(draft)
        out = np.zeros((len(rows), fill.own_cols), BITS[DTYPE_BITS[draft.dtype]])
        place = self._plan.model.places[key_of(fill, slot)]
        taken = source_rows(place, fill)[rows.start : rows.stop]
        if taken.size and fill.cols.length:
            out[: taken.size, : fill.cols.length] = self._values(draft.dtype, place, taken, fill)
        return out

    def _values(self, dtype: str, place: Place, taken: Array, fill: Fill) -> Array:
        """Return the bits of some rows and of the fill's columns, decoded and rounded."""
        weight = place.weight
        codec = CODECS[weight.codec]
        tiles = codec.tiles(weight.params)
        window = window_of(weight, taken, fill)
        parts = {
            part: self._part(weight, part, tile, (place.slot, window))
            for part, tile in tiles.items()
            if part in weight.parts
        }
        rows = taken - window.row_start
        cols = slice(fill.cols.start - window.col_start, fill.cols.stop - window.col_start)
        if weight.codec in ("float", "raw") and weight.params["dtype"] == dtype:
            return bits_of(parts["weight"])[rows, cols]
        values = codec.decode(parts, window, weight.params)
        return rounded_bits(values[rows, cols], dtype)

    def _part(self, weight: Weight, part: str, tile: Tile, at: tuple[int, Window]) -> torch.Tensor:
        """Return the stored elements of a part that a window needs, as the reference takes them."""
        import torch

        slot, window = at
        ref = weight.parts[part]
        wanted = part_slice(tile, window, weight)
        majors, minors = wanted.extent
        width = dtype_bits(ref.dtype) // 8
        first = (slot * majors + wanted.major.start) * minors + wanted.minor.start
        run = wanted.minor.length * width
        memory = np.empty((wanted.major.length, run), np.uint8)
        self._source.read_strided(
            ref.file, ref.offset + first * width, minors * width, run, len(memory), memory
        )
        kind = torch.uint8 if ref.dtype not in DTYPE_BITS else torch_dtype(ref.dtype)
        tensor = torch.from_numpy(memory).view(kind)
        return tensor.T if weight.transposed and tile.axes in ("rc", "cr") else tensor

    def _there(
        self, name: str, tensor: OutTensor, slot: int, part: tuple[Fill | None, range]
    ) -> Array:
        """Return the bits [rows, own_cols] that the output has where a part of a fill goes."""
        fill, rows = part
        draft = tensor.draft
        bits = BITS[DTYPE_BITS[draft.dtype]]
        width = DTYPE_BITS[draft.dtype] // 8
        if fill is None:
            memory = np.empty((1, tensor.nbytes), np.uint8)
            self._output.read_into(name, tensor.offset, memory)
            return memory.view(bits)
        base = tensor.offset + slot * draft.rows * draft.cols * width
        first = fill.at_row + rows.start * fill.row_step
        if draft.transposed:  # stored [cols, rows]
            run = ((len(rows) - 1) * fill.row_step + 1) * width
            memory = np.empty((fill.own_cols, run), np.uint8)
            start = base + (fill.at_col * draft.rows + first) * width
            stride = draft.rows * width
            self._output.read_strided(name, start, stride, run, fill.own_cols, memory)
            return memory.view(bits)[:, :: fill.row_step].T
        run = fill.own_cols * width
        memory = np.empty((len(rows), run), np.uint8)
        start = base + (first * draft.cols + fill.at_col) * width
        stride = draft.cols * fill.row_step * width
        self._output.read_strided(name, start, stride, run, len(rows), memory)
        return memory.view(bits)


def window_of(weight: Weight, taken: Array, fill: Fill) -> Window:
    """Return what is decoded for these rows [n], at least one, and the fill's columns."""
    wanted = Window(int(taken.min()), int(taken.max()) + 1, fill.cols.start, fill.cols.stop)
    return grow(wanted, weight_block(weight), weight.rows, weight.cols)


def source_rows(place: Place, fill: Fill) -> Array:
    """Return the rows of the weight [n] int64 that a fill takes, one by one."""
    of_key = np.arange(place.rows.start, place.rows.stop, place.rows.step)
    taken: Array = of_key[np.arange(fill.rows.start, fill.rows.stop, fill.rows.step)]
    return taken


def _constant_bits(draft: Draft) -> Array:
    import torch

    values = torch.tensor([[draft.constant]], dtype=torch.float32)
    return rounded_bits(values, draft.dtype).repeat(element_count(draft.shape), axis=1)


def _compare(
    expected: Array, there: Array, draft: Draft, fill: Fill | None, rows: range
) -> _Differing | None:
    """Return how two blocks differ, with the row and column in the output's matrix."""
    wrong = np.argwhere(expected != there)
    if not len(wrong):
        return None
    row, col = int(wrong[0][0]), int(wrong[0][1])
    at_row, at_col = row, col
    if fill is not None:
        at_row = fill.at_row + (rows.start + row) * fill.row_step
        at_col = fill.at_col + col
    return _Differing(len(wrong), at_row, at_col, int(there[row, col]), int(expected[row, col]))


def _add(one: _Differing | None, other: _Differing | None) -> _Differing | None:
    if one is None or other is None:
        return one or other
    return one._replace(elements=one.elements + other.elements)


def _words(draft: Draft, fill: Fill | None, slot: int, found: _Differing) -> str:
    what = f"tensor '{draft.name}'"
    if fill is not None and fill.experts is not None:
        what += f", {fill.name} of expert {fill.experts[slot]}"
    axes = "row, col" if not draft.transposed else "row (last axis), col"
    return (
        f"{what}: {found.elements} elements differ; the first at ({axes}) = ({found.row}, "
        f"{found.col}) is {show(found.there, draft.dtype)}, the source gives "
        f"{show(found.derived, draft.dtype)}"
    )
