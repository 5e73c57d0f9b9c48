"""The types of compiled functions' arguments, described without importing numba.

numba takes a quarter of a second to import, and is only needed to compile. A description also
says how native code takes the argument: as the integers and addresses that `flattener` gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

ADDRESS, INTEGER = "ptr", "i64"
_ARRAY = (ADDRESS, ADDRESS, INTEGER, INTEGER, ADDRESS, INTEGER, INTEGER)


class Type(NamedTuple):
    """A type by the name that it has in numba.types, with what that is called with."""

    name: str
    arguments: tuple[Any, ...] = ()
    keywords: tuple[tuple[str, Any], ...] = ()

    def __call__(self, *arguments: Any, **keywords: Any) -> Type:
        return Type(self.name, arguments, tuple(keywords.items()))

    @property
    def members(self) -> tuple[Type, ...] | None:
        """Return the types in a tuple; None for what is no tuple."""
        if self.name == "Tuple":
            return tuple(self.arguments[0])
        if self.name in ("UniTuple", "NamedUniTuple"):
            return (self.arguments[0],) * int(self.arguments[1])
        return None

    def made(self) -> Any:
        """Return numba's type."""
        found = getattr(import_module("numba").types, self.name)
        if not self.arguments:
            return found
        return found(*map(_made, self.arguments), **dict(self.keywords))


class _Types:
    """Stands for numba.types."""

    def __getattr__(self, name: str) -> Type:
        return Type(name)


nb: Any = _Types()


def _made(argument: Any) -> Any:
    if isinstance(argument, Type):
        return argument.made()
    return tuple(map(_made, argument)) if isinstance(argument, tuple) else argument


def native_types(kind: Type) -> Iterator[str]:
    """Yield ADDRESS or INTEGER for each value that native code takes for an argument.

    NotImplementedError for types that no kernel has had yet.
    """
    if kind.members is not None:
        for member in kind.members:
            yield from native_types(member)
    elif kind.name == "int64":
        yield INTEGER
    elif kind.name == "Array" and kind.arguments[1:] == (1, "C"):
        yield from _ARRAY
    else:
        raise NotImplementedError(kind.name)


def flattener(kind: Type) -> Callable[[Any], Sequence[int]]:
    """Return a function of what native code takes for a value; TypeError for one of another type.

    An array is: its owner and parent (none: who calls keeps it), elements, bytes of one, address,
    length, stride (numba/core/datamodel/models.py, ArrayModel).
    """
    if kind.members is None:
        return _single if kind.name == "int64" else _array_flattener(kind)
    count = len(kind.members)
    if set(kind.members) == {Type("int64")}:
        return lambda value: _checked(value, count)
    members = tuple(map(flattener, kind.members))

    def flatten(value: Any) -> list[int]:
        found: list[int] = []
        for member, one in zip(members, value, strict=True):
            found += member(one)
        return found

    return flatten


def _single(value: Any) -> Sequence[int]:
    return (int(value),)


def _checked(value: Any, count: int) -> Sequence[int]:
    if len(value) != count:
        raise ValueError(f"{count} integers are wanted, not {value!r:.100}")
    return tuple(map(int, value))


def _array_flattener(kind: Type) -> Callable[[Any], Sequence[int]]:
    dtype, needs_write = np.dtype(kind.arguments[0].name), not dict(kind.keywords).get("readonly")
    width = dtype.itemsize

    def flatten(value: Any) -> Sequence[int]:
        if not isinstance(value, np.ndarray) or value.ndim != 1 or value.dtype != dtype:
            raise TypeError(f"an array [N] of {dtype} is wanted, not {value!r:.100}")
        flags, count = value.flags, value.size
        if not flags.c_contiguous:
            raise TypeError("the elements of an array do not touch")
        if needs_write and not flags.writeable:
            raise TypeError("the array may not be written")
        return (0, 0, count, width, value.ctypes.data, count, width)

    return flatten
