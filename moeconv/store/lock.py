"""One run at a time in an output directory; the lock dies with its process."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path
from types import TracebackType

from moeconv import errors
from moeconv.store import system

STATE_DIRECTORY = ".moeconv"
LOCK_NAME = "lock"
_HELD = frozenset({errno.EWOULDBLOCK, errno.EACCES})
# Nothing has begun where these come: there is nothing that could continue.
_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR})
_OWNER_NBYTES = 4096
_MOST_ATTEMPTS = 100  # of which each but the last meets another run that just removes the lock

flock = fcntl.flock


class DirectoryLock:
    """Holds `directory`/.moeconv/lock while in its `with` block, or raises Locked at once.

    Trap: on NFS and FUSE a file that is removed while it is open stays, under a hidden name, until
    it is closed. So a state directory that is empty in the end is removed after the lock is closed.

    The file stays, empty, when the lock is given back: removing it could free a lock that
    another run has taken meanwhile. Whoever removes .moeconv does so while holding the lock.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / STATE_DIRECTORY / LOCK_NAME
        self._fd = -1

    def __enter__(self) -> DirectoryLock:
        try:
            self._fd = self._locked()
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)
        except OSError as error:
            self._release()
            if error.errno in _FORBIDDEN:
                raise errors.Refused(
                    f"the output directory cannot be written to: {error.strerror}",
                    where=str(error.filename or self.path),
                    hint="check its permissions and mount, or choose another directory",
                ) from error
            raise system.failed("lock the output directory", error, str(self.path)) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._fd >= 0:
            os.ftruncate(self._fd, 0)
        self._release()
        with contextlib.suppress(OSError):  # what is in use is not empty
            self.path.parent.rmdir()

    def _release(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _locked(self) -> int:
        """Return the locked descriptor."""
        for _ in range(_MOST_ATTEMPTS):
            fd = self._attempt()
            if fd >= 0:
                return fd
        raise errors.IOFailed(
            "the lock of the output directory cannot be made: it is gone as often as it is opened",
            where=str(self.path),
            hint="remove it if it is a link to nothing, and check the disk and its mount",
        )

    def _attempt(self) -> int:
        """Return the locked descriptor, or -1 if the file was removed while it was being locked."""
        system.make_directories(self.path.parent)
        if not os.access(self.path.parent.parent, os.W_OK | os.X_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(self.path.parent.parent))
        try:
            fd = system.open_file(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another run has just removed the directory
            return -1
        try:
            self._flock(fd)
            locked = self._is_the_file(fd)
        except BaseException:
            os.close(fd)
            raise
        if not locked:
            os.close(fd)
            return -1
        return fd

    def _flock(self, fd: int) -> None:
        try:
            flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _HELD:
                hint = "this file system has no locks (flock); write to one that has"
                raise system.failed("lock", error, str(self.path), hint) from error
            owner = os.pread(fd, _OWNER_NBYTES, 0).decode(errors="replace")
            raise errors.Locked(
                f"another run holds the output directory: {owner or 'a process not named yet'}",
                where=str(self.path),
                hint="wait for it, stop it, or choose another directory",
            ) from error

    def _is_the_file(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), self.path.stat())
        except FileNotFoundError:
            return False
