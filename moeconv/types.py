"""The values that every room of moeconv speaks in; no behaviour beyond arithmetic on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

Params = Mapping[str, int | str | bool | float]
Json = Any  # a JSON value: the boundary where types end

# Bits of one element. Names as safetensors writes them.
DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
FLOAT_DTYPES = ("BF16", "F16", "F32", "F64")
# Of the dtype of a block-quantized GGUF tensor ("GGML:Q4_K"), whose shape counts bytes. Not in the
# table above: no safetensors file has such a dtype.
GGML_PREFIX = "GGML:"


class Span(NamedTuple):
    """Rows or columns start, start+step, ... below stop."""

    start: int
    stop: int
    step: int = 1

    @property
    def length(self) -> int:
        return len(range(self.start, self.stop, self.step))


class TensorRef(NamedTuple):
    """Bytes at rest: `nbytes` at `offset` of the file `file` (a name relative to the source)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


class Key(NamedTuple):
    """What a weight is in the model, whatever its file and name.

    `stack` is "main" for the decoder's layers, else the prefix of another run ("mtp.layers").
    `name` of an expert: gate, up, down, gate.bias, ...; of anything else: what follows its layer.
    """

    stack: str
    layer: int | None
    expert: int | None
    name: str


class Form(NamedTuple):
    """The tensor of the Hugging Face form that takes a projection's rows, and which of its rows.

    `name` with {expert} is one tensor per slot, else one for all slots.
    """

    name: str
    rows: Span


@dataclass(frozen=True, slots=True)
class Weight:
    """One matrix at rest per slot: [rows = out features, cols = in features], spread over parts.

    A stacked tensor ([E, rows, cols]) has `slots` = E matrices, a plain one has slots None.
    `projections` says which rows are which key: gate and up share one weight where they are fused.
    `name`, `shape` and `form_transposed` are those of the decoded tensor in Hugging Face form.
    Vectors are [rows, 1], scalars [1, 1]; more dimensions are folded into cols.
    `forms`, one per projection: where the source arranges its tensors otherwise than that form
    (GGUF); `shape` is then that of the forms' tensors.
    """

    name: str
    codec: str
    rows: int
    cols: int
    slots: int | None
    parts: Mapping[str, TensorRef]
    transposed: bool  # every part is stored [cols, rows]
    params: Params
    stack: str
    layer: int | None
    expert: int | None  # of an unstacked expert; a stacked one's expert is its slot
    projections: tuple[tuple[str, Span], ...]
    shape: tuple[int, ...]
    form_transposed: bool
    is_expert: bool
    forms: tuple[Form, ...] = ()
    model_dtype: str = ""  # what the Hugging Face form stores, where that is not what is stored

    def keys(self, slot: int) -> Iterator[tuple[Key, Span]]:
        """Yield each key that lies in `slot`, with its rows."""
        expert = (slot if self.slots is not None else self.expert) if self.is_expert else None
        for name, rows in self.projections:
            yield Key(self.stack, self.layer, expert, name), rows


class Place(NamedTuple):
    """Where a key lies: `rows` of the matrix in `slot` of `weight`, all of its columns."""

    weight: Weight
    slot: int
    rows: Span


def element_count(shape: tuple[int, ...]) -> int:
    """Return the number of elements of a shape; 1 for a scalar."""
    count = 1
    for extent in shape:
        count *= extent
    return count


def dtype_bits(dtype: str) -> int:
    """Return the bits of one stored element."""
    return 8 if dtype.startswith(GGML_PREFIX) else DTYPE_BITS[dtype]


def tensor_nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes that a tensor of this dtype and shape takes (whole bytes, rounded up)."""
    return -(-element_count(shape) * dtype_bits(dtype) // 8)
