"""The header of a safetensors file: read under every rule of the format, and written.

The format: 8 bytes, little endian, length of the header; a JSON object (name -> dtype, shape,
data_offsets from the end of the header on; `__metadata__` -> strings), padded with spaces; data.
The official library promises headers up to 100 MB and data without hole, overlap or rest; it
accepts a name twice, `../`, NUL and empty names, which are refused here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import xxhash

from moeconv.collector import paused
from moeconv.errors import BadHeader, Refused
from moeconv.store.reader import open_regular, read_range
from moeconv.store.strictjson import HALF_PAIR, UNPRINTABLE, JsonProblem, parse_object
from moeconv.types import DTYPE_BITS, Json, TensorRef, element_count

MAX_HEADER_NBYTES = 100_000_000  # safetensors 0.8.0, tensor.rs, MAX_HEADER_SIZE
LENGTH_NBYTES = 8
METADATA_KEY = "__metadata__"

_MAX_EXTENT = 2**63 - 1
_FIELDS = frozenset({"dtype", "shape", "data_offsets"})
_AGAIN = "the file is damaged or was written by a faulty tool: download it again"
# What lies in place of weights often enough; none of these is a header length below the limit.
_OTHER_CONTENT: tuple[tuple[bytes, str, str], ...] = (
    (
        b"version https://git-lfs",
        "this is a Git LFS pointer, not the weights",
        "run `git lfs pull` in the repository, or download the file itself",
    ),
    (b"GGUF", "this is a GGUF file", "rename it to end in .gguf"),
    (b"PK\x03\x04", "this is a zip archive or a PyTorch pickle", "convert it to safetensors first"),
    (b"<!DOCTYPE", "this is a web page", "download the file itself; a login may be needed"),
    (b"<html", "this is a web page", "download the file itself; a login may be needed"),
)


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of its tensors, in the order of their bytes.

    `header_nbytes`: all bytes before the data; `digest`: xxh3_128 of these bytes, in hex.
    """

    tensors: tuple[TensorRef, ...]
    metadata: Mapping[str, str]
    header_nbytes: int
    digest: str
    file_nbytes: int


class _Area(NamedTuple):
    """Where the data of a file lies: [start, start + nbytes)."""

    file: str
    start: int
    nbytes: int


def read_header(path: Path, name: str) -> Header:
    """Return the header of the file `path`, checked; errors and tensors call the file `name`.

    Every fault of the file is a BadHeader; an operating system that fails to read is IOFailed.
    """
    descriptor = open_regular(path, name, BadHeader)
    try:
        file_nbytes = os.fstat(descriptor).st_size
        raw = _raw_header(descriptor, name, file_nbytes)
    finally:
        os.close(descriptor)
    area = _Area(name, len(raw), file_nbytes - len(raw))
    with paused():
        found = _parse(raw, area)
        metadata = _metadata(found.pop(METADATA_KEY, {}), name)
        tensors = [_tensor(key, value, area) for key, value in found.items()]
        del found
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_cover(tensors, area)
    digest = xxhash.xxh3_128_hexdigest(raw)
    return Header(tuple(tensors), metadata, len(raw), digest, file_nbytes)


def _raw_header(descriptor: int, name: str, file_nbytes: int) -> bytes:
    """Return the length and the header, as they lie in the file."""
    start = bytearray(min(file_nbytes, 64))
    read_range(descriptor, name, 0, start)
    if file_nbytes < LENGTH_NBYTES:
        what = f"the file is truncated: it has {file_nbytes} bytes, a header length alone takes 8"
        raise BadHeader(what, where=name, hint="download it again")
    length = int.from_bytes(start[:LENGTH_NBYTES], "little")
    if length > MAX_HEADER_NBYTES:
        for begin, what, hint in _OTHER_CONTENT:
            if start.startswith(begin):
                raise BadHeader(what, where=name, hint=hint)
        what = f"the header length is {length} bytes; a header has at most {MAX_HEADER_NBYTES}"
        raise BadHeader(what, where=f"{name}, bytes [0, 8)", hint=_AGAIN)
    raw = bytearray(LENGTH_NBYTES + length)
    if len(raw) > file_nbytes or read_range(descriptor, name, 0, raw) < len(raw):
        raise _truncated(name, len(raw), file_nbytes)
    return bytes(raw)


def _parse(raw: bytes, area: _Area) -> dict[str, Json]:
    where = f"{area.file}, bytes [{LENGTH_NBYTES}, {len(raw)})"
    if raw[LENGTH_NBYTES : LENGTH_NBYTES + 1] != b"{":
        raise BadHeader("the header does not start with '{'", where=where, hint=_AGAIN)
    try:
        return parse_object(raw[LENGTH_NBYTES:])
    except JsonProblem as problem:
        raise BadHeader(f"the header {problem}", where=where, hint=_AGAIN) from None


def _metadata(found: Json, file: str) -> Mapping[str, str]:
    if type(found) is not dict or not all(type(value) is str for value in found.values()):
        raise BadHeader(f"{METADATA_KEY} does not map names to strings", where=file, hint=_AGAIN)
    if any(HALF_PAIR.search(text) for pair in found.items() for text in pair):
        raise BadHeader(f"{METADATA_KEY} is not Unicode", where=file, hint=_AGAIN)
    return found


