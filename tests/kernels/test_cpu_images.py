"""Kernels as files of machine code: what goes in and out, and what is refused."""

from __future__ import annotations

import importlib
import math
import pkgutil
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import numba
import numpy as np
import pytest

import moeconv.kernels.cpu
from moeconv.kernels.cpu.base import BYTES_IN, BYTES_OUT, FLOATS_IN, INT, PAIR, TRIPLE, nb
from moeconv.kernels.cpu.cache import Compiled, cache_directory, intrinsic, jitable
from moeconv.kernels.cpu.images import Unsuited, load_image, make_image
from moeconv.kernels.cpu.signatures import Type


class Job(NamedTuple):
    low: int
    high: int


def image_of(function: Any, *arguments: Type) -> Any:
    """Return a function as its image runs it."""
    fresh = numba.njit(tuple(kind.made() for kind in arguments), nogil=True)(function)
    return load_image(make_image(fresh, arguments), arguments)


def kernels() -> Iterator[Compiled]:
    """Yield every compiled function."""
    room = moeconv.kernels.cpu
    for found in pkgutil.iter_modules(room.__path__):
        module = importlib.import_module(f"{room.__name__}.{found.name}")
        for value in vars(module).values():
            if isinstance(value, Compiled) and value.__module__ == module.__name__:
                yield value


@pytest.mark.parametrize(
    "kernel", list(kernels()), ids=lambda one: f"{one.__module__}.{one.__name__}"
)
def test_every_kernel_has_an_image(kernel: Compiled) -> None:
    """Without one its first use imports numba: half a second."""
    assert cache_directory() is not None
    assert getattr(kernel.load(), "__module__", "") == load_image.__module__


def test_arguments_arrive_in_their_order() -> None:
    def told(parts, job, weights, out, more):  # type: ignore[no-untyped-def]
        out[0] = parts[0][0] + parts[0].size
        out[1] = np.uint8(parts[1][1] * 2)
        out[2] = np.uint8(weights[-1])
        return job.low, job.high, more[1], out.size

    kinds = (nb.Tuple((BYTES_IN, FLOATS_IN)), nb.NamedUniTuple(INT, 2, Job), FLOATS_IN, BYTES_OUT)
    run = image_of(told, *kinds, PAIR)
    out = np.zeros(5, np.uint8)
    parts = (np.array([7, 1], np.uint8), np.array([0, 4, 0], np.float32))
    weights = np.arange(9, dtype=np.float32)
    assert run(parts, Job(-3, 1 << 40), weights, out, (1, -2)) == (-3, 1 << 40, -2, 5)
    assert out.tolist() == [9, 8, 8, 0, 0]


def test_what_comes_back() -> None:
    def nothing(number):  # type: ignore[no-untyped-def]
        pass

    def one(number):  # type: ignore[no-untyped-def]
        return -number

    def truth(number):  # type: ignore[no-untyped-def]
        return number > 2

    def several(number):  # type: ignore[no-untyped-def]
        return number, number + 1, -number

    assert image_of(nothing, INT)(3) is None
    assert image_of(one, INT)(3) == -3
    assert [image_of(truth, INT)(number) for number in (2, 3)] == [False, True]
    assert image_of(several, INT)(3) == (3, 4, -3)


def test_memory_of_its_own() -> None:
    def sums(source, size, repeats):  # type: ignore[no-untyped-def]
        total = 0
        for _ in range(repeats):
            scratch = np.empty(size, np.int64)
            for i in range(size):
                scratch[i] = source[i % source.size]
            total += scratch.sum() + scratch.ctypes.data % 32
        return total

    run = image_of(sums, BYTES_IN, INT, INT)
    source = np.arange(7, dtype=np.uint8)
    for size in (0, 1, 1000):
        assert run(source, size, 3) == 3 * sum(i % 7 for i in range(size))
    with pytest.raises(RuntimeError, match="memory"):
        run(source, 1 << 58, 1)


