"""What a kernel is, and how it sees the arrays that it reads and writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moeconv.codecs.base import Window
from moeconv.errors import ShapeMismatch
from moeconv.kernels.cpu.signatures import nb as nb
from moeconv.types import Params

Array = npt.NDArray[Any]


class Counts(NamedTuple):
    """The values of one decoded window that are not finite numbers.

    nan, inf: NaN and Inf among the decoded float32; overflow: finite there, Inf in the output.
    """

    nan: int
    inf: int
    overflow: int

    def plus(self, other: Counts) -> Counts:
        """Return what two windows hold together."""
        return Counts(*(one + more for one, more in zip(self, other, strict=True)))


# parts, window, params, output dtype, output [rows, cols]. Parts are as stored, except that BF16
# and F16 scales of quantized numbers come widened to float32.
Kernel = Callable[[Mapping[str, Array], Window, Params, str, Array], Counts]

# The array that holds a dtype's elements; BF16 and F16 as bits.
ELEMENTS: Mapping[str, np.dtype[Any]] = {
    "BF16": np.dtype(np.uint16),
    "F16": np.dtype(np.uint16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
# The bits of +Inf (what lies above is NaN), and all bits but the sign.
INFINITIES = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}
MAGNITUDES = {"BF16": 0x7FFF, "F16": 0x7FFF, "F32": 0x7FFFFFFF}

Pair = tuple[int, int]
Triple = tuple[int, int, int]

# Arrays accept every array of the element type, read-only and unaligned ones too, so that one
# signature is enough.
INT = nb.int64
PAIR = nb.UniTuple(INT, 2)
TRIPLE = nb.UniTuple(INT, 3)
BYTES_IN = nb.Array(nb.uint8, 1, "C", readonly=True, aligned=False)
TABLE = nb.Array(nb.uint32, 1, "C", readonly=True, aligned=False)
FLOATS_IN = nb.Array(nb.float32, 1, "C", readonly=True, aligned=False)
BYTES_OUT = nb.Array(nb.uint8, 1, "C", aligned=False)
FLOATS_OUT = nb.Array(nb.float32, 1, "C", aligned=False)


class Rows(NamedTuple):
    """A matrix as flat uint8 memory: row r begins at byte r * pitch.

    `touching`: no bytes lie between the rows.
    """

    memory: npt.NDArray[np.uint8]
    pitch: int
    touching: bool


def is_row_contiguous(array: Array) -> bool:
    """Return whether the last axis of a 2-D array is contiguous and its rows go forward."""
    rows, cols = array.shape
    return not array.size or (
        (cols < 2 or array.strides[1] == array.itemsize)
        and (rows < 2 or array.strides[0] >= cols * array.itemsize)
    )


def rows_of(array: Array) -> Rows:
    """Return the memory of a row-contiguous 2-D array, from its first to its last byte."""
    rows, cols = array.shape
    nbytes = cols * array.itemsize  # of one row
    if not rows or not cols:
        return Rows(np.empty(0, np.uint8), 0, True)
    if array.flags.c_contiguous:  # the usual case, in a third of the time
        return Rows(array.reshape(-1).view(np.uint8), nbytes, True)
    pitch = array.strides[0] if rows > 1 else nbytes
    first = array[:1, :1].view(np.uint8)[0]
    memory = np.lib.stride_tricks.as_strided(first, ((rows - 1) * pitch + nbytes,), (1,))
    return Rows(memory, pitch, pitch == nbytes)


def check_array(name: str, array: Array, dtype: np.dtype[Any], shape: tuple[int, int]) -> None:
    """Raise ShapeMismatch unless `array` is a row-contiguous [rows, cols] of `dtype`.

    Compiled functions do not check bounds: what passes here is what they may touch.
    """
    right = array.dtype.itemsize == dtype.itemsize and array.shape == shape
    if not right or not is_row_contiguous(array):
        raise ShapeMismatch(
            f"{name} is {array.dtype} {array.shape} with strides {array.strides}, "
            f"not {dtype} {shape} with contiguous rows",
            hint="pass the elements of exactly the decoded window",
        )
