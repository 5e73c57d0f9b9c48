"""Disks are measured with files that are gone afterwards, and refused where that cannot work."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from moeconv.errors import IOFailed, Refused
from moeconv.measure import disk
from moeconv.measure.disk import Effort
from moeconv.store import space, system
from tests.store.faults import fail_nth


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


EFFORT = Effort(nbytes=1 << 20, seconds=5.0, repeats=1, threads=2)


def test_writes_leave_nothing(tmp_path: Path) -> None:
    rates, direct = disk.measure_writes(tmp_path, EFFORT)
    assert rates.one > 0 and rates.all > 0
    assert isinstance(direct, bool)
    assert not list(tmp_path.iterdir())


def test_plain_writes_where_nothing_else_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "DIRECT_FLAG", 0)
    rates, direct = disk.measure_writes(tmp_path, EFFORT)
    assert rates.one > 0 and not direct


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("sizes", [(3 << 20,), (20 << 20, 9 << 20), (100,)])
def test_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...], direct: bool
) -> None:
    if not direct:
        monkeypatch.setattr(system, "DIRECT_FLAG", 0)
    paths = [tmp_path / str(at) for at in range(len(sizes))]
    for path, nbytes in zip(paths, sizes, strict=True):
        path.write_bytes(bytes(nbytes))
    before = open_files()
    rates, past = disk.measure_reads(paths, EFFORT._replace(nbytes=32 << 20))
    assert rates.one > 0 and rates.all > 0
    assert past <= direct
    assert open_files() == before


def test_the_made_file_has_its_bytes(tmp_path: Path) -> None:
    path = disk.made_file(tmp_path, EFFORT)
    assert path.stat().st_size == EFFORT.nbytes and any(path.read_bytes())


def test_a_slow_disk_is_not_written_to_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    real = disk.OutputFile.write

    def write(self: disk.OutputFile, offset: int, data: disk.Bytes) -> None:
        written.append(offset)
        real(self, offset, data)

    monkeypatch.setattr(disk.OutputFile, "write", write)
    effort = Effort(nbytes=64 << 20, seconds=0.0, repeats=1, threads=2)
    disk.measure_writes(tmp_path, effort)
    assert len(written) == 1 + 2  # a block per thread


def test_a_workplace_is_removed_whatever_happens(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), disk.workplace(tmp_path, EFFORT) as place:
        assert place.parent == tmp_path
        (place / "file").write_bytes(b"1")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_no_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space, "free_bytes", lambda path: 1 << 20)
    with pytest.raises(Refused, match="not enough disk space"), disk.workplace(tmp_path, EFFORT):
        pass


@pytest.mark.parametrize("call", ["fallocate", "pwrite"])
def test_a_disk_that_fills_up_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    fail_nth(monkeypatch, call, 1, errno.ENOSPC)
    with pytest.raises(Refused, match="No space left") as caught:
        disk.measure_writes(tmp_path, EFFORT)
    assert "--dst" in caught.value.hint
    assert not list(tmp_path.glob("*.partial")) or call == "fallocate"


def test_a_broken_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_nth(monkeypatch, "pwrite", 1, errno.EIO)
    with pytest.raises(IOFailed, match="cannot write"):
        disk.measure_writes(tmp_path, EFFORT)


def test_a_directory_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object, **_options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    refused = pytest.raises(Refused, match="Permission denied")
    with refused as caught, disk.workplace(tmp_path, EFFORT):
        pass
    assert str(tmp_path) in caught.value.where and "--dst" in caught.value.hint


def test_names_of_disks(tmp_path: Path) -> None:
    assert disk.nearest_directory(tmp_path / "a" / "b") == tmp_path
    (tmp_path / "file").write_bytes(b"")
    same = {disk.disk_id(tmp_path / name) for name in ("", "a/b", "file")}
    assert len(same) == 1 and same != {disk.disk_id(Path("/proc"))}


def test_what_the_page_cache_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / "a", tmp_path / "b", tmp_path / "empty"]
    for path, nbytes in zip(paths, (4096, 3 * 4096, 0), strict=True):
        path.write_bytes(bytes(nbytes))
    monkeypatch.setattr(system, "cached_nbytes", lambda descriptor, at, nbytes: nbytes % 12288)
    assert disk.cached_share(paths) == 0.25
    assert disk.cached_share([]) == 0.0
    fail_nth(monkeypatch, "cached_nbytes", 1, errno.ENOSYS)
    assert disk.cached_share(paths) == 0.0


def test_reading_past_the_page_cache_leaves_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = disk.made_file(tmp_path, EFFORT)
    dropped = fail_nth(monkeypatch, "drop_pages", 0)
    _, direct = disk.measure_reads([path], EFFORT)
    assert (dropped.calls == 0) == direct
