"""Little-endian values of a GGUF file: strings, numbers, arrays, metadata. Nothing is trusted."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping
from typing import NamedTuple

import xxhash

from moeconv.errors import BadHeader
from moeconv.store.reader import read_range
from moeconv.store.strictjson import UNPRINTABLE
from moeconv.types import Json

HEADER_LIMIT = 256 << 20  # bytes; the largest tokenizers in use take about 20 MB
MAX_NESTING = 4  # arrays in arrays
MAX_KEY_NBYTES = 65535  # the format's own limit
KEPT_ELEMENTS = 4096  # of an array of numbers, room for one per layer; longer ones by length only
KEPT_STRINGS = 256
ALIGNMENT_KEY = "general.alignment"
_FIRST_READ = 1 << 20

U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_ARRAY_HEAD = struct.Struct("<IQ")
_UINT32, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9
# value type -> name, struct code
_SCALARS: Mapping[int, tuple[str, struct.Struct]] = {
    0: ("UINT8", struct.Struct("<B")),
    1: ("INT8", struct.Struct("<b")),
    2: ("UINT16", struct.Struct("<H")),
    3: ("INT16", struct.Struct("<h")),
    _UINT32: ("UINT32", struct.Struct("<I")),
    5: ("INT32", struct.Struct("<i")),
    6: ("FLOAT32", struct.Struct("<f")),
    _BOOL: ("BOOL", struct.Struct("<B")),
    10: ("UINT64", struct.Struct("<Q")),
    11: ("INT64", struct.Struct("<q")),
    12: ("FLOAT64", struct.Struct("<d")),
}


class ArrayLength(NamedTuple):
    """A metadata array that was not kept: the type of its elements, and how many there are."""

    type: str
    length: int


class Cursor:
    """Reads little-endian values one after another, never past the end of the file."""

    def __init__(self, descriptor: int, name: str) -> None:
        self.file_nbytes = os.fstat(descriptor).st_size
        self.at = 0
        self._name = name
        self._descriptor = descriptor
        self._data = bytearray()

    def bad(self, what: str, *, hint: str = "") -> BadHeader:
        """Return the error that says `what` is wrong at this place of the file."""
        return BadHeader(
            what,
            where=f"{self._name}, byte {self.at}",
            hint=hint or "the file is damaged or incomplete: download it again",
        )

    @property
    def left(self) -> int:
        return self.file_nbytes - self.at

    def advance(self, nbytes: int, what: str) -> int:
        """Return where the next `nbytes` start, now in memory and behind the cursor."""
        start, end = self.at, self.at + nbytes
        if end > len(self._data):
            if end > self.file_nbytes:
                raise self.bad(f"{what}: {nbytes} bytes wanted, the file has {self.left} left")
            if end > HEADER_LIMIT:
                raise self.bad(f"{what}: the header is larger than {HEADER_LIMIT >> 20} MiB")
            self._read_to(min(max(end, 2 * len(self._data), _FIRST_READ), self.file_nbytes))
        self.at = end
        return start

    def _read_to(self, end: int) -> None:
        more = bytearray(end - len(self._data))
        if read_range(self._descriptor, self._name, len(self._data), more) < len(more):
            raise self.bad("the file became shorter while it was read")
        self._data += more

    def unpack(self, form: struct.Struct, what: str) -> tuple[int, ...]:
        return form.unpack_from(self._data, self.advance(form.size, what))

    def string(self, max_nbytes: int, what: str) -> bytes:
        (nbytes,) = self.unpack(_U64, what)
        if nbytes > max_nbytes or nbytes > self.left:
            raise self.bad(f"{what}: a string of {nbytes} bytes")
        start = self.advance(nbytes, what)
        return bytes(self._data[start : start + nbytes])

    def name(self, max_nbytes: int, what: str) -> str:
        """Return a key or tensor name: UTF-8, not empty, no control characters."""
        raw = self.string(max_nbytes, what)
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            raise self.bad(f"{what}: {raw[:40]!r} is not UTF-8") from None
        if not text or UNPRINTABLE.search(text):
            raise self.bad(f"{what}: {text[:40]!r} is empty or has control characters")
        return text

    def digest(self) -> str:
        """Return the xxh3_128 of everything before the cursor, in hex."""
        return str(xxhash.xxh3_128_hexdigest(memoryview(self._data)[: self.at]))


def read_metadata(cursor: Cursor, count: int) -> Mapping[str, Json]:
    """Return the next `count` keys and their values; BadHeader for a key that is there twice."""
    metadata: dict[str, Json] = {}
    for _ in range(count):
        key = cursor.name(MAX_KEY_NBYTES, "a metadata key")
        if key in metadata:
            raise cursor.bad(f"metadata key {key} twice")
        (type_id,) = cursor.unpack(U32, key)
        if key == ALIGNMENT_KEY and type_id != _UINT32:
            raise cursor.bad(f"{key} is not a UINT32")
        metadata[key] = _read_value(cursor, type_id, key, 0)
    return metadata


def _read_value(cursor: Cursor, type_id: int, key: str, depth: int) -> Json:
    if type_id == _STRING:
        # Published files hold strings cut in the middle of a character.
        return cursor.string(HEADER_LIMIT, key).decode(errors="replace")
    if type_id == _ARRAY:
        return _read_array(cursor, key, depth + 1)
    if type_id not in _SCALARS:
        raise cursor.bad(f"{key}: unknown value type {type_id}")
    (value,) = cursor.unpack(_SCALARS[type_id][1], key)
    if type_id != _BOOL:
        return value
    if value > 1:
        raise cursor.bad(f"{key}: {value} is not a BOOL")
    return value == 1


def _read_array(cursor: Cursor, key: str, depth: int) -> Json:
    if depth > MAX_NESTING:
        raise cursor.bad(f"{key}: arrays nested more than {MAX_NESTING} deep")
    type_id, count = cursor.unpack(_ARRAY_HEAD, key)
    if type_id in _SCALARS:
        name, form = _SCALARS[type_id]
        _check_count(cursor, key, count, form.size)
        if count <= KEPT_ELEMENTS:
            return [_read_value(cursor, type_id, key, depth) for _ in range(count)]
        cursor.advance(count * form.size, key)
        return ArrayLength(name, count)
    if type_id == _STRING:
        _check_count(cursor, key, count, _U64.size)
        if count <= KEPT_STRINGS:
            return [_read_value(cursor, type_id, key, depth) for _ in range(count)]
        return _skip(cursor, key, count, "STRING", lambda: cursor.string(HEADER_LIMIT, key))
    if type_id == _ARRAY:
        _check_count(cursor, key, count, U32.size + _U64.size)
        if count <= KEPT_STRINGS:
            return [_read_array(cursor, key, depth + 1) for _ in range(count)]
        return _skip(cursor, key, count, "ARRAY", lambda: _read_array(cursor, key, depth + 1))
    raise cursor.bad(f"{key}: unknown value type {type_id} of an array")


def _check_count(cursor: Cursor, key: str, count: int, least_nbytes: int) -> None:
    if count * least_nbytes > cursor.left:
        raise cursor.bad(f"{key}: an array of {count} elements does not fit the file")


def _skip(
    cursor: Cursor, key: str, count: int, type_name: str, read: Callable[[], Json]
) -> ArrayLength:
    for _ in range(count):
        read()
    return ArrayLength(type_name, count)
