from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moeconv.errors import IOFailed, Locked
from moeconv.store import lock
from moeconv.store.lock import DirectoryLock
from tests.store.faults import failing

HOLDER = """
import sys, time
from pathlib import Path
from moeconv.store.lock import DirectoryLock
with DirectoryLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(directory: Path) -> subprocess.Popen[str]:
    """Return a process that holds the lock of `directory`, until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_another_process_is_named_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    with hold(tmp_path / "new/dst") as process:
        with (
            pytest.raises(Locked, match=f"process {process.pid} on ") as failure,
            DirectoryLock(tmp_path / "new/dst"),
        ):
            pytest.fail("both hold the lock")
        assert failure.value.exit_code == 6
        assert failure.value.where == str(tmp_path / "new/dst/.moeconv/lock")
        process.send_signal(signal.SIGKILL)
    with DirectoryLock(tmp_path / "new/dst"):
        text = (tmp_path / "new/dst/.moeconv/lock").read_text()
        assert text.startswith(f"process {os.getpid()} on ")


def test_given_back_at_the_end_and_after_an_error(tmp_path: Path) -> None:
    with DirectoryLock(tmp_path):
        pass
    with pytest.raises(KeyError), DirectoryLock(tmp_path):
        raise KeyError
    assert (tmp_path / ".moeconv/lock").read_bytes() == b""
    with DirectoryLock(tmp_path), pytest.raises(Locked), DirectoryLock(tmp_path):
        pytest.fail("the same process holds it twice")


def test_directories_do_not_block_each_other(tmp_path: Path) -> None:
    with DirectoryLock(tmp_path / "a"), DirectoryLock(tmp_path / "b"):
        assert (tmp_path / "a/.moeconv/lock").exists()


def test_the_holder_may_remove_the_state_directory(tmp_path: Path) -> None:
    with DirectoryLock(tmp_path):
        shutil.rmtree(tmp_path / ".moeconv")
    assert not (tmp_path / ".moeconv").exists()
    with DirectoryLock(tmp_path):
        assert (tmp_path / ".moeconv/lock").exists()


def test_a_lock_on_a_removed_file_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, turns = lock.flock, []

    def flock(fd: int, operation: int) -> None:
        real(fd, operation)
        if not turns:  # the former holder finished in between and removed it
            shutil.rmtree(tmp_path / ".moeconv")
        turns.append(fd)

    monkeypatch.setattr(lock, "flock", flock)
    with DirectoryLock(tmp_path), pytest.raises(Locked), DirectoryLock(tmp_path):
        pytest.fail("two runs hold the lock")
    assert len(turns) == 2


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(lock, "flock", failing(code))
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with pytest.raises(IOFailed, match="cannot lock") as failure, DirectoryLock(tmp_path):
        pytest.fail("nothing is locked")
    assert "has no locks" in failure.value.hint
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / ".moeconv").write_bytes(b"")
    with pytest.raises(IOFailed), DirectoryLock(tmp_path):
        pytest.fail("nothing is locked")


def test_a_lock_that_leads_nowhere_is_said(tmp_path: Path) -> None:
    """It can neither be opened nor made, however often that is tried."""
    (tmp_path / ".moeconv").mkdir()
    (tmp_path / ".moeconv/lock").symlink_to("missing/lock")
    with pytest.raises(IOFailed, match="cannot be made") as failure, DirectoryLock(tmp_path):
        pytest.fail("held a lock that is not there")
    assert failure.value.where == str(tmp_path / ".moeconv/lock")
