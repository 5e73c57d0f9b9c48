"""What intrinsics are made of: vectors that are read from arrays, rearranged and written."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

ir: Any = import_module("llvmlite.ir")  # it has no annotations

LANES = 16
Vector = Any  # a value of the kind <16 x i8>
Builder = Any
Intrinsic = Any  # of numba: called in compiled functions alone
Place = tuple[Any, Any, Any]  # an array's numba type, its value, the byte to begin at


def bytes_of(lanes: int) -> Any:
    """Return the type of a vector of bytes."""
    return ir.VectorType(ir.IntType(8), lanes)


def _pointer(context: Any, builder: Builder, place: Place, kind: Any) -> Any:
    array, value, at = place
    memory = context.make_array(array)(context, builder, value).data
    begin = builder.gep(builder.bitcast(memory, ir.IntType(8).as_pointer()), [at])
    return builder.bitcast(begin, kind.as_pointer())


def load(context: Any, builder: Builder, place: Place, lanes: int) -> Vector:
    """Return the bytes there, wherever they are aligned."""
    found = builder.load(_pointer(context, builder, place, bytes_of(lanes)))
    found.align = 1
    return found


def store(context: Any, builder: Builder, place: Place, vector: Vector) -> None:
    """Write a vector there, wherever that is aligned."""
    builder.store(vector, _pointer(context, builder, place, vector.type)).align = 1


def picked(builder: Builder, pair: tuple[Vector, Vector], order: Sequence[int]) -> Vector:
    """Return these elements of two vectors, those of the second counted on from the first's."""
    places = ir.Constant(ir.VectorType(ir.IntType(32), len(order)), list(order))
    return builder.shuffle_vector(*pair, places)
