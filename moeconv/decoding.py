"""Parts decoded: a codec's kernel by name, its readable reference where there is none."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from moeconv.codecs import CODECS
from moeconv.codecs.base import Window
from moeconv.errors import BadSource
from moeconv.kernels.cpu import (
    KERNELS,
    TURNED_KERNELS,
    Counts,
    Kernel,
    count_nonfinite,
    round_to,
)
from moeconv.kernels.cpu.amx import encode_part
from moeconv.kernels.cpu.base import is_row_contiguous
from moeconv.kernels.cpu.floats import cast
from moeconv.store.buffers import BufferPool
from moeconv.strips import decode_in_strips
from moeconv.types import Weight

Array = npt.NDArray[Any]

# Codecs whose kernels take their one part as it is stored: its dtype is a parameter.
TOLD_THEIR_DTYPE = ("float", "raw", "repeated")

KEEPING_NOTHING = BufferPool(0)


class Decoder(Protocol):
    """Where windows are decoded and packed: the same bytes wherever that is.

    Called by many threads at once, on arrays whose memory is `pool`'s.
    """

    @property
    def max_nbytes(self) -> int:
        """The most bytes that a piece of a task may have in memory."""
        ...

    def any_order(self, weight: Weight) -> bool:
        """Return whether an output along columns costs no more than one along rows."""
        ...

    def close(self) -> None:
        """Give back what is held; nothing may be decoding."""
        ...

    def pool(self, max_nbytes: int) -> BufferPool:
        """Return a pool of memory that `decode` reads and writes fastest."""
        ...

    def decode(
        self, weight: Weight, parts: Mapping[str, Array], window: Window, dtype: str, out: Array
    ) -> Counts:
        """Fill out [rows, cols] as `decode_window` does; any_order: it may run along columns."""
        ...

    def encode(self, form: str, part: str, values: Array, out: Array) -> int:
        """Fill the bytes `out` as kernels.cpu.amx.encode_part does; return the first bad row."""
        ...


class CpuDecoder:
    """Decodes where it is called, with numba's kernels and the readable references."""

    max_nbytes = sys.maxsize

    def __init__(self) -> None:
        self._pool = KEEPING_NOTHING

    def any_order(self, weight: Weight) -> bool:
        """Return whether there is a kernel: what it writes is turned tile by tile."""
        return has_kernel(weight)

    def close(self) -> None:
        """Do nothing: nothing is held."""

    def pool(self, max_nbytes: int) -> BufferPool:
        """Return a pool of plain memory, which tiles are taken from, too."""
        self._pool = BufferPool(max_nbytes)
        return self._pool

    def decode(
        self, weight: Weight, parts: Mapping[str, Array], window: Window, dtype: str, out: Array
    ) -> Counts:
        """Fill out [rows, cols]; see `decode_window`."""
        return decode_window(weight, parts, window, dtype, out, self._pool)

    def encode(self, form: str, part: str, values: Array, out: Array) -> int:
        """Fill the bytes `out`; see kernels/cpu/amx.py."""
        return encode_part(form, part, values, out)


def is_copy(weight: Weight, dtype: str) -> bool:
    """Return whether a weight's stored elements are its output elements."""
    return weight.codec in ("float", "raw") and weight.params["dtype"] == dtype


def has_kernel(weight: Weight) -> bool:
    """Return whether a kernel of the CPU decodes a weight; its output may have any strides."""
    return _kernel_of(weight) is not None


def _kernel_of(weight: Weight) -> Kernel | None:
    return (TURNED_KERNELS if weight.transposed else KERNELS).get(weight.codec)


def decode_window(
    weight: Weight,
    parts: Mapping[str, Array],
    window: Window,
    dtype: str,
    out: Array,
    pool: BufferPool = KEEPING_NOTHING,
) -> Counts:
    """Fill out [rows, cols] (bits for BF16 and F16) with a decoded window; return what it holds.

    Rows are contiguous where there is no kernel. Tiles are taken from `pool`. BadSource for
    numbers that the codec refuses, with the name of the weight.
    """
    with named(weight):
        kernel = _kernel_of(weight)
        if kernel is not None:
            return _decode(kernel, (weight, dtype), parts, window, out, pool)
        turned = {part: array.T for part, array in parts.items()} if weight.transposed else parts
        return _reference(weight, turned, window, dtype, out)


@contextmanager
def named(weight: Weight) -> Iterator[None]:
    """Add the weight's name and file to a BadSource that does not say where."""
    try:
        yield
    except BadSource as error:
        if error.where:
            raise
        file = next(iter(weight.parts.values())).file
        raise type(error)(f"'{weight.name}': {error.what}", where=file, hint=error.hint) from error


def _decode(
    kernel: Kernel,
    what: tuple[Weight, str],
    parts: Mapping[str, Array],
    window: Window,
    out: Array,
    pool: BufferPool,
) -> Counts:
    """Fill `out`: at once where it runs along the lines that are stored, else in strips."""
    weight, dtype = what
    given = _with_float32_scales(weight, parts)

    def decode(parts: Mapping[str, Array], window: Window, lines: Array) -> Counts:
        if weight.transposed:
            window = window.turned
        return kernel(parts, window, weight.params, dtype, lines)

    lines = out.T if weight.transposed else out
    if is_row_contiguous(lines):
        return decode(given, window, lines)
    return decode_in_strips(decode, weight, given, window, lines, pool)


def _with_float32_scales(weight: Weight, parts: Mapping[str, Array]) -> Mapping[str, Array]:
    """Return the parts as kernels take them: 16-bit scales, whose arrays do not say which, wide."""
    if weight.codec in TOLD_THEIR_DTYPE:
        return parts
    given = dict(parts)
    for part, array in parts.items():
        dtype = weight.parts[part].dtype
        if dtype in ("BF16", "F16"):
            given[part] = np.empty(array.shape, np.float32)
            cast(array, (dtype, "F32"), given[part])
    return given


def _reference(
    weight: Weight, parts: Mapping[str, Array], window: Window, dtype: str, out: Array
) -> Counts:
    """Decode with the codec's readable reference, rounding once at the end."""
    import torch

    tensors = {
        part: _as_torch(np.ascontiguousarray(array), weight.parts[part].dtype)
        for part, array in parts.items()
    }
    codec = CODECS[weight.codec]
    with torch.no_grad():
        values = codec.decode(tensors, window, weight.params)
    return round_to(dtype, np.ascontiguousarray(values.float().numpy()), out)


def _as_torch(array: Array, dtype: str) -> Any:
    """Return a tensor over an array; the floating 16-bit and 8-bit dtypes viewed as such."""
    import torch

    views = {
        "BF16": torch.bfloat16,
        "F16": torch.float16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
        "I8": torch.int8,
    }
    tensor = torch.from_numpy(array)
    return tensor.view(views[dtype]) if dtype in views else tensor


def count_copied(array: Array, dtype: str) -> Counts:
    """Return what copied elements hold; integers hold no NaN."""
    if dtype not in ("BF16", "F16", "F32"):
        return Counts(0, 0, 0)
    nan, inf = count_nonfinite(array, dtype)
    return Counts(nan, inf, 0)
