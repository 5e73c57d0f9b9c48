from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeconv.errors import IOFailed
from moeconv.store import cached, system
from moeconv.store.buffers import PAGE_NBYTES, Bytes, aligned
from moeconv.store.writer import OutputFile
from tests.store.faults import failing, is_direct, junk

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture(params=["disk", "tmpfs"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "disk":
        yield tmp_path
        return
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK):
        pytest.skip("no writable /dev/shm")
    path = shm / f"moeconv-{os.getpid()}-{tmp_path.name}"
    path.mkdir()
    yield path
    for child in path.iterdir():
        child.unlink()
    path.rmdir()


def no_direct(patch: pytest.MonkeyPatch, how: str) -> None:
    """Take direct I/O away: refused at open, at the first write, when asked, or by the platform."""
    real_open, real_pwrite = system.open_file, system.pwrite

    def open_file(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & system.DIRECT_FLAG:
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return real_open(path, flags, mode)

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        if is_direct(fd):
            raise OSError(errno.EINVAL, "wants other alignment")
        return real_pwrite(fd, data, offset)

    if how == "open":
        patch.setattr(system, "open_file", open_file)
    elif how == "write":
        patch.setattr(system, "pwrite", pwrite)
    elif how == "told":
        patch.setattr(system, "direct_units", lambda _: (0, 0))
    else:
        patch.setattr(system, "DIRECT_FLAG", 0)


def in_threads(jobs: list[Callable[[], None]]) -> None:
    failures: list[Exception] = []

    def run(job: Callable[[], None]) -> None:
        try:
            job()
        except (OSError, IOFailed) as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def write_cut(output: OutputFile, data: Bytes, cuts: list[int], thread_count: int) -> None:
    """Write `data` in ranges that meet at `cuts`, neighbours in different threads at once."""
    edges = sorted({0, data.size, *cuts})
    ranges = list(itertools.pairwise(edges))
    start = threading.Barrier(thread_count)

    def job(mine: list[tuple[int, int]]) -> Callable[[], None]:
        def run() -> None:
            start.wait()
            for low, high in mine:
                output.write(low, data[low:high])

        return run

    in_threads([job(ranges[k::thread_count]) for k in range(thread_count)])


WAYS = ("direct", "open", "write", "told", "platform", "asked")


@pytest.mark.parametrize("way", WAYS)
def test_neighbours_that_share_pages(
    folder: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    if way not in ("direct", "asked"):
        no_direct(monkeypatch, way)
    data = junk(6 * MIB + 1234)
    rng = np.random.default_rng(5)
    # w13 % 4096 = 2048, as an expert's fill at TP=8; and any byte.
    cuts = [*range(2048, data.size, 70 * KIB + 2048), *rng.integers(0, data.size, 60).tolist()]
    with OutputFile(folder / "a.bin", data.size, direct=way != "asked") as output:
        write_cut(output, data, cuts, thread_count=8)
        assert output.direct <= (way == "direct")
        output.sync()
        output.commit()
    assert (folder / "a.bin").read_bytes() == data.tobytes()
    assert not output.partial.exists()


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.integers(0, MIB + 77), max_size=12), st.integers(0, 4095), st.booleans())
def test_any_cuts_from_any_address(
    tmp_path: Path, cuts: list[int], phase: int, direct: bool
) -> None:
    data = aligned(MIB + 77, phase)
    data[:] = junk(data.size)
    with OutputFile(tmp_path / "a.bin", data.size, direct=direct) as output:
        write_cut(output, data, cuts, thread_count=3)
        output.commit()
    assert (tmp_path / "a.bin").read_bytes() == data.tobytes()


CALLS = (  # offset, length, address modulo a page -> (direct, nbytes) of each call, in order
    (0, 64 * KIB, 0, [(True, 64 * KIB)]),
    (0, 64 * KIB - 1, 0, [(False, 64 * KIB - 1)]),
    (4096, 128 * KIB, 16, [(True, 128 * KIB)]),
    (100, 128 * KIB, 100, [(False, 3996), (True, 124 * KIB), (False, 100)]),
    (100, 66 * KIB, 100, [(False, 66 * KIB)]),
    (4096, 3 * MIB + 5, 1, [(True, 2 * MIB), (True, MIB), (False, 5)]),
    (4096, 3 * MIB + 5, 0, [(True, 3 * MIB), (False, 5)]),
)


@pytest.mark.parametrize(("offset", "nbytes", "phase", "expected"), CALLS)
def test_whole_pages_go_direct_and_partial_ones_through_the_cache(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    offset: int,
    nbytes: int,
    phase: int,
    expected: list[tuple[bool, int]],
) -> None:
    calls = []
    real = system.pwrite

    def pwrite(fd: int, data: memoryview, at: int) -> int:
        direct = is_direct(fd)
        where = np.frombuffer(data, np.uint8).__array_interface__["data"][0]
        assert not direct or {x % PAGE_NBYTES for x in (at, len(data), where)} == {0}
        calls.append((direct, len(data)))
        return real(fd, data, at)

    with OutputFile(tmp_path / "a.bin", 4 * MIB) as output:
        if not output.direct:
            pytest.skip("this file system has no O_DIRECT")
        monkeypatch.setattr(system, "pwrite", pwrite)
        output.write(offset, aligned(nbytes, phase))
    assert calls == expected


def test_bytes_of_any_kind_and_none(tmp_path: Path) -> None:
    with OutputFile(tmp_path / "a.bin", 20) as output:
        output.write(0, memoryview(b"01234"))
        output.write(5, np.frombuffer(b"56789", np.uint8))
        output.write(10, np.frombuffer(b"abcdefghij", np.uint8).reshape(2, 5))
        output.write(20, memoryview(b""))
        output.write(20, np.empty(0, np.uint8))
        for offset, nbytes in ((-1, 1), (20, 1), (19, 2)):
            with pytest.raises(ValueError, match="outside"):
                output.write(offset, aligned(nbytes))
        output.commit()
    assert (tmp_path / "a.bin").read_bytes() == b"0123456789abcdefghij"


def test_the_plain_path_keeps_dirty_pages_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cached, "PIECE_NBYTES", MIB)
    monkeypatch.setattr(cached, "DIRTY_NBYTES", 3 * MIB)
    dirty: dict[int, int] = {}
    peak = []

    def start(_fd: int, offset: int, nbytes: int) -> None:
        dirty[offset] = nbytes
        peak.append(sum(dirty.values()))

    monkeypatch.setattr(system, "start_writeback", start)
    monkeypatch.setattr(system, "await_writeback", lambda _fd, offset, _nbytes: dirty.pop(offset))
    with OutputFile(tmp_path / "a.bin", 12 * MIB, direct=False) as output:
        for turn in range(6):
            output.write(turn * 2 * MIB, aligned(2 * MIB))
    assert len(peak) == 12
    assert max(peak) == 4 * MIB
    assert sum(dirty.values()) == 3 * MIB


