"""What the tests of GPU kernels share: run on a GPU where there is one, else interpreted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from moeconv.codecs.base import Window
from moeconv.kernels.cpu import Counts
from moeconv.kernels.gpu import kernel_of
from moeconv.kernels.gpu.base import OUT_DTYPES, Output
from moeconv.types import Params, Weight
from tests.kernels import oracle

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BYTES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)
PADDING = 7  # what lies beside the output
# Whether rows and columns of the output are turned, elements from one to the next, and how many lie
# between lines.
ORDERS = ((False, 1, 0), (False, 1, 3), (True, 1, 1), (True, 2, 0))


def on_device(tensor: torch.Tensor) -> torch.Tensor:
    """Return a part as kernels take it: one-byte floats as bytes, at an odd address."""
    stored = tensor.view(torch.uint8) if tensor.dtype in BYTES else tensor
    room = torch.zeros(stored.numel() + 1, dtype=stored.dtype, device=DEVICE)
    room[1:] = stored.reshape(-1).to(DEVICE)
    return room[1:].view(stored.shape)


def fill(
    codec: str, parts: oracle.Tensors, params: Params, dtype: str, bits: torch.Tensor
) -> Counts:
    """Fill bits [R, C] from the parts of just that window; return what the kernel counted."""
    kernel = kernel_of(codec)
    assert kernel is not None
    rows, cols = bits.shape
    counts = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    kernel(parts, Window(0, rows, 0, cols), params, Output(dtype, bits, counts))
    return Counts(*counts.tolist())


def run(
    codec: str, parts: oracle.Tensors, params: Params, dtype: str, shape: tuple[int, int]
) -> Counts:
    """Decode a window [R, C] from its parts, which may not be those; return what was counted."""
    given = {part: on_device(tensor) for part, tensor in parts.items()}
    return fill(codec, given, params, dtype, torch.empty(shape, dtype=OUT_DTYPES[dtype]).to(DEVICE))


def decode(
    weight: Weight,
    parts: oracle.Tensors,
    window: Window,
    dtype: str,
    orders: Sequence[tuple[bool, int, int]] = ORDERS,
) -> tuple[np.ndarray, Counts]:
    """Return the bits and counts that the kernel gives, the same in each of these orders."""
    kernel = kernel_of(weight.codec, turned=weight.transposed)
    assert kernel is not None
    given = {part: on_device(tensor) for part, tensor in parts.items()}
    stored = window.turned if weight.transposed else window
    found = []
    for turned, step, pad in orders:
        shape = (stored.cols, stored.rows) if turned else (stored.rows, stored.cols)
        room = torch.full((shape[0], shape[1] + pad, step), PADDING, dtype=OUT_DTYPES[dtype])
        wide = room.to(DEVICE)
        place = wide[:, : shape[1], 0]
        out = place.T if turned else place
        counts = torch.zeros(3, dtype=torch.int64, device=DEVICE)
        kernel(given, stored, weight.params, Output(dtype, out, counts))
        assert bool((wide[:, shape[1] :] == PADDING).all())
        assert bool((wide[..., 1:] == PADDING).all())
        bits = (out.T if weight.transposed else out).contiguous().cpu().numpy()
        found.append((bits.view(f"u{bits.itemsize}"), Counts(*counts.tolist())))
    for bits, counts in found[1:]:
        assert (bits == found[0][0]).all()
        assert counts == found[0][1]
    return found[0]


check = partial(oracle.check, decode=decode)
# For tests of numbers: where they go does not depend on what they are.
check_numbers = partial(oracle.check, decode=partial(decode, orders=ORDERS[1:2]))
SIDE = oracle.Side(check, check_numbers, run)
