"""Ranges and runs of files, against slices of the same bytes in memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeconv.errors import BadSource, IOFailed
from moeconv.store import reader as module
from moeconv.store import strides
from moeconv.store.buffers import BufferPool, Bytes, pages
from moeconv.store.reader import Reader

NBYTES = 3 << 20
CONTENT = np.random.default_rng(7).integers(0, 256, NBYTES, dtype=np.uint8)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reader") / "a"
    path.write_bytes(CONTENT.tobytes())
    return path


@pytest.fixture
def source(path: Path) -> Iterator[Reader]:
    with Reader({"a": path, "none": path.parent / "none", "dir": path.parent}) as opened:
        yield opened


@pytest.mark.parametrize(
    ("offset", "nbytes"), [(0, 0), (0, 1), (5, 4096), (0, NBYTES), (NBYTES, 0)]
)
def test_read_into(source: Reader, offset: int, nbytes: int) -> None:
    buffer = np.zeros(nbytes, np.uint8)
    source.read_into("a", offset, buffer)
    assert np.array_equal(buffer, CONTENT[offset : offset + nbytes])
    assert source.nbytes_read == nbytes


def test_kinds_of_buffers(source: Reader) -> None:
    raw = bytearray(8)
    source.read_into("a", 1, raw)
    assert bytes(raw) == CONTENT[1:9].tobytes()
    source.read_into("a", 2, memoryview(raw)[4:])
    assert bytes(raw[4:]) == CONTENT[2:6].tobytes()
    matrix = np.zeros((3, 4), np.uint8)
    source.read_into("a", 3, matrix)
    assert matrix.tobytes() == CONTENT[3:15].tobytes()
    with pytest.raises(TypeError):
        source.read_into("a", 0, matrix[:, ::2])


def test_short_reads_are_continued(source: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv

    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        return preadv(fd, [buffers[0][:7]], offset)

    monkeypatch.setattr(module.os, "preadv", short)
    buffer = np.zeros(100, np.uint8)
    source.read_into("a", 11, buffer)
    assert np.array_equal(buffer, CONTENT[11:111])


def test_file_that_became_shorter(source: Reader) -> None:
    with pytest.raises(BadSource, match="changed while reading") as caught:
        source.read_into("a", NBYTES - 3, np.zeros(10, np.uint8))
    assert f"it ends at byte {NBYTES}" in caught.value.what
    assert caught.value.where == f"a, bytes [{NBYTES - 3}, {NBYTES + 7})"


def test_failing_disk(source: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(module.os, "preadv", broken)
    with pytest.raises(IOFailed, match="Input/output error") as caught:
        source.read_into("a", 64, np.zeros(16, np.uint8))
    assert caught.value.where == "a, bytes [64, 80)"


@pytest.mark.parametrize(("name", "words"), [("none", "missing"), ("dir", "directory")])
def test_files_that_cannot_be_opened(source: Reader, name: str, words: str) -> None:
    with pytest.raises(BadSource, match=words) as caught:
        source.read_into(name, 0, np.zeros(1, np.uint8))
    assert caught.value.where == name


def packed(offset: int, stride: int, run: int, count: int) -> bytes:
    starts = range(offset, offset + stride * count, stride)
    return b"".join(CONTENT[start : start + run].tobytes() for start in starts[:count])


@pytest.mark.parametrize(
    ("runs", "reads"),
    [
        ((3, 8, 8, 100), 1),  # no gaps
        ((3, 9, 8, 100), 1),  # small gaps
        ((3, 4000, 10, 100), 1),  # large gaps, a small span
        ((3, 200_000, 10, 14), 14),  # large gaps, a large span
        ((3, 200_000, 60_000, 14), 1),  # the gaps cost less than the calls
        ((3, 4106, 10, 600), 1),  # gaps of a page cost nothing, however little is wanted
        ((3, 4107, 10, 600), 600),
        ((0, 1, 1, 1), 1),
        ((NBYTES - 8, 100, 8, 1), 1),  # ends with the file: nothing beyond the last run is read
        ((NBYTES - 108, 100, 8, 2), 1),
        ((0, 3000, 0, 5), 0),
        ((0, 3000, 7, 0), 0),
    ],
)
def test_read_strided(
    source: Reader, monkeypatch: pytest.MonkeyPatch, runs: tuple[int, int, int, int], reads: int
) -> None:
    offset, stride, run, count = runs
    calls: list[int] = []
    preadv = os.preadv

    def counted(fd: int, buffers: list[memoryview], at: int) -> int:
        calls.append(at)
        return preadv(fd, buffers, at)

    monkeypatch.setattr(module.os, "preadv", counted)
    buffer = np.zeros(run * count, np.uint8)
    source.read_strided("a", offset, stride, run, count, buffer)
    assert buffer.tobytes() == packed(offset, stride, run, count)
    assert len(calls) == reads


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    offset=st.integers(0, 1000),
    run=st.integers(1, 300),
    gap=st.integers(0, 2000),
    count=st.integers(1, 60),
    chunk=st.integers(1, 4000),
)
def test_read_strided_in_chunks(
    source: Reader, offset: int, run: int, gap: int, count: int, chunk: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strides, "CHUNK_NBYTES", chunk)
        patch.setattr(strides, "SMALL_SPAN_NBYTES", 10 * chunk)
        patch.setattr(strides, "GAP_NBYTES", 300)
        buffer = np.zeros(run * count, np.uint8)
        source.read_strided("a", offset, run + gap, run, count, buffer)
    assert buffer.tobytes() == packed(offset, run + gap, run, count)


def test_chunks_are_bounded(source: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strides, "CHUNK_NBYTES", 1000)
    sizes: list[int] = []
    preadv = os.preadv

    def counted(fd: int, buffers: list[memoryview], at: int) -> int:
        sizes.append(len(buffers[0]))
        return preadv(fd, buffers, at)

    monkeypatch.setattr(module.os, "preadv", counted)
    source.read_strided("a", 0, 30, 20, 500, np.zeros(10_000, np.uint8))
    assert max(sizes) <= 1000
    assert len(sizes) == 16  # 33 runs of 30 bytes at a time
    assert source.nbytes_read == sum(sizes)


def test_strided_read_beyond_the_end(source: Reader) -> None:
    with pytest.raises(BadSource, match="changed while reading"):
        source.read_strided("a", NBYTES - 100, 60, 50, 2, np.zeros(100, np.uint8))


@pytest.mark.parametrize(
    ("stride", "run", "count", "nbytes"),
    [(4, 8, 2, 16), (8, 8, 2, 15), (8, -1, 2, 0), (8, 4, -1, 0)],
)
def test_strided_arguments(source: Reader, stride: int, run: int, count: int, nbytes: int) -> None:
    with pytest.raises(ValueError, match="runs of"):
        source.read_strided("a", 0, stride, run, count, np.zeros(nbytes, np.uint8))


def test_page_cache_is_advised(source: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int, int]] = []
    monkeypatch.setattr(module.os, "posix_fadvise", lambda fd, *rest: calls.append(rest))
    source.read_into("a", 0, np.zeros(9, np.uint8))
    assert calls == [(0, 0, os.POSIX_FADV_SEQUENTIAL)]


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_many_threads_share_one_descriptor(path: Path) -> None:
    before = open_files()
    wrong: list[int] = []
    barrier = threading.Barrier(8)
    with Reader({"a": path}) as source:

        def work(seed: int) -> None:
            barrier.wait()
            for offset in np.random.default_rng(seed).integers(0, NBYTES - 4096, 40):
                buffer = np.zeros(4096, np.uint8)
                source.read_into("a", int(offset), buffer)
                if not np.array_equal(buffer, CONTENT[offset : offset + 4096]):
                    wrong.append(int(offset))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert open_files() == before + 1
        assert source.nbytes_read == 8 * 40 * 4096
    assert not wrong
    assert open_files() == before


def test_closed_reader(path: Path) -> None:
    source = Reader({"a": path})
    source.read_into("a", 0, np.zeros(1, np.uint8))
    source.close()
    source.close()
    with pytest.raises(ValueError, match="closed"):
        source.read_into("a", 0, np.zeros(1, np.uint8))


def test_file_that_is_not_of_the_source(source: Reader) -> None:
    with pytest.raises(KeyError):
        source.read_into("b", 0, np.zeros(1, np.uint8))


def test_file_swapped_for_a_pipe(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    regular = path.stat()
    os.mkfifo(path.parent / "fifo")
    monkeypatch.setattr(Path, "stat", lambda _: regular)
    before = open_files()
    with (
        Reader({"fifo": path.parent / "fifo"}) as source,
        pytest.raises(BadSource, match="not a regular file"),
    ):
        source.read_into("fifo", 0, np.zeros(1, np.uint8))
    assert open_files() == before


def test_what_is_thrown_away_comes_from_the_pool(path: Path) -> None:
    """The gaps of runs and those between ranges: memory that is touched once, and kept."""
    made: list[int] = []

    def make(nbytes: int) -> Bytes:
        made.append(nbytes)
        return pages(nbytes)

    rows, near = np.zeros((300, 100), np.uint8), np.zeros((3, 40_000), np.uint8)
    places = [7, 41_000, 82_100]
    with Reader({"a": path}, BufferPool(1 << 20, make)) as source:
        for _ in range(3):
            source.read_strided("a", 11, 1000, 100, 300, rows)
            source.read_ranges("a", list(zip(places, near, strict=True)))
    wanted = [CONTENT[11 + at * 1000 :][:100] for at in range(300)]
    np.testing.assert_array_equal(rows, wanted)
    np.testing.assert_array_equal(near, [CONTENT[at:][:40_000] for at in places])
    assert sorted(made) == [64 << 10, 320 << 10]