@pytest.mark.parametrize("name", ["start_writeback", "await_writeback"])
def test_without_sync_file_range_it_still_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(cached, "DIRTY_NBYTES", 128 * KIB)
    monkeypatch.setattr(system, name, failing(errno.ENOSYS))
    with OutputFile(tmp_path / "a.bin", MIB, direct=False) as output:
        for offset in range(0, MIB, 128 * KIB):
            output.write(offset, junk(MIB)[offset : offset + 128 * KIB])
        output.commit()
    assert (tmp_path / "a.bin").read_bytes() == junk(MIB).tobytes()


def test_both_descriptors_are_made_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems keep what was written per descriptor."""
    synced: list[bool] = []
    real_data, real_file = system.sync_data, system.sync_file
    monkeypatch.setattr(
        system, "sync_data", lambda fd: (synced.append(is_direct(fd)), real_data(fd))
    )
    monkeypatch.setattr(
        system, "sync_file", lambda fd: (synced.append(is_direct(fd)), real_file(fd))
    )
    with OutputFile(tmp_path / "a", 4 * MIB) as output:
        if not output.direct:
            pytest.skip("this file system has nothing that goes past the page cache")
        output.write(0, junk(4 * MIB))
        for make_durable in (output.sync, output.commit):
            synced.clear()
            make_durable()
            assert synced[:2] == [False, True]
