"""Reading past the page cache: where it is chosen, what comes of it, and what takes its place."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeconv.errors import BadSource, IOFailed
from moeconv.store import direct, reader, system
from moeconv.store.buffers import PAGE_NBYTES, Bytes, aligned
from moeconv.store.reader import Reader
from tests.store.faults import failing, is_direct, junk

NBYTES = (3 << 20) + 1234
CONTENT = junk(NBYTES)
LARGE = 300 << 10


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a"
    path.write_bytes(CONTENT.tobytes())
    descriptor = direct.open_direct(path, os.O_RDONLY)
    if descriptor < 0:
        pytest.skip("this file system has nothing that goes past the page cache")
    os.close(descriptor)
    return path


@pytest.fixture
def source(path: Path) -> Iterator[Reader]:
    with Reader({"a": path}) as opened:
        yield opened


@pytest.fixture
def cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing seem to be in the page cache."""
    monkeypatch.setattr(direct, "is_cached", lambda *_: False)


class Calls:
    """The reads that were made: (past the cache, offset, bytes), each cut to `most` bytes."""

    def __init__(self, patch: pytest.MonkeyPatch, most: int = 1 << 30) -> None:
        self.made: list[tuple[bool, int, int]] = []
        self.fault: Callable[[int, int], None] = lambda fd, offset: None
        self._most = most
        self._real = os.preadv
        patch.setattr(reader.os, "preadv", self)

    def __call__(self, fd: int, buffers: Any, offset: int, *flags: int) -> int:
        self.fault(fd, offset)
        left, cut = self._most, []
        for one in buffers:
            if left:
                cut.append(one[:left])
                left -= len(cut[-1])
        got = self._real(fd, cut, offset, *flags)
        self.made.append((is_direct(fd), offset, got))
        return got


def wanted(offset: int, view: Bytes) -> bool:
    return bool(np.array_equal(view, CONTENT[offset : offset + view.size]))


@given(
    sizes=st.lists(
        st.tuples(st.integers(0, 9000), st.integers(1, 20_000), st.integers(0, 1)), min_size=1
    ),
    start=st.integers(0, 9000),
)
def test_pages_hold_the_ranges(sizes: list[tuple[int, int, int]], start: int) -> None:
    """Runs follow each other, whole pages, and every byte comes where it belongs."""
    at, ranges = start, []
    for gap, nbytes, odd in sizes:
        at += gap
        ranges.append((at, aligned(nbytes, at + odd)))
        at += nbytes
    runs = direct.pages_around(ranges)
    assert [run.stop for run in runs[:-1]] == [run.start for run in runs[1:]]
    file = np.random.default_rng(0).integers(0, 256, runs[-1].stop, dtype=np.uint8)
    aside = aligned(direct.aside_nbytes(runs))
    for run, view in zip(runs, direct.views_of(runs, aside), strict=True):
        assert run.start % PAGE_NBYTES == run.stop % PAGE_NBYTES == 0 < view.nbytes
        memory = np.frombuffer(view, np.uint8)
        assert memory.ctypes.data % PAGE_NBYTES == 0
        memory[:] = file[run.start : run.stop]
    for to, taken in direct.copies_from(runs, aside, ranges):
        to[:] = taken
    for offset, view in ranges:
        assert np.array_equal(view, file[offset : offset + view.size])


@pytest.mark.parametrize(("gap", "groups"), [(999, 1), (1000, 1), (1001, 2)])
def test_long_ranges_do_not_excuse_long_gaps(gap: int, groups: int) -> None:
    view = np.broadcast_to(np.uint8(0), 1 << 20)
    assert len(list(direct.near([(5, view), (5 + view.size + gap, view)], 1000))) == groups


def test_parts_begin_on_pages_but_for_the_first_of_a_range() -> None:
    """Else the page between two parts would be read for both."""
    ranges = [(4096 + 10, aligned(50_000, 11)), (80_000, aligned(9000, 5))]
    parts = list(direct.bounced(ranges, 4 * PAGE_NBYTES))
    starts = [4096 + 10, 20_480, 36_864, 53_248, 80_000]
    assert [[at for at, _ in part] for part in parts] == [[at] for at in starts]
    assert sum(view.size for part in parts for _, view in part) == 59_000