def _tensor(name: str, entry: Json, area: _Area) -> TensorRef:
    """Return the tensor that one entry describes; its bytes are its dtype's and inside the data."""
    if not name or UNPRINTABLE.search(name):
        raise _bad("a tensor's name is empty or has control characters", name, area)
    if type(entry) is not dict or entry.keys() != _FIELDS:
        raise _bad("an entry has other fields than dtype, shape, data_offsets", name, area)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPE_BITS:
        raise _bad(f"the dtype {dtype!r:.40} is unknown", name, area)
    if type(shape) is not list or not _is_counts(shape):
        raise _bad(f"the shape {shape!r:.80} is not a list of counts", name, area)
    if type(offsets) is not list or len(offsets) != 2 or not _is_counts(offsets):
        raise _bad(f"data_offsets {offsets!r:.80} are not two byte offsets", name, area)
    begin, end = offsets
    if begin > end:
        raise _bad(f"data_offsets end before they begin ({begin} > {end})", name, area)
    if end > area.nbytes:
        raise _truncated(area.file, area.start + end, area.start + area.nbytes, name)
    nbits = _bits(dtype, shape, area.nbytes * 8)
    if nbits != (end - begin) * 8:
        takes = f"{nbits} bits" if nbits % 8 else f"{nbits // 8} bytes"
        text = f"{dtype} {shape!r:.80} takes {takes}, data_offsets hold {end - begin}"
        raise _bad(text, name, area, begin, end)
    return TensorRef(name, dtype, tuple(shape), area.file, area.start + begin, end - begin)


def _is_counts(values: Iterable[Json]) -> bool:
    # Not isinstance: true is no count, though a bool is an int.
    return all(type(value) is int and 0 <= value <= _MAX_EXTENT for value in values)


def _bits(dtype: str, shape: Sequence[int], most: int) -> int:
    """Return the bits of a tensor; some number above `most` as soon as it is above."""
    if 0 in shape:
        return 0
    nbits = DTYPE_BITS[dtype]
    for extent in shape:
        nbits *= extent
        if nbits > most:
            break  # thousands of huge extents would take for ever to multiply
    return nbits


def _check_cover(tensors: Sequence[TensorRef], area: _Area) -> None:
    """Refuse a hole, an overlap, or bytes after the last tensor; `tensors` in order of offset."""
    end = area.start
    for tensor in tensors:
        if tensor.offset != end:
            kind = "a hole lies before" if tensor.offset > end else "the tensor before overlaps"
            begin, stop = tensor.offset - area.start, tensor.offset - area.start + tensor.nbytes
            raise _bad(f"{kind} this tensor's data", tensor.name, area, begin, stop)
        end = tensor.offset + tensor.nbytes
    rest = area.start + area.nbytes - end
    if rest:
        raise BadHeader(
            f"{rest} bytes follow the last tensor",
            where=f"{area.file}, bytes [{end}, {end + rest})",
            hint=_AGAIN,
        )


def _bad(what: str, tensor: str, area: _Area, begin: int = -1, end: int = -1) -> BadHeader:
    """Return an error about a tensor, with its bytes ([begin, end) of the data) where known."""
    where = f"{area.file}, tensor {tensor!r:.200}"
    if begin >= 0:
        where += f", bytes [{area.start + begin}, {area.start + end})"
    return BadHeader(what, where=where, hint=_AGAIN)


def _truncated(file: str, expected: int, found: int, tensor: str = "") -> BadHeader:
    where = f"{file}, tensor {tensor!r:.200}" if tensor else file
    what = f"the file is truncated: expected {expected} bytes or more, found {found}"
    return BadHeader(what, where=where, hint="download it again")


def build_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...], int]],
    metadata: Mapping[str, str],
    align: int = 4096,
) -> bytes:
    """Return the bytes before the data: length, JSON, spaces up to a multiple of `align` bytes.

    `tensors`: name, dtype, shape, nbytes; their data follow one another in this order. The same
    arguments give the same bytes. A ValueError names a tensor that no header can describe.
    """
    entries: dict[str, Json] = {METADATA_KEY: dict(metadata)} if metadata else {}
    begin = 0
    for name, dtype, shape, nbytes in tensors:
        if not name or name in entries or name == METADATA_KEY or UNPRINTABLE.search(name):
            raise ValueError(f"tensor name {name!r} is empty, reserved, unprintable or used twice")
        if element_count(shape) * DTYPE_BITS[dtype] != nbytes * 8:
            raise ValueError(f"{name}: {dtype} {list(shape)} does not take {nbytes} bytes")
        end = begin + nbytes
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    length = -(-(LENGTH_NBYTES + len(text)) // align) * align - LENGTH_NBYTES
    if length > MAX_HEADER_NBYTES:
        what = f"a header of {length} bytes for {len(tensors)} tensors in one file"
        raise Refused(what, hint=f"use more files: a header has at most {MAX_HEADER_NBYTES} bytes")
    return length.to_bytes(LENGTH_NBYTES, "little") + text.ljust(length, b" ")
