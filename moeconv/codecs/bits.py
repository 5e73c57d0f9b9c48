"""Bit fields in 32-bit words, column groups and header checks, shared by the integer codecs."""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from moeconv.codecs.base import Codec, Tile, Window, header_shapes
from moeconv.errors import BadSource, ShapeMismatch
from moeconv.types import Params, TensorRef

if TYPE_CHECKING:
    import torch

WORD_BITS = 32
SCALE_DTYPES = ("F16", "BF16", "F32")
ONE_GROUP = -1  # as GPTQ's group_size: the whole of a row shares a scale

# Small parts whose payload must be read while planning and handed to the codec's `settle`.
PEEK: Mapping[str, tuple[str, ...]] = {"gptq": ("qzeros",), "packed-int": ("weight_shape",)}


class PeekingCodec(Codec, Protocol):
    """A codec of PEEK: headers alone do not say all of its parameters."""

    def settle(
        self, found: Mapping[str, TensorRef], params: Params, payloads: Mapping[str, np.ndarray]
    ) -> Params:
        """Return the parameters completed from the payloads of the parts named in PEEK."""
        ...


class Run(NamedTuple):
    """`elements` fields fill `words` words; the next field begins in a new word."""

    elements: int
    words: int


def dense_run(bits: int) -> Run:
    """Return the shortest run of a stream without gaps: fields may cross words inside of it."""
    shared = gcd(bits, WORD_BITS)
    return Run(WORD_BITS // shared, bits // shared)


def padded_run(bits: int) -> Run:
    """Return the run of fields that never cross words: the rest of each word stays empty."""
    return Run(WORD_BITS // bits, 1)


def words_for(count: int, run: Run) -> int:
    """Return how many words hold `count` fields, the last run cut off after its last field."""
    return -(-count * run.words // run.elements)


def _places(bits: int, run: Run, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the word and the shift at which each of `count` fields begins, int64 [count]."""
    index = np.arange(count, dtype=np.int64)
    begin = index % run.elements * bits
    return index // run.elements * run.words + begin // WORD_BITS, begin % WORD_BITS


def unpack(words: torch.Tensor, bits: int, run: Run, count: int) -> torch.Tensor:
    """Return int64 fields [R, count] of int32 words [R, W], lowest bits first."""
    import torch

    word, shift = (torch.from_numpy(at).to(words.device) for at in _places(bits, run, count))
    stream = words.long() & 0xFFFFFFFF
    following = (word + 1).clamp(max=max(words.shape[1] - 1, 0))
    pairs = stream[:, word] | stream[:, following] << WORD_BITS  # [R, count]
    return pairs >> shift & (1 << bits) - 1


def unpack_peeked(words: np.ndarray, bits: int, run: Run, count: int) -> np.ndarray:
    """Return int64 fields [..., count] of int32 words [..., W]; plans never import torch."""
    word, shift = _places(bits, run, count)
    stream = words.astype(np.int64) & 0xFFFFFFFF
    following = np.minimum(word + 1, max(words.shape[-1] - 1, 0))
    pairs = stream[..., word] | stream[..., following] << WORD_BITS
    fields: np.ndarray = pairs >> shift & (1 << bits) - 1
    return fields


def group_cols(group_size: int) -> int | None:
    """Return Tile.cols of a part with one element per group."""
    return None if group_size == ONE_GROUP else group_size


def group_count(cols: int, group_size: int) -> int:
    """Return how many groups a row of `cols` columns has."""
    return 1 if group_size == ONE_GROUP else -(-cols // group_size)


def column_groups(
    window: Window, group_size: int, g_idx: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """Return int64 [C]: which group of the window's slice of scales each column takes.

    `g_idx` (activation order): the groups of the columns, among all groups of the row.
    """
    import torch

    if g_idx is not None:
        return g_idx.reshape(-1).long()
    columns = torch.arange(window.col_start, window.col_stop, device=device)
    if group_size == ONE_GROUP:
        return torch.zeros_like(columns)
    return columns // group_size - window.col_start // group_size


def scaled(
    codes: torch.Tensor, zeros: torch.Tensor | int, scales: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """Return float32 (q - z) * s [R, C] of codes [R, C], zeros and scales [R or 1, G], index [C].

    q - z is exact in integers, so the product is the only rounding.
    """
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < scales.shape[1]:
        raise no_such_group(int(index.min()), int(index.max()), scales.shape[1])
    at_zero = zeros if isinstance(zeros, int) else zeros[:, index]
    return (codes - at_zero).float() * scales[:, index].float()


def check_groups(g_idx: np.ndarray, groups: int) -> None:
    """Raise BadSource where a column's group is none of its row's `groups`."""
    if g_idx.size and not 0 <= int(g_idx.min()) <= int(g_idx.max()) < groups:
        raise no_such_group(int(g_idx.min()), int(g_idx.max()), groups)


def no_such_group(lowest: int, highest: int, groups: int) -> BadSource:
    """Return the error for columns whose group is none of its row."""
    return BadSource(
        f"group index {lowest}..{highest} of a column is outside of the "
        f"{groups} groups of its scales",
        hint="g_idx is damaged or was written for another group size",
    )


def stacked_axes(ref: TensorRef) -> tuple[int, ...]:
    """Return the axes in front of a matrix: () or (experts,)."""
    if len(ref.shape) < 2:
        raise ShapeMismatch(
            f"'{ref.name}' has shape {list(ref.shape)}, expected a matrix", where=ref.file
        )
    return ref.shape[:-2]


def check_headers(
    found: Mapping[str, TensorRef], tiles: Mapping[str, Tile], shape: tuple[int, ...]
) -> None:
    """Raise ShapeMismatch if a part has not the dtype and shape for a weight [..., rows, cols]."""
    *lead, rows, cols = shape
    for part, tile in tiles.items():
        ref = found[part]
        if ref.dtype not in tile.dtypes:
            raise ShapeMismatch(
                f"'{ref.name}' has dtype {ref.dtype}, expected {' or '.join(tile.dtypes)}",
                where=ref.file,
            )
        expected = [(*lead, *rest) for rest in header_shapes(tile, rows, cols)]
        if ref.shape not in expected:
            raise ShapeMismatch(
                f"'{ref.name}' has shape {list(ref.shape)}, expected {list(expected[0])} "
                f"for a weight of {rows} x {cols}",
                where=ref.file,
                hint="the quantization config (bits, group size) does not describe this tensor",
            )


def required_int(values: Params, field: str, where: TensorRef) -> int:
    """Return an integer field of the quantization config; BadSource without it."""
    value = values.get(field)
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadSource(
            f"the quantization config gives no usable '{field}' for '{where.name}': {value!r}",
            where=where.file,
        )
    return value


def group_size_of(values: Params, where: TensorRef) -> int:
    """Return columns per scale, ONE_GROUP for -1; BadSource for 0 and other negatives."""
    group_size = required_int(values, "group_size", where)
    if group_size != ONE_GROUP and group_size < 1:
        raise BadSource(f"group_size {group_size} of '{where.name}' is no size", where=where.file)
    return group_size


def unsupported(what: str, ref: TensorRef, supported: str) -> BadSource:
    """Return the error for a scheme that a codec has not."""
    return BadSource(
        f"'{ref.name}' is {what}; supported: {supported}",
        where=ref.file,
        hint="convert it with the tool that wrote it, or start from the unquantized model",
    )
