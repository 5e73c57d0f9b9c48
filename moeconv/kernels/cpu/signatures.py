"""The types of compiled functions' arguments, described without importing numba.

numba takes a quarter of a second to import, and is only needed to compile. A description also
says how native code takes the argument: as the integers and addresses that `flatten` lists.
"""

from __future__ import annotations

from collections.abc import Iterator
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


def flatten(kind: Type, value: Any) -> Iterator[int]:
    """Yield what native code takes for `value`; TypeError where it is of another type.

    An array is: its owner and parent (none: who calls keeps it), elements, bytes of one, address,
    length, stride (numba/core/datamodel/models.py, ArrayModel).
    """
    if kind.members is not None:
        for member, one in zip(kind.members, value, strict=True):
            yield from flatten(member, one)
    elif kind.name == "int64":
        yield int(value)
    else:
        _check_array(kind, value)
        width, (address, _) = value.itemsize, value.__array_interface__["data"]
        yield from (0, 0, value.size, width, address, value.size, width)


def _check_array(kind: Type, value: Any) -> None:
    dtype = np.dtype(kind.arguments[0].name)
    right = isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype == dtype
    if not right or not value.flags.c_contiguous:
        raise TypeError(f"a contiguous array [N] of {dtype} is wanted, not {value!r:.100}")
    if not (value.flags.writeable or dict(kind.keywords).get("readonly")):
        raise TypeError("the array may not be written")