@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize("offset", [0, 1, 4096, 5000, NBYTES - LARGE])
@pytest.mark.parametrize("bounce", [16 << 10, 2 << 20])
def test_large_ranges_go_past_the_cache(
    source: Reader, cold: None, monkeypatch: pytest.MonkeyPatch, odd: int, offset: int, bounce: int
) -> None:
    """In one request where the address is congruent, else through a small buffer."""
    monkeypatch.setattr(reader, "BOUNCE_NBYTES", bounce)
    calls = Calls(monkeypatch)
    buffer = aligned(LARGE, offset + odd)
    source.read_into("a", offset, buffer)
    assert wanted(offset, buffer)
    assert all(past for past, _, _ in calls.made)
    assert len(calls.made) == (-(-(offset % 4096 + LARGE) // bounce) if odd else 1)
    assert source.nbytes_read >= LARGE - offset % 4096


def test_what_is_cached_comes_from_the_cache(
    source: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the file was just written."""
    calls = Calls(monkeypatch)
    buffer = np.zeros(LARGE, np.uint8)
    source.read_into("a", 5, buffer)
    assert wanted(5, buffer)
    assert [one for one in calls.made if one[2] > 1] == [(False, 5, LARGE)]


def test_what_is_read_past_the_cache_is_not_in_it_after(path: Path, source: Reader) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        system.drop_pages(descriptor, 0, 0)
        if direct.is_cached(descriptor, 0, NBYTES) is not False:
            pytest.skip("the page cache keeps what it was asked to drop")
        source.read_into("a", 0, aligned(NBYTES))
        assert direct.is_cached(descriptor, 0, NBYTES) is False
        descriptor_read = os.pread(descriptor, NBYTES, 0)
        assert direct.is_cached(descriptor, 0, NBYTES) is True
        assert descriptor_read == CONTENT.tobytes()
    finally:
        os.close(descriptor)


def test_small_ranges_go_through_the_cache(
    source: Reader, cold: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch)
    source.read_into("a", 0, aligned(100 << 10))
    assert calls.made == [(False, 0, 100 << 10)]


@pytest.mark.parametrize("seems", [True, False])
@pytest.mark.parametrize(("gap", "requests"), [(0, 1), (19_000, 1), (20_000, 2), (70_000, 2)])
def test_near_ranges_are_one_request(
    source: Reader, monkeypatch: pytest.MonkeyPatch, seems: bool, gap: int, requests: int
) -> None:
    monkeypatch.setattr(direct, "is_cached", lambda *_: seems)
    calls = Calls(monkeypatch)
    second = 777 + LARGE + gap
    ranges = [(second, aligned(LARGE, second)), (777, aligned(LARGE, 777)), (9, aligned(0))]
    source.read_ranges("a", ranges)
    assert all(wanted(*one) for one in ranges)
    assert [past for past, _, _ in calls.made] == [not seems] * requests
    read = 2 * LARGE + (gap if requests == 1 else 0)  # the gap is read, too
    assert source.nbytes_read == read


def test_short_reads_past_the_cache_are_continued(
    source: Reader, cold: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch, most=64 << 10)
    ranges = [(5000, aligned(LARGE, 5000)), (5000 + LARGE, aligned(LARGE, 5000 + LARGE))]
    source.read_ranges("a", ranges)
    assert all(wanted(*one) for one in ranges)
    assert len(calls.made) == 10
    assert all(past for past, _, _ in calls.made)


@pytest.mark.parametrize("beyond", [10, 60_000])
@pytest.mark.parametrize("odd", [0, 1])
def test_file_that_became_shorter(
    source: Reader, cold: None, monkeypatch: pytest.MonkeyPatch, odd: int, beyond: int
) -> None:
    monkeypatch.setattr(reader, "BOUNCE_NBYTES", 16 << 10)  # parts that lie beyond the end
    at = NBYTES - LARGE
    with pytest.raises(BadSource, match=rf"it ends at byte {NBYTES}\b") as caught:
        source.read_into("a", at, aligned(LARGE + beyond, at + odd))
    assert source.nbytes_read == LARGE
    assert caught.value.where == f"a, bytes [{at}, {NBYTES + beyond})"
    with pytest.raises(BadSource, match="it ends at byte"):
        source.read_into("a", NBYTES + 5000, aligned(LARGE, NBYTES + 5000))


def test_failing_disk(source: Reader, cold: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader.os, "preadv", failing(errno.EIO))
    with pytest.raises(IOFailed, match="Input/output error") as caught:
        source.read_into("a", 64, aligned(LARGE, 64))
    assert caught.value.where == f"a, bytes [64, {64 + LARGE})"


@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize("after", [0, 1])
def test_refused_reads_go_through_the_cache(
    source: Reader, cold: None, monkeypatch: pytest.MonkeyPatch, odd: int, after: int
) -> None:
    """After none or one that went well; refused once, nothing is tried again."""
    calls, refused = Calls(monkeypatch, most=64 << 10), []

    def refuse(fd: int, offset: int) -> None:
        if is_direct(fd) and len(calls.made) >= after:
            refused.append(offset)
            raise OSError(errno.EINVAL, "Invalid argument")

    calls.fault = refuse
    dropped: list[tuple[int, int]] = []
    monkeypatch.setattr(system, "drop_pages", lambda fd, *rest: dropped.append(rest))
    for at in (4096, 5000):
        buffer = aligned(LARGE, at + odd)
        source.read_into("a", at, buffer)
        assert wanted(at, buffer)
    assert len(refused) == 1
    assert dropped == [(4096, LARGE), (5000, LARGE)]


def test_refused_descriptors_are_closed(
    path: Path, cold: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, refused = Calls(monkeypatch), []

    def refuse(fd: int, offset: int) -> None:
        if is_direct(fd):
            refused.append(fd)
            raise OSError(errno.EINVAL, "Invalid argument")

    calls.fault = refuse
    with Reader({"a": path}) as opened:
        opened.read_into("a", 0, aligned(LARGE))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(refused[0])


@pytest.mark.parametrize("units", [(0, 0), (8192, 512), (512, 8192)])
def test_file_systems_that_say_no(
    source: Reader, cold: None, monkeypatch: pytest.MonkeyPatch, units: tuple[int, int]
) -> None:
    monkeypatch.setattr(system, "direct_units", lambda _: units)
    calls = Calls(monkeypatch)
    source.read_into("a", 0, aligned(LARGE))
    assert calls.made == [(False, 0, LARGE)]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EACCES, errno.EMFILE])
def test_descriptors_that_are_refused(
    source: Reader, cold: None, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(system, "open_file", failing(code))
    calls = Calls(monkeypatch)
    source.read_into("a", 0, aligned(LARGE))
    assert calls.made == [(False, 0, LARGE)]


def test_another_file_of_that_name(
    path: Path, source: Reader, cold: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.read_into("a", 0, aligned(10))
    path.unlink()
    path.write_bytes(bytes(NBYTES))
    calls, buffer = Calls(monkeypatch), aligned(LARGE)
    source.read_into("a", 0, buffer)
    assert wanted(0, buffer)
    assert calls.made == [(False, 0, LARGE)]


def test_kernels_that_do_not_count_pages(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One page is then asked for without waiting; where that is unknown, nothing is known."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        assert direct.is_cached(descriptor, 0, NBYTES) is True
        assert direct.is_cached(descriptor, 0, 8 * NBYTES) is False
        monkeypatch.setattr(system, "cached_nbytes", failing(errno.ENOSYS))
        assert direct.is_cached(descriptor, 0, NBYTES) is True
        asked: list[int] = []
        monkeypatch.setattr(system, "read_cached", lambda fd, to, at: asked.append(at) or 1)
        assert direct.is_cached(descriptor, 1000, NBYTES - 1000) is True
        assert asked == [1000 + (NBYTES - 1000) // 2]
        monkeypatch.setattr(system, "read_cached", failing(errno.EAGAIN))
        assert direct.is_cached(descriptor, 0, NBYTES) is False
        monkeypatch.setattr(system, "read_cached", failing(errno.EOPNOTSUPP))
        assert direct.is_cached(descriptor, 0, NBYTES) is None
    finally:
        os.close(descriptor)


def test_units_are_asked_for(path: Path) -> None:
    """Where Linux tells (6.1 and later), it tells what is known of this file system."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        units = system.direct_units(descriptor)
    finally:
        os.close(descriptor)
    assert units is None or all(unit in (1, 4, 512, 4096) for unit in units)
