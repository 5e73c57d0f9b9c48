"""Compiled functions that are kept between runs, in the user's cache directory.

What is kept is an image (images.py), which is loaded without numba. A function of which no image
can be made is kept in numba's own cache: numba picks the directory when a function is decorated,
from `numba.config.CACHE_DIR`, which it reads from NUMBA_CACHE_DIR on its own import. Setting the
variable would thus come too late where something else imported numba first, and would move other
packages' caches; `compiled` sets the configuration around its own decoration alone.

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
from contextlib import contextmanager, suppress
from functools import cache, update_wrapper, wraps
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from moeconv.kernels.cpu.images import Unsuited, load_image, make_image, read_image, write_image
from moeconv.kernels.cpu.signatures import Type

F = TypeVar("F", bound=Callable[..., Any])

_binding: Any = import_module("llvmlite.binding")  # it has no annotations
_LOCK = threading.RLock()
_SOURCES = Path(__file__).parent


@cache
def version_key() -> str:
    """Return 16 hex digits that name these sources, numba, Python and the CPU."""
    digest = hashlib.blake2b(digest_size=8)
    # A function's image holds what it calls in other files, too.
    for source in sorted(_SOURCES.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    chosen = sorted(one for one in os.environ.items() if one[0].startswith("NUMBA_"))
    processor = (_binding.get_host_cpu_name(), sorted(cpu_features()))
    facts = (_numba_version(), np.__version__, sys.version, processor, chosen)
    digest.update(repr(facts).encode())
    return digest.hexdigest()


def cpu_features() -> frozenset[str]:
    """Return the features of the CPU that numba compiles for, each as "+name" or "-name"."""
    chosen = os.environ.get("NUMBA_CPU_FEATURES")
    if chosen is None and os.environ.get("NUMBA_CPU_NAME") == "generic":
        chosen = ""  # as in numba/core/config.py
    text = _binding.get_host_cpu_features().flatten() if chosen is None else chosen
    return frozenset(text.split(","))


def _numba_version() -> bytes:
    """Return the file that tells numba's version: importing numba is what an image saves."""
    found = find_spec("numba")
    return (
        (Path(found.origin).parent / "_version.py").read_bytes() if found and found.origin else b""
    )


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
        home = Path(os.path.expanduser("~"))  # noqa: PTH111 (never raises)
        if home.is_absolute():  # where nobody knows this user it is still "~"
            yield home / ".cache" / "moeconv"
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


class Inner:
    """A function for use inside compiled ones, given to numba when it asks for its type."""

    def __init__(self, function: Callable[..., Any], make: Callable[[Any], Any]) -> None:
        self.py_func = function
        self._make = make
        self._known: tuple[Any, Any] | None = None  # what numba made of it, numba's type of that
        update_wrapper(self, function)

    @property
    def _numba_type_(self) -> Any:  # numba asks what it does not know for its type
        return self.known[1]

    @property
    def known(self) -> tuple[Any, Any]:
        """Return what numba knows it as, and its type."""
        with _LOCK:
            if self._known is None:
                self._known = self._make(self.py_func)
        return self._known

    def __call__(self, *arguments: Any) -> Any:
        return self.known[0](*arguments)


def jitable(function: F) -> F:
    """Return `function` for use inside compiled functions; it is compiled into its callers."""
    return cast(F, Inner(function, _dispatched))


def intrinsic(function: Callable[..., Any]) -> Any:
    """Return numba's intrinsic (see numba.extending) for use inside compiled functions.

    The signature that `function` returns may be made from `nb`.
    """
    return Inner(function, _intrinsic)


def _dispatched(function: Callable[..., Any]) -> tuple[Any, Any]:
    dispatcher: Any = import_module("numba").njit(nogil=True)(function)
    return dispatcher, dispatcher._numba_type_


def _intrinsic(function: Callable[..., Any]) -> tuple[Any, Any]:
    @wraps(function)
    def typed(*arguments: Any) -> Any:
        signature, generate = function(*arguments)
        return signature.made() if isinstance(signature, Type) else signature, generate

    made: Any = import_module("numba.extending").intrinsic(typed)
    context = import_module("numba.core.registry").cpu_target.typing_context
    context.refresh()
    return made, context.resolve_value_type(made)


def compiled(signature: tuple[Type, ...]) -> Callable[[Callable[..., Any]], Compiled]:
    """Return a decorator that compiles a function for one signature, on its first call."""
    return lambda function: Compiled(function, signature)


class Compiled:
    """A function that is compiled, or loaded from the cache, on its first call; frees the GIL."""

    __slots__ = ("__dict__", "_arguments", "_call", "_function")

    def __init__(self, function: Callable[..., Any], arguments: tuple[Type, ...]) -> None:
        self._function = function
        self._arguments = arguments
        self._call: Callable[..., Any] | None = None
        update_wrapper(self, function)

    def __call__(self, *arguments: Any) -> Any:
        return (self._call or self.load())(*arguments)

    @property
    def signature(self) -> tuple[Any, ...]:
        """Return numba's types of the arguments."""
        return tuple(kind.made() for kind in self._arguments)

    def load(self) -> Callable[..., Any]:
        """Return what a call runs, loaded or compiled now where it was not yet."""
        with _LOCK:
            if self._call is None:
                self._call = self._load()
        return self._call

    def _load(self) -> Callable[..., Any]:
        directory, function = cache_directory(), self._function
        if directory is None:
            return self._compile()
        path = directory / f"{function.__module__.rpartition('.')[2]}.{function.__name__}.image"
        image = read_image(path)
        if image is None:
            try:
                image = make_image(self._compile(), self._arguments)
            except Unsuited:
                image = b""  # kept, too: the next run need not try
            with suppress(OSError):  # a full disk: the cache is only a saving
                write_image(path, image)
        return load_image(image, self._arguments) if image else self._cached_by_numba(directory)

    def _compile(self, **options: Any) -> Callable[..., Any]:
        numba: Any = import_module("numba")
        made: Callable[..., Any] = numba.njit(self.signature, nogil=True, **options)(self._function)
        return made

    def _cached_by_numba(self, directory: Path) -> Callable[..., Any]:
        try:
            with _cache_in(directory):
                return self._compile(cache=True)
        except (OSError, EOFError, pickle.UnpicklingError):
            return self._compile()  # a full disk, or a file cut short by a crash


@contextmanager
def _cache_in(directory: Path) -> Iterator[None]:
    """Make numba choose `directory` for what is decorated meanwhile."""
    config: Any = import_module("numba").config
    before = config.CACHE_DIR
    config.CACHE_DIR = str(directory)
    try:
        yield
    finally:
        config.CACHE_DIR = before
