"""The NF4 kernel for GPUs: codes under every kind of scale, blocks that cross rows, any window."""

from __future__ import annotations

import pytest

from moeconv.codecs.base import Window
from tests.kernels.gpu_oracle import check, check_numbers
from tests.kernels.nf4_parts import TABLES, Nested, every_pair, made


def test_every_code_under_every_kind_of_scale() -> None:
    check_numbers("nf4", *every_pair())


@pytest.mark.parametrize("name", TABLES)
def test_any_table(name: str) -> None:
    check_numbers("nf4", *every_pair(TABLES[name]))


@pytest.mark.parametrize("nested", [None, Nested(256), Nested(3, -1.0)])
@pytest.mark.parametrize("blocksize", [64, 4096, 24, 7])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (7, 33), (64, 64), (33, 258), (40, 96)])
def test_shapes(size: tuple[int, int], blocksize: int, nested: Nested | None) -> None:
    check("nf4", *made(size, blocksize, nested, 0.02))


@pytest.mark.parametrize("cols", [320, 321])
@pytest.mark.parametrize(
    "window", [(3, 17, 64, 240), (0, 20, 1, 320), (5, 6, 7, 8), (2, 20, 0, 96)]
)
def test_windows(window: tuple[int, int, int, int], cols: int) -> None:
    """Parts are whole, whatever the window."""
    check("nf4", *made((20, cols), 64, Nested(16), 0.02), window=Window(*window))
