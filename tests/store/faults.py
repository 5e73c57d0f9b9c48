"""Random bytes, and system calls whose n-th fails, the way it would on a broken disk."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moeconv.store import system
from moeconv.store.buffers import Bytes, aligned


class Nth:
    """Counts calls of one system call and lets `fault` answer in place of the n-th."""

    def __init__(self, name: str, position: int, fault: Callable[..., Any]) -> None:
        self.name = name
        self.calls = 0
        self._position = position
        self._fault = fault
        self._real = getattr(system, name)
        self._lock = threading.Lock()

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        with self._lock:
            self.calls += 1
            turn = self.calls == self._position
        return (self._fault if turn else self._real)(*arguments, **options)


def junk(nbytes: int) -> Bytes:
    """Return page-aligned random bytes, the same each time."""
    data = aligned(nbytes)
    data[:] = np.random.default_rng(1).integers(0, 256, nbytes, dtype=np.uint8)
    return data


def is_direct(fd: int) -> bool:
    """Return whether a descriptor goes past the page cache."""
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


def failing(code: int) -> Callable[..., Any]:
    """Return a call that fails with this errno."""

    def fail(*_arguments: Any, **_options: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


def fail_nth(patch: pytest.MonkeyPatch, name: str, position: int, code: int = errno.EIO) -> Nth:
    """Make the n-th call (0: never, only count) of system.`name` fail with `code`."""
    nth = Nth(name, position, failing(code))
    patch.setattr(system, name, nth)
    return nth
