"""Small GGUF files, valid or broken on purpose, written byte by byte."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

ALIGNMENT = 32
UINT32, BOOL, STRING, ARRAY = 4, 7, 8, 9
F32, Q8_0, Q4_K = 0, 8, 12


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, type_id: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", type_id) + value


def number(key: str, value: int) -> bytes:
    return pair(key, UINT32, struct.pack("<I", value))


def array(type_id: int, count: int, elements: bytes = b"") -> bytes:
    return struct.pack("<IQ", type_id, count) + elements


class Info(NamedTuple):
    """One tensor info; the default is 32 numbers of F32."""

    name: str | bytes = "a.weight"
    extents: tuple[int, ...] = (8, 4)
    type_id: int = F32
    offset: int = 0

    def packed(self) -> bytes:
        ranks = struct.pack(f"<I{len(self.extents)}Q", len(self.extents), *self.extents)
        return text(self.name) + ranks + struct.pack("<IQ", self.type_id, self.offset)


class Gguf(NamedTuple):
    """A file's fields; counts and data follow from them unless they are given."""

    pairs: Sequence[bytes] = (pair("general.architecture", STRING, text("qwen3moe")),)
    infos: Sequence[Info] = (Info(),)
    magic: bytes = b"GGUF"
    version: bytes = struct.pack("<I", 3)
    pair_count: int | None = None
    info_count: int | None = None
    data_nbytes: int = 128
    alignment: int = ALIGNMENT

    def packed(self) -> bytes:
        pair_count = len(self.pairs) if self.pair_count is None else self.pair_count
        info_count = len(self.infos) if self.info_count is None else self.info_count
        head = self.magic + self.version + struct.pack("<QQ", info_count, pair_count)
        head += b"".join(self.pairs) + b"".join(info.packed() for info in self.infos)
        padding = -len(head) % self.alignment
        return head + bytes(padding) + _data(self.data_nbytes)


def _data(nbytes: int) -> bytes:
    return (bytes(range(256)) * (nbytes // 256 + 1))[:nbytes]


def write_model(path: Path, arch: str = "qwen3moe", **metadata: Any) -> None:
    """Write a GGUF file with gguf-py: an expert tensor of every type it knows, random blocks."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        writer.add_key_value(key.replace("__", "."), value, gguf.GGUFValueType.get_type(value))
    random = np.random.default_rng(5)
    for kind, (cols, nbytes) in gguf.GGML_QUANT_SIZES.items():
        if cols > 1:
            shape = (2, 3, 2 * nbytes)
            writer.add_tensor(
                f"blk.{int(kind)}.ffn_up_exps.weight",
                random.integers(0, 256, shape, np.uint8),
                raw_dtype=kind,
            )
    writer.add_tensor("output_norm.weight", random.random(48, np.float32))
    writer.add_tensor("half.weight", random.random((5, 7)).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
