"""Compiled functions that are kept between runs, in the user's cache directory.

numba picks the directory when a function is decorated, from `numba.config.CACHE_DIR`, which it
reads from NUMBA_CACHE_DIR on its own import. Setting the variable would thus come too late where
something else imported numba first, and would move other packages' caches; `compiled` sets the
configuration around its own decoration alone.

Trap: numba's index maps signatures to numbered files, and two processes that add different
signatures at the same time can leave a signature that points at the other's machine code. So
every function has exactly one signature, and the directory names the sources, numba and the CPU:
two processes can only ever write the same thing.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, update_wrapper
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])

_binding: Any = import_module("llvmlite.binding")  # it has no annotations
_config: Any = numba.config
_LOCK = threading.RLock()
_SOURCES = Path(__file__).parent


@cache
def version_key() -> str:
    """Return 16 hex digits that name these sources, numba, Python and the CPU."""
    digest = hashlib.blake2b(digest_size=8)
    # numba notices a change of a function's own file, not of the files it calls into.
    for source in sorted(_SOURCES.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    features = _binding.get_host_cpu_features().flatten()
    chosen = (_config.CPU_NAME, _config.CPU_FEATURES)
    facts = (numba.__version__, sys.version, _binding.get_host_cpu_name(), features, chosen)
    digest.update(repr(facts).encode())
    return digest.hexdigest()


@cache
def cache_directory() -> Path | None:
    """Return the directory that compiled functions are kept in; None where none can be written."""
    name = f"numba-{version_key()}"
    for parent in _candidates():
        if _usable(parent / name):
            return parent / name
    return None


def _candidates() -> Iterator[Path]:
    """Yield where to look, the user's own choice first."""
    if os.environ.get("NUMBA_CACHE_DIR"):
        yield Path(os.environ["NUMBA_CACHE_DIR"]) / "moeconv"
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if xdg.is_absolute():  # XDG base directories: a relative path is to be ignored
        yield xdg / "moeconv"
    else:
        yield Path(os.path.expanduser("~/.cache")) / "moeconv"  # noqa: PTH111 (never raises)
    yield Path(tempfile.gettempdir()) / f"moeconv-{os.getuid()}"


def _usable(directory: Path) -> bool:
    """Return whether files can be written there, and by nobody but this user.

    The files are pickles: whoever can write them, or rename what holds them, runs code here.
    """
    try:
        for made in (directory.parent, directory):
            made.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = made.lstat()
            others = stat.S_IMODE(found.st_mode) & 0o022
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or others:
                return False
        with tempfile.TemporaryFile(dir=directory):
            return True
    except OSError:
        return False


def jitable(function: F) -> F:
    """Return `function` for use inside compiled functions; it is compiled into its callers."""
    inner: Any = numba.njit(nogil=True)(function)
    return cast(F, inner)


def compiled(signature: str | tuple[Any, ...]) -> Callable[[Callable[..., Any]], Compiled]:
    """Return a decorator that compiles a function for one signature, on its first call."""
    return lambda function: Compiled(function, signature)


class Compiled:
    """A function that is compiled, or loaded from the cache, on its first call; frees the GIL."""

    __slots__ = ("__dict__", "_call", "_function", "_signature")

    def __init__(self, function: Callable[..., Any], signature: str | tuple[Any, ...]) -> None:
        self._function = function
        self._signature = signature
        self._call: Any = None
        update_wrapper(self, function)

    def __call__(self, *arguments: Any) -> Any:
        return (self._call or self.dispatcher())(*arguments)

    def dispatcher(self) -> Any:
        """Return numba's dispatcher."""
        with _LOCK:
            if self._call is None:
                self._call = self._compile()
        return self._call

    def _compile(self) -> Any:
        directory = cache_directory()
        if directory is not None:
            try:
                with _cache_in(directory):
                    return numba.njit(self._signature, nogil=True, cache=True)(self._function)
            except (OSError, EOFError, pickle.UnpicklingError):
                pass  # a full disk, or a file cut short by a crash: the cache is only a saving
        return numba.njit(self._signature, nogil=True)(self._function)


@contextmanager
def _cache_in(directory: Path) -> Iterator[None]:
    """Make numba choose `directory` for what is decorated meanwhile."""
    before = _config.CACHE_DIR
    _config.CACHE_DIR = str(directory)
    try:
        yield
    finally:
        _config.CACHE_DIR = before
