"""The types of compiled functions' arguments, described without importing numba.

numba takes a quarter of a second to import, and is only needed to compile. A description also
says how native code takes the argument, and how it lies in the block of integers that is handed
to an image.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

ADDRESS, INTEGER = "ptr", "i64"
# Where an array's object holds the address of its elements: right behind what every object has
# (numpy/ndarraytypes.h, PyArrayObject_fields).
FIELD = object.__basicsize__
# Owner and parent (none: who calls keeps it), elements, bytes of one, address, length, stride
# (numba/core/datamodel/models.py, ArrayModel).
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


def block_slots(kind: Type) -> Iterator[int]:
    """Yield the bytes of an element for each array in an argument, 0 for each integer.

    So it takes slots in a block of int64: an integer one, an array two (see `flattener`).
    """
    if kind.members is not None:
        for member in kind.members:
            yield from block_slots(member)
    else:
        yield 0 if kind.name == "int64" else _dtype(kind).itemsize


def _dtype(kind: Type) -> np.dtype[Any]:
    """Return the dtype of an array."""
    found: np.dtype[Any] = np.dtype(kind.arguments[0].name)
    return found


def holds_addresses() -> bool:
    """Return whether numpy's arrays hold the address of their elements where FIELD says."""
    probe = np.empty(3, np.uint8)[1:]
    return ctypes.c_void_p.from_address(id(probe) + FIELD).value == int(probe.ctypes.data)


def flattener(kind: Type) -> Callable[[Any], Sequence[Any]]:
    """Return a function of what a block holds of a value; TypeError for an array of another type.

    Of an array: where its own object holds the address of its elements, and how many there are.
    (Asking numpy for the address takes as long as all else.)
    """
    if kind.members is None:
        return _single if kind.name == "int64" else _array_flattener(kind)
    count = len(kind.members)
    if set(kind.members) == {Type("int64")}:
        return lambda value: _checked(value, count)
    members = tuple(map(flattener, kind.members))

    def flatten(value: Any) -> list[Any]:
        found: list[Any] = []
        for member, one in zip(members, value, strict=True):
            found += member(one)
        return found

    return flatten


def _single(value: Any) -> Sequence[Any]:
    return (value,)


def _checked(value: Any, count: int) -> Sequence[Any]:
    if len(value) != count:
        raise ValueError(f"{count} integers are wanted, not {value!r:.100}")
    found: Sequence[Any] = value
    return found


def _array_flattener(kind: Type) -> Callable[[Any], Sequence[Any]]:
    dtype, needs_write = _dtype(kind), not dict(kind.keywords).get("readonly")

    def flatten(value: Any) -> Sequence[Any]:
        if not isinstance(value, np.ndarray) or value.ndim != 1 or value.dtype != dtype:
            raise TypeError(f"an array [N] of {dtype} is wanted, not {value!r:.100}")
        flags = value.flags
        if not flags.c_contiguous:
            raise TypeError("the elements of an array do not touch")
        if needs_write and not flags.writeable:
            raise TypeError("the array may not be written")
        return (id(value) + FIELD, value.size)

    return flatten
