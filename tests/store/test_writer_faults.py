"""What the writer does on a disk that fails, is full or writes less than it was given."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moeconv.errors import IOFailed
from moeconv.store import system
from moeconv.store.writer import OutputFile, copy_file, partial_path, write_small_file
from tests.store.faults import fail_nth, failing, is_direct, junk

KIB, MIB = 1 << 10, 1 << 20
NBYTES = 300 * KIB + 123


def whole(final: Path) -> None:
    with OutputFile(final, NBYTES, resume=True) as output:
        data = junk(NBYTES)
        output.write(0, data[: 100 * KIB + 7])
        output.write(100 * KIB + 7, data[100 * KIB + 7 :])
        output.sync()
        output.commit()


def small(final: Path) -> None:
    write_small_file(final, junk(NBYTES).tobytes())


def copied(final: Path) -> None:
    source = final.with_name("source")
    source.write_bytes(junk(NBYTES).tobytes())
    copy_file(source, final)


JOBS = (whole, small, copied)
CALLS = ("open_file", "fallocate", "pwrite", "sync_data", "sync_file", "rename")


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("job", JOBS)
def test_each_call_failing_leaves_no_false_file_and_a_rerun_completes(
    tmp_path: Path, job: Callable[[Path], None], name: str, code: int
) -> None:
    final = tmp_path / "a.bin"
    with pytest.MonkeyPatch.context() as patch:
        counter = fail_nth(patch, name, 0)
        job(tmp_path / "count.bin")
    for position in range(1, counter.calls + 1):
        with pytest.MonkeyPatch.context() as patch:
            fail_nth(patch, name, position, code)
            with pytest.raises(IOFailed) as failure:
                job(final)
        assert str(partial_path(final)) in failure.value.where
        assert "same command continues" in failure.value.hint
        if final.exists():  # only the directory was not synced
            assert final.read_bytes() == junk(NBYTES).tobytes()
        job(final)
        assert final.read_bytes() == junk(NBYTES).tobytes()
        final.unlink()
    assert counter.calls > 0 or name == "sync_data"


def test_no_descriptor_leaks(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for name in ("fallocate", "pwrite", "sync_file", "rename"):
        for job in JOBS:
            with pytest.MonkeyPatch.context() as patch, pytest.raises(IOFailed):
                fail_nth(patch, name, 1)
                job(tmp_path / "a.bin")
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def short(limit: int) -> Callable[[int, memoryview, int], int]:
    real = os.pwrite

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        assert not is_direct(fd) or offset % 4096 == 0
        # A direct write stops at a sector, which is less than a page on most disks.
        return real(fd, data[: limit - limit % 512 if is_direct(fd) else limit], offset)

    return pwrite


@pytest.mark.parametrize("limit", [1021, 4096, 8192 + 512, 70_000])
@pytest.mark.parametrize("direct", [True, False])
def test_short_writes_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, direct: bool
) -> None:
    monkeypatch.setattr(system, "pwrite", short(limit))
    with OutputFile(tmp_path / "a.bin", NBYTES, direct=direct) as output:
        output.write(0, junk(NBYTES))
        output.commit()
    assert (tmp_path / "a.bin").read_bytes() == junk(NBYTES).tobytes()


def test_interrupted_calls_are_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, turns = os.pwrite, []

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        turns.append(offset)
        if len(turns) % 2:
            raise InterruptedError(errno.EINTR, "a signal")
        return real(fd, data, offset)

    monkeypatch.setattr(system, "pwrite", pwrite)
    with OutputFile(tmp_path / "a.bin", NBYTES) as output:
        output.write(0, junk(NBYTES))
        output.commit()
    assert len(turns) >= 4
    assert (tmp_path / "a.bin").read_bytes() == junk(NBYTES).tobytes()


def test_a_disk_that_writes_nothing_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "pwrite", lambda _fd, _data, _offset: 0)
    with OutputFile(tmp_path / "a.bin", NBYTES) as output, pytest.raises(IOFailed):
        output.write(0, junk(NBYTES))


def test_the_error_names_file_and_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with OutputFile(tmp_path / "a.bin", NBYTES) as output:
        monkeypatch.setattr(system, "pwrite", failing(errno.EIO))
        with pytest.raises(IOFailed, match="cannot write: Input/output error") as failure:
            output.write(5000, junk(200 * KIB))
    assert failure.value.where == f"{tmp_path / 'a.bin.partial'}, bytes 5000..{5000 + 200 * KIB}"
    assert failure.value.exit_code == 74


@pytest.mark.parametrize("name", ["start_writeback", "await_writeback"])
def test_an_error_of_write_back_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("moeconv.store.cached.DIRTY_NBYTES", 0)
    monkeypatch.setattr(system, name, failing(errno.EIO))
    with OutputFile(tmp_path / "a.bin", NBYTES, direct=False) as output, pytest.raises(IOFailed):
        output.write(0, junk(NBYTES))


def test_a_directory_that_cannot_be_synced_is_fine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "sync_file", _only_files)
    write_small_file(tmp_path / "new/a.json", b"{}")
    assert (tmp_path / "new/a.json").read_bytes() == b"{}"


def _only_files(fd: int) -> None:
    if os.path.isdir(f"/proc/self/fd/{fd}"):  # noqa: PTH112
        raise OSError(errno.EINVAL, "not for directories")
    os.fsync(fd)


def test_a_source_that_shrinks_or_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(IOFailed) as failure:
        copy_file(tmp_path / "none", tmp_path / "dst")
    assert failure.value.where == str(tmp_path / "none")
    source = tmp_path / "src"
    source.write_bytes(bytes(9 * MIB))
    real = os.pwrite

    def shrink(fd: int, data: memoryview, offset: int) -> int:
        os.truncate(source, MIB)
        return real(fd, data, offset)

    monkeypatch.setattr(system, "pwrite", shrink)
    with pytest.raises(IOFailed, match="shorter"):
        copy_file(source, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(IOFailed):
        OutputFile(tmp_path / "file/a.bin", 1)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a mounted file system of 4 MiB."""
    path = tmp_path / "small"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(path)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small tmpfs needs root")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_at_layout(full_disk: Path) -> None:
    with pytest.raises(IOFailed, match="No space left") as failure:
        OutputFile(full_disk / "a.bin", 6 * MIB)
    assert f"free at least {2 * MIB:,} bytes" in failure.value.hint
    assert "same command continues" in failure.value.hint


@pytest.mark.parametrize("direct", [True, False])
def test_a_full_disk_while_writing_continues_when_there_is_space(
    full_disk: Path, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    monkeypatch.setattr(system, "fallocate", failing(errno.EOPNOTSUPP))
    hog = full_disk / "hog"
    hog.write_bytes(bytes(2 * MIB))
    final = full_disk / "a.bin"
    data = junk(3 * MIB)
    with OutputFile(final, data.size, direct=direct) as output:
        output.write(0, data[:MIB])
        with pytest.raises(IOFailed, match="No space left") as failure:
            output.write(MIB, data[MIB:])
    assert f"{MIB}..{3 * MIB}" in failure.value.where
    assert "free at least 1,048,576 bytes" in failure.value.hint
    hog.unlink()
    with OutputFile(final, data.size, direct=direct, resume=True) as output:
        assert output.resumed
        output.write(MIB, data[MIB:])
        output.commit()
    assert final.read_bytes() == data.tobytes()
