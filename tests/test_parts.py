"""Parts of a window, read: how many requests they take, and where in memory they come to lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeconv.parts import PartRead, read_parts
from moeconv.store.buffers import PAGE_NBYTES, BufferPool, address
from moeconv.store.reader import Reader
from moeconv.types import TensorRef

CONTENT = np.random.default_rng(0).integers(0, 256, 40_000, dtype=np.uint8)
# What lies in each file: the part, its dtype, where it begins, [rows, bytes per row].
PARTS = (
    ("codes", "U8", "a", 1234, (100, 64)),
    ("scales", "BF16", "a", 1234 + 6400, (100, 4)),
    ("zeros", "I32", "b", 4, (10, 8)),
)


def read(part: str, dtype: str, file: str, offset: int, shape: tuple[int, int]) -> PartRead:
    rows, pitch = shape
    ref = TensorRef(part, dtype, shape, file, offset, rows * pitch)
    return PartRead(part, ref, offset, stride=pitch, run=pitch, runs=rows)


READS = tuple(read(*one) for one in PARTS)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    found = {name: tmp_path / name for name in "ab"}
    for path in found.values():
        path.write_bytes(CONTENT.tobytes())
    return found


def test_parts_of_a_file_are_one_request(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, list[int]]] = []
    read_ranges = Reader.read_ranges

    def watched(reader: Reader, file: str, ranges: Any) -> None:
        asked.append((file, [offset for offset, _ in ranges]))
        read_ranges(reader, file, ranges)

    monkeypatch.setattr(Reader, "read_ranges", watched)
    with Reader(files) as reader:
        parts, _ = read_parts(reader, BufferPool(0), READS)
    assert asked == [("a", [1234, 7634]), ("b", [4])]
    assert {part: found.dtype for part, found in parts.items()} == {
        "codes": np.uint8, "scales": np.uint16, "zeros": np.int32
    }  # fmt: skip
    for part, _, _, offset, (rows, pitch) in PARTS:
        wanted = CONTENT[offset : offset + rows * pitch].reshape(rows, pitch)
        np.testing.assert_array_equal(parts[part].view(np.uint8), wanted)


@pytest.mark.parametrize("phase", [None, 0, 64])
def test_parts_lie_as_in_their_file_or_where_it_is_asked(
    files: dict[str, Path], phase: int | None
) -> None:
    """Whole pages then come from the disk to their place."""
    with Reader(files) as reader:
        _, buffers = read_parts(reader, BufferPool(0), READS, phase)
    wanted = [offset if phase is None else phase for _, _, _, offset, _ in PARTS]
    assert [address(one.array) % PAGE_NBYTES for one in buffers] == [
        one % PAGE_NBYTES for one in wanted
    ]
