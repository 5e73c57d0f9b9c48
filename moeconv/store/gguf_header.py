"""The header of one GGUF file: metadata, and where its tensors lie. Nothing in it is trusted.

Little-endian, versions 2 and 3 (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md):
magic, version, counts; key-value pairs; tensor infos; then, aligned, the tensors' bytes.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from moeconv.errors import BadHeader
from moeconv.store.gguf_values import ALIGNMENT_KEY, U32, Cursor, read_metadata
from moeconv.store.reader import open_regular
from moeconv.types import GGML_PREFIX, Json, TensorRef

MAX_DIMS = 4  # GGML_MAX_DIMS
MAX_NAME_NBYTES = 256  # ggml allows 64, some of its forks 128
DEFAULT_ALIGNMENT = 32
_MIN_PAIR_NBYTES = 8 + 1 + 4 + 1  # key length, a letter, value type, a byte
_MIN_INFO_NBYTES = 8 + 1 + 4 + 8 + 4 + 8  # name length, a letter, rank, one extent, type, offset

_COUNTS = struct.Struct("<QQ")
_MAGIC = int.from_bytes(b"GGUF", "little")
_INFO_TAILS = tuple(struct.Struct(f"<{rank}QIQ") for rank in range(MAX_DIMS + 1))
_PLAIN_TYPES = frozenset(("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64"))


class GgufHeader(NamedTuple):
    """What a file says of its tensors, in the order of its header, and its metadata.

    `header_nbytes`: up to the end of the tensor infos; `digest`: xxh3_128 of these, in hex.
    """

    tensors: tuple[TensorRef, ...]
    metadata: Mapping[str, Json]
    header_nbytes: int
    digest: str
    file_nbytes: int


class _Info(NamedTuple):
    name: str
    extents: tuple[int, ...]  # ne, the first runs side by side in memory
    type: str
    block: tuple[int, int]  # elements, bytes
    offset: int  # from the start of the data


def read_header(path: Path, name: str) -> GgufHeader:
    """Return the header of the file `path`, checked; errors and tensors call the file `name`."""
    descriptor = open_regular(path, name, BadHeader)
    try:
        return _read(Cursor(descriptor, name), name)
    finally:
        os.close(descriptor)


def _read(cursor: Cursor, name: str) -> GgufHeader:
    _check_version(cursor)
    tensor_count, pair_count = cursor.unpack(_COUNTS, "the counts")
    if tensor_count * _MIN_INFO_NBYTES + pair_count * _MIN_PAIR_NBYTES > cursor.left:
        raise cursor.bad(
            f"{tensor_count} tensors and {pair_count} metadata keys do not fit the file"
        )
    metadata = read_metadata(cursor, pair_count)
    alignment = _alignment(cursor, metadata)
    infos = _read_infos(cursor, tensor_count)
    data_start = _align(cursor.at, alignment)
    tensors = tuple(_tensor_ref(info, name, data_start) for info in infos)
    _check_layout(cursor, tensors, data_start, alignment)
    return GgufHeader(tensors, metadata, cursor.at, cursor.digest(), cursor.file_nbytes)


def _check_version(cursor: Cursor) -> None:
    if cursor.unpack(U32, "the magic")[0] != _MAGIC:
        raise cursor.bad("this is not a GGUF file: it does not start with 'GGUF'")
    (version,) = cursor.unpack(U32, "the version")
    if version & 0xFFFF == 0 and version:
        raise cursor.bad(
            "a big-endian GGUF file; moeconv reads little-endian ones",
            hint="gguf-py's gguf_convert_endian.py makes a little-endian copy",
        )
    if version not in (2, 3):
        raise cursor.bad(
            f"GGUF version {version}; moeconv reads 2 and 3", hint="make the file anew"
        )


def _alignment(cursor: Cursor, metadata: Mapping[str, Json]) -> int:
    alignment = int(metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT))
    if alignment < 1 or alignment & (alignment - 1):
        raise cursor.bad(f"{ALIGNMENT_KEY} {alignment} is not a power of two")
    return alignment


@cache
def _tensor_types() -> Mapping[int, tuple[str, tuple[int, int]]]:
    """Return name, elements and bytes of a block for each tensor type that the library knows."""
    from gguf.constants import GGML_QUANT_SIZES  # 0.2 s to import

    return {int(kind): (kind.name, block) for kind, block in GGML_QUANT_SIZES.items()}


def _read_infos(cursor: Cursor, count: int) -> list[_Info]:
    infos: list[_Info] = []
    names: set[str] = set()
    for _ in range(count):
        info = _read_info(cursor)
        if info.name in names:
            raise cursor.bad(f"tensor {info.name} twice")
        names.add(info.name)
        infos.append(info)
    return infos


def _read_info(cursor: Cursor) -> _Info:
    name = cursor.name(MAX_NAME_NBYTES, "a tensor name")
    (rank,) = cursor.unpack(U32, name)
    if not 1 <= rank <= MAX_DIMS:
        raise cursor.bad(f"tensor {name}: {rank} dimensions, 1 to {MAX_DIMS} are possible")
    *extents, type_id, offset = cursor.unpack(_INFO_TAILS[rank], name)
    if type_id not in _tensor_types():
        raise cursor.bad(
            f"tensor {name}: unknown tensor type {type_id}",
            hint="a newer gguf package may know it; else the file is damaged",
        )
    type_name, block = _tensor_types()[type_id]
    count = 1
    for extent in extents:
        count *= extent
    if not 0 < count < 1 << 62:
        raise cursor.bad(f"tensor {name}: dimensions {extents}")
    if extents[0] % block[0]:
        raise cursor.bad(
            f"tensor {name}: rows of {extents[0]} are not whole {type_name} blocks of {block[0]}"
        )
    return _Info(name, tuple(extents), type_name, block, offset)


def _tensor_ref(info: _Info, file: str, data_start: int) -> TensorRef:
    block_cols, block_nbytes = info.block
    shape = info.extents[::-1]
    row_nbytes = shape[-1] // block_cols * block_nbytes
    nbytes = row_nbytes
    for extent in shape[:-1]:
        nbytes *= extent
    dtype = info.type
    if info.type not in _PLAIN_TYPES:
        dtype, shape = GGML_PREFIX + info.type, (*shape[:-1], row_nbytes)
    return TensorRef(info.name, dtype, shape, file, data_start + info.offset, nbytes)


def _check_layout(
    cursor: Cursor, tensors: tuple[TensorRef, ...], data_start: int, alignment: int
) -> None:
    """Refuse data that is not one tensor after another, each padded to the alignment."""
    end = data_start
    for ref in sorted(tensors, key=lambda ref: ref.offset):
        where = f"tensor {ref.name}, bytes [{ref.offset}, {ref.offset + ref.nbytes})"
        expected = _align(end, alignment)
        if ref.offset % alignment:
            raise cursor.bad(f"{where}: not aligned to {alignment}")
        if ref.offset < expected:
            raise cursor.bad(f"{where}: overlaps what ends at {end}")
        if ref.offset > expected:
            raise cursor.bad(f"{where}: a hole of {ref.offset - expected} bytes before it")
        end = ref.offset + ref.nbytes
        if end > cursor.file_nbytes:
            raise cursor.bad(f"{where}: the file has {cursor.file_nbytes} bytes")
    if cursor.file_nbytes > _align(end, alignment):
        raise cursor.bad(f"{cursor.file_nbytes - end} bytes follow the last tensor")


def _align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
