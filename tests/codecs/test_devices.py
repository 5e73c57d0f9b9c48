"""The reference decodes where its parts are: it makes no tensor without saying on which device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from moeconv.codecs import CODECS
from moeconv.codecs.base import Window
from moeconv.measure.cases import Tile, cases
from moeconv.types import Params

TILE = Tile(32, 256)
MAKERS = (torch.arange, torch.empty, torch.full, torch.ones, torch.tensor, torch.zeros)
Weight = tuple[str, dict[str, torch.Tensor], Params]


class Explicit(TorchFunctionMode):
    """Refuses to make a tensor on the device that happens to be the default."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        assert func not in MAKERS or "device" in (kwargs or {}), f"{func.__name__} without a device"
        return func(*args, **(kwargs or {}))


def weights() -> Iterator[Weight]:
    for case in cases(TILE):
        if case.kernel == "ggml":  # numpy's, whose values are moved as one
            continue
        parts = {
            part: torch.from_numpy(array)
            for part, array in case.parts.items()
            if array.dtype != np.uint16
        }
        if parts:
            yield case.kernel, parts, case.params
    nested: Params = {
        "rows": 32, "cols": 256, "blocksize": 64, "nested_blocksize": 16, "nested_offset": 0.5
    }  # fmt: skip
    flat = {
        "weight": torch.zeros(32 * 128, 1, dtype=torch.uint8),
        "weight.absmax": torch.zeros(1, 128, dtype=torch.uint8),
        "weight.quant_map": torch.ones(1, 16),
        "weight.nested_absmax": torch.ones(1, 8),
        "weight.nested_quant_map": torch.ones(1, 256),
    }
    yield "nf4", flat, nested
    grid = {"weight": torch.ones(4, 8)}
    yield "repeated", grid, {"dtype": "F32", "rows": 8, "cols": 32}
    yield "raw", {"weight": torch.ones(32, 256, dtype=torch.int32)}, {"dtype": "I32"}


@pytest.mark.parametrize(("codec", "parts", "params"), tuple(weights()))
def test_every_tensor_is_made_on_the_device_of_the_parts(
    codec: str, parts: dict[str, torch.Tensor], params: Params
) -> None:
    with Explicit():
        values = CODECS[codec].decode(parts, Window(0, TILE.rows, 0, TILE.cols), params)
    assert values.shape == TILE


def test_a_tensor_without_a_device_is_found() -> None:
    with Explicit(), pytest.raises(AssertionError, match="arange"):
        torch.arange(3)
