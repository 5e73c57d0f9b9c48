"""How output files come to be: laid out, resumed, completed, copied."""

from __future__ import annotations

import errno
import os
import tracemalloc
from pathlib import Path

import pytest

from moeconv.store import system, writer
from moeconv.store.writer import OutputFile, copy_file, partial_path, write_small_file
from tests.store.faults import failing, junk

KIB, MIB = 1 << 10, 1 << 20


def test_the_space_is_reserved_at_once_and_reads_as_zeros(tmp_path: Path) -> None:
    with OutputFile(tmp_path / "a.bin", 3 * MIB + 1) as output:
        stat = output.partial.stat()
        assert stat.st_size == 3 * MIB + 1
        assert stat.st_blocks * 512 >= 3 * MIB + 1
        output.commit()
    assert (tmp_path / "a.bin").read_bytes() == bytes(3 * MIB + 1)


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_a_file_system_that_cannot_reserve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(system, "fallocate", failing(code))
    with OutputFile(tmp_path / "a.bin", MIB) as output:
        assert output.partial.stat().st_size == MIB
        output.write(0, junk(MIB))
        output.commit()
    assert (tmp_path / "a.bin").read_bytes() == junk(MIB).tobytes()


RESUMES = (  # bytes there before (None: no file), resume -> resumed
    (None, True, False),
    (None, False, False),
    (100_000, True, True),
    (100_000, False, False),
    (0, True, False),
    (99_999, True, False),
    (100_001, True, False),
)


@pytest.mark.parametrize(("before", "resume", "resumed"), RESUMES)
def test_resuming(tmp_path: Path, before: int | None, resume: bool, resumed: bool) -> None:
    final = tmp_path / "a.bin"
    if before is not None:
        partial_path(final).write_bytes(b"x" * before)
    with OutputFile(final, 100_000, resume=resume) as output:
        assert output.resumed is resumed
        output.write(70_000, junk(10_000))
        output.commit()
    found = final.read_bytes()
    assert len(found) == 100_000
    assert found[70_000:80_000] == junk(10_000).tobytes()
    if resumed or not resume:
        assert set(found[:70_000]) == ({ord("x")} if resumed else {0})


@pytest.mark.parametrize(("umask", "mode"), [(0o027, 0o640), (0o022, 0o644), (0o077, 0o600)])
def test_modes_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with OutputFile(tmp_path / "new/deep/a.bin", 10) as output:
            output.commit()
        write_small_file(tmp_path / "b.json", b"{}")
        source = tmp_path / "tokenizer.json"
        source.write_bytes(b"t")
        source.chmod(0o400)
        copy_file(source, tmp_path / "c.json")
    finally:
        os.umask(before)
    for name in ("new/deep/a.bin", "b.json", "c.json"):
        assert (tmp_path / name).stat().st_mode & 0o777 == mode
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o777 & ~umask


def test_bytes_are_durable_before_the_name_and_the_name_on_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    sync, rename = system.sync_file, system.rename

    def sync_file(fd: int) -> None:
        steps.append(str(Path(f"/proc/self/fd/{fd}").readlink()))
        sync(fd)

    def replace(old: Path, new: Path) -> None:
        steps.append("rename")
        rename(old, new)

    monkeypatch.setattr(system, "sync_file", sync_file)
    monkeypatch.setattr(system, "rename", replace)
    with OutputFile(tmp_path / "new/a.bin", 10) as output:
        assert steps == [str(tmp_path), str(tmp_path / "new")]  # both names are there to resume
        steps.clear()
        output.commit()
    assert steps == [str(output.partial), "rename", str(tmp_path / "new")]


def test_commit_to_another_name_and_over_an_old_file(tmp_path: Path) -> None:
    (tmp_path / "b.bin").write_bytes(b"old")
    with OutputFile(tmp_path / "a.bin", 3) as output:
        output.write(0, memoryview(b"new"))
        assert (tmp_path / "b.bin").read_bytes() == b"old"
        output.commit(tmp_path / "b.bin")
    assert [path.name for path in tmp_path.iterdir()] == ["b.bin"]
    assert (tmp_path / "b.bin").read_bytes() == b"new"


def test_small_files_and_copies(tmp_path: Path) -> None:
    write_small_file(tmp_path / "a.json", b"one")
    write_small_file(tmp_path / "a.json", b"")
    assert (tmp_path / "a.json").read_bytes() == b""
    for nbytes in (0, 1, 4096, 9 * MIB + 17):
        (tmp_path / "src").write_bytes(junk(nbytes).tobytes())
        copy_file(tmp_path / "src", tmp_path / "dst")
        assert (tmp_path / "dst").read_bytes() == junk(nbytes).tobytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "dst", "src"]


def test_copying_is_bounded_in_memory(tmp_path: Path) -> None:
    with (tmp_path / "src").open("wb") as source:
        source.truncate(200 * MIB)
    before = writer._PIECES.idle_nbytes
    tracemalloc.start()
    copy_file(tmp_path / "src", tmp_path / "dst")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MIB  # what is not in the pool
    assert writer._PIECES.idle_nbytes <= max(before, 2 * writer.COPY_NBYTES)
    assert writer._BOUNCES.idle_nbytes <= 8 * writer.BOUNCE_NBYTES