def test_images_that_call_the_same_function() -> None:
    """What both hold of it is their own."""

    @numba.njit
    def shared(number):  # type: ignore[no-untyped-def]
        return number * 3

    def once(number):  # type: ignore[no-untyped-def]
        return shared(number)

    def twice(number):  # type: ignore[no-untyped-def]
        return shared(shared(number))

    first, second = image_of(once, INT), image_of(twice, INT)
    assert (first(2), second(2), first(2)) == (6, 18, 6)


@jitable
def tripled(number):  # type: ignore[no-untyped-def]
    return seven(number) * 3


@intrinsic
def seven(typing, number):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, given):  # type: ignore[no-untyped-def]
        return context.get_constant(signature.return_type, 7)

    return nb.int64(number), generate


def test_inner_functions_and_intrinsics() -> None:
    run = image_of(lambda number: tripled(number) + seven(number) - number, INT)
    assert run(2) == 7 * 3 + 7 - 2
    with pytest.raises(NotImplementedError):
        seven(2)


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros(4, np.int8),
        np.zeros(4, np.float32),
        np.zeros((2, 2), np.uint8),
        np.zeros(8, np.uint8)[::2],
        bytearray(4),
    ],
)
def test_arrays_of_other_kinds_are_refused(wrong: Any) -> None:
    run = image_of(lambda source, out: source.size, BYTES_IN, BYTES_OUT)
    good = np.zeros(4, np.uint8)
    assert run(good, good) == 4
    with pytest.raises(TypeError):
        run(wrong, good)
    fixed = np.frombuffer(bytes(4), np.uint8)
    assert run(fixed, good) == 4
    with pytest.raises(TypeError, match="may not be written"):
        run(good, fixed)
    with pytest.raises(ValueError, match="shorter"):
        run(good)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (lambda x: x * 0.5, (INT,)),
        (lambda x: int(math.sin(x) * 9), (INT,)),
        (lambda x: int(x), (nb.float64,)),
        (lambda x: x[0, 0], (nb.Array(nb.int64, 2, "C"),)),
    ],
)
def test_functions_of_another_kind_get_no_image(function: Any, arguments: tuple[Type, ...]) -> None:
    """They return no integer, call other libraries, or take what nothing flattens."""
    with pytest.raises(Unsuited):
        image_of(function, *arguments)


def test_another_calling_convention_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeconv.kernels.cpu.signatures._ARRAY", ("ptr", "i64"))
    with pytest.raises(Unsuited, match="another way"):
        image_of(lambda source, sizes: source.size, BYTES_IN, TRIPLE)


def test_arrays_of_another_kind_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their addresses are read from where they lie in numpy's objects."""
    monkeypatch.setattr("moeconv.kernels.cpu.signatures.FIELD", 24)  # where the rank is
    with pytest.raises(Unsuited, match="addresses"):
        image_of(lambda source, sizes: source.size, BYTES_IN, TRIPLE)


def test_numbers_that_are_no_integers_are_refused() -> None:
    run = image_of(lambda number, pair: number + pair[0] + pair[1], INT, PAIR)
    assert run(np.int32(1), (np.uint8(2), True)) == 4
    for wrong in ((1.0, (2, 3)), (1, (2, 3.0)), (1 << 63, (2, 3))):
        with pytest.raises(struct.error):
            run(*wrong)
    with pytest.raises(ValueError, match="2 integers"):
        run(1, (2, 3, 4))


def test_views_are_seen_where_they_begin() -> None:
    """Arrays that own no memory, and one without elements."""
    run = image_of(lambda source: source.size * 1000 + (source[0] if source.size else 0), BYTES_IN)
    whole = np.arange(9, dtype=np.uint8)
    assert [run(whole), run(whole[4:7]), run(whole[9:])] == [9000, 3004, 0]
    assert run(np.frombuffer(bytes([7, 8]), np.uint8)) == 2007
