"""What the tests of decoding kernels share: the readable reference of a codec, rounded by torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch

from moeconv import strips
from moeconv.codecs import CODECS
from moeconv.codecs.base import Window, part_slice
from moeconv.decoding import decode_window
from moeconv.kernels.cpu import KERNELS, TURNED_KERNELS, Counts
from moeconv.parts import NUMPY_DTYPES
from moeconv.types import Params, TensorRef, Weight
from tests.codecs.float_oracles import DTYPE_NAMES, ref, weight_of

Tensors = Mapping[str, torch.Tensor]
OUTPUTS = {
    "BF16": (np.uint16, torch.bfloat16, 0x7FC0),
    "F16": (np.uint16, torch.float16, 0x7E00),
    "F32": (np.float32, torch.float32, 0x7FC00000),
}
PADDING = 7  # what lies beside the output's rows


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Return the elements as they are read from a file."""
    dtype = np.dtype(NUMPY_DTYPES.get(DTYPE_NAMES.get(tensor.dtype, "I64"), np.uint8))
    return (
        tensor.contiguous().reshape(-1).view(torch.uint8).numpy().view(dtype).reshape(tensor.shape)
    )


def headers(tensors: Tensors) -> dict[str, TensorRef]:
    return {
        part: ref(part, DTYPE_NAMES.get(tensor.dtype, "I64"), tuple(tensor.shape))
        for part, tensor in tensors.items()
    }


def rounded(values: torch.Tensor, dtype: str) -> tuple[np.ndarray, Counts]:
    """Return the bits, NaN canonical, and the counts of float32 values."""
    _, kind, nan = OUTPUTS[dtype]
    given = values.contiguous().to(kind)
    bits = given.view(torch.int32 if dtype == "F32" else torch.int16).numpy()
    bits = bits.view(f"u{bits.itemsize}").copy()
    bits[values.isnan().numpy()] = nan
    overflow = values.isfinite() & given.isinf()
    kinds = (values.isnan(), values.isinf(), overflow)
    return bits, Counts(*(int(kind.sum()) for kind in kinds))


def slices(weight: Weight, tensors: Tensors, window: Window) -> dict[str, torch.Tensor]:
    """Return what a block-aligned window needs of the parts, [major, minor] as stored."""
    found = {}
    for part, tile in CODECS[weight.codec].tiles(weight.params).items():
        cut = part_slice(tile, window, weight)
        stored = tensors[part].contiguous().reshape(cut.extent)
        stored = stored[cut.major.start : cut.major.stop, cut.minor.start : cut.minor.stop]
        found[part] = stored.contiguous()
    return found


def decode(
    weight: Weight, parts: Tensors, window: Window, dtype: str, pad: int = 3
) -> tuple[np.ndarray, Counts]:
    """Return the bits and counts that the kernel gives; its rows lie `pad` elements apart."""
    kernels = TURNED_KERNELS if weight.transposed else KERNELS
    assert weight.codec in kernels
    wide = np.full((window.rows, window.cols + pad), PADDING, OUTPUTS[dtype][0])
    out = wide[:, : window.cols]
    given = {part: as_numpy(tensor) for part, tensor in parts.items()}
    for array in given.values():
        array.flags.writeable = False
    with single_blocks():
        counts = decode_window(weight, given, window, dtype, out)
    assert (wide[:, window.cols :] == PADDING).all()
    bits = np.ascontiguousarray(out).view(f"u{out.itemsize}")
    check_columns(weight, given, window, dtype, (bits, counts))
    return bits, counts


def single_blocks() -> Any:
    """Let the strips of what has to be turned be single blocks."""
    return mock.patch.multiple(strips, TILE_NBYTES=1, FEWEST_LINES=1)


def check_columns(
    weight: Weight,
    parts: Mapping[str, np.ndarray],
    window: Window,
    dtype: str,
    wanted: tuple[np.ndarray, Counts],
) -> None:
    """Decode the same to an output that runs along columns."""
    bits, counts = wanted
    wide = np.full((window.cols, window.rows + 3), PADDING, OUTPUTS[dtype][0])
    out = wide[:, : window.rows].T
    with single_blocks():
        assert decode_window(weight, parts, window, dtype, out) == counts
    assert (wide[:, window.rows :] == PADDING).all()
    np.testing.assert_array_equal(np.ascontiguousarray(out).view(bits.dtype), bits)


def run(codec: str, parts: Tensors, params: Params, dtype: str, shape: tuple[int, int]) -> Counts:
    """Decode a window [R, C] from its parts, which may not be those; return what was counted."""
    given = {part: as_numpy(tensor) for part, tensor in parts.items()}
    out = np.empty(shape, OUTPUTS[dtype][0])
    return KERNELS[codec](given, Window(0, shape[0], 0, shape[1]), params, dtype, out)


Decode = Callable[[Weight, Tensors, Window, str], tuple[np.ndarray, Counts]]


def check(
    codec: str,
    tensors: Tensors,
    params: Params,
    *,
    window: Window | None = None,
    dtypes: tuple[str, ...] = tuple(OUTPUTS),
    transposed: bool = False,
    decode: Decode = decode,
) -> None:
    """Compare every bit and count of a window (of all by default) with the reference's."""
    weight = weight_of(CODECS[codec], params, headers(tensors), transposed)
    window = window or Window(0, weight.rows, 0, weight.cols)
    parts = slices(weight, tensors, window)
    turned = {part: stored.T.contiguous() for part, stored in parts.items()}
    values = CODECS[codec].decode(turned if transposed else parts, window, params)
    for dtype in dtypes:
        wanted, wanted_counts = rounded(values, dtype)
        bits, counts = decode(weight, parts, window, dtype)
        wrong = np.argwhere(bits != wanted)[:5].tolist()
        assert [(at, hex(bits[*at]), hex(wanted[*at])) for at in wrong] == [], dtype
        assert counts == wanted_counts, dtype


class Side(NamedTuple):
    """How tests run the kernels of the CPU, or those of a GPU."""

    check: Callable[..., None]
    check_numbers: Callable[..., None]  # in one order of the output: numbers are the same in all
    run: Callable[[str, Tensors, Params, str, tuple[int, int]], Counts]


SIDE = Side(check, check, run)
