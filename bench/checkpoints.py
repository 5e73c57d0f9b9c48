"""Checkpoints of the sizes that the benchmarks need: random bytes in the right shapes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bench.architectures import KINDS, Size, Tensor
from moeconv.store.safetensors import build_header
from moeconv.types import tensor_nbytes

CHUNK_NBYTES = 64 << 20
Rng = np.random.Generator


class Source(NamedTuple):
    """A checkpoint that is there, and the bytes of its safetensors files."""

    root: Path
    nbytes: int


def source(folder: Path, kind: str, size: Size | None = None) -> Source:
    """Return the checkpoint of this kind and size in `folder`, written if it is not there."""
    size = size or KINDS[kind].size
    config = KINDS[kind].config(size)
    root = folder / kind
    told = root / "config.json"  # written last
    if not told.is_file() or json.loads(told.read_text()) != config:
        write_checkpoint(root, KINDS[kind].tensors(size), config, KINDS[kind].shard_nbytes)
    return Source(root, sum(path.stat().st_size for path in root.glob("*.safetensors")))


def _normal(rng: Rng) -> npt.NDArray[Any]:
    """Return BF16 numbers around 0."""
    values = (rng.standard_normal(CHUNK_NBYTES // 2).astype(np.float32) * 0.02).view(np.uint32)
    return (values >> 16).astype(np.uint16)


def _fp8(rng: Rng) -> npt.NDArray[Any]:
    """Return bytes that are no NaN in E4M3."""
    values = rng.integers(0, 256, CHUNK_NBYTES, dtype=np.uint8)
    values[values & 0x7F == 0x7F] = 0x3C
    return values


# What the numbers of a tensor are -> CHUNK_NBYTES of them.
NUMBERS: Mapping[str, Callable[[Rng], npt.NDArray[Any]]] = {
    "normal": _normal,
    "bytes": lambda rng: rng.integers(0, 256, CHUNK_NBYTES, dtype=np.uint8),
    "e8m0": lambda rng: rng.integers(112, 124, CHUNK_NBYTES, dtype=np.uint8),
    "fp8": _fp8,
    "scale": lambda rng: rng.uniform(1e-5, 1e-3, CHUNK_NBYTES // 4).astype(np.float32),
}


@cache
def pool(kind: str) -> npt.NDArray[np.uint8]:
    """Return the bytes that tensors of this kind of numbers are cut from."""
    return NUMBERS[kind](np.random.default_rng(0)).view(np.uint8)


def shards(tensors: Iterable[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Yield the tensors of each file: at most `limit` bytes, or one tensor."""
    held: list[Tensor] = []
    total = 0
    for tensor in tensors:
        nbytes = tensor_nbytes(tensor.dtype, tensor.shape)
        if held and total + nbytes > limit:
            yield held
            held, total = [], 0
        held.append(tensor)
        total += nbytes
    yield held


def write_file(path: Path, tensors: Sequence[Tensor], *, sparse: bool) -> int:
    """Write one safetensors file; return the bytes of its tensors."""
    rows = [
        (one.name, one.dtype, one.shape, tensor_nbytes(one.dtype, one.shape)) for one in tensors
    ]
    header = build_header(rows, {"format": "pt"})
    total = sum(row[3] for row in rows)
    with path.open("wb", buffering=0) as file:
        file.write(header)
        if sparse:
            file.truncate(len(header) + total)
            return total
        for tensor, row in zip(tensors, rows, strict=True):
            left = row[3]
            while left:
                left -= file.write(pool(tensor.kind)[: min(left, CHUNK_NBYTES)].data)
    return total


def write_checkpoint(
    root: Path,
    tensors: Iterable[Tensor],
    config: Mapping[str, object],
    shard_nbytes: int,
    *,
    sparse: bool = False,
) -> int:
    """Write files, index and config.json; return the bytes of the tensors.

    `sparse`: headers only, the bytes of the tensors are holes that read as zeros.
    """
    root.mkdir(parents=True, exist_ok=True)
    files = list(shards(tensors, shard_nbytes))
    total = 0
    weight_map: dict[str, str] = {}
    for index, held in enumerate(files):
        name = f"model-{index + 1:05d}-of-{len(files):05d}.safetensors"
        total += write_file(root / name, held, sparse=sparse)
        weight_map |= {tensor.name: name for tensor in held}
    index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    (root / "model.safetensors.index.json").write_text(index_text)
    (root / "config.json").write_text(json.dumps(config))
    return total
