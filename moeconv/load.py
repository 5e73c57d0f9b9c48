"""Tensors of a finished output, straight from its memory-mapped files."""

from __future__ import annotations

import contextlib
import importlib.util
import mmap
import os
from collections.abc import Iterator, Mapping
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moeconv.errors import BadHeader, Refused, UsageError, VerifyFailed
from moeconv.finished import Finished, RecordedFile, read_finished
from moeconv.numa import bound_memory, node_for
from moeconv.parallel import in_threads
from moeconv.store.reader import open_regular, read_range
from moeconv.store.safetensors import read_header
from moeconv.store.space import human, memory_limit
from moeconv.torch_dtypes import torch_dtype
from moeconv.types import TensorRef, element_count

Name = str | PathLike[str]

_DAMAGED_HINT = "moeconv verify says what is damaged"
PAGE_NBYTES = mmap.PAGESIZE
READ_AHEAD_NBYTES = 1 << 20  # tensors from here on are read ahead when they are asked for
COPY_NBYTES = 64 << 20
COPY_THREADS = 4
# Python names it from 3.11 on, and only where its own headers do.
MAP_NORESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000)

NUMPY_DTYPES: Mapping[str, type[np.generic]] = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "I16": np.int16,
    "U16": np.uint16,
    "F16": np.float16,
    "I32": np.int32,
    "U32": np.uint32,
    "F32": np.float32,
    "C64": np.complex64,
    "I64": np.int64,
    "U64": np.uint64,
    "F64": np.float64,
}
# dtype -> its name in ml_dtypes, and what shows its bits where ml_dtypes is not installed.
EXTENDED_DTYPES: Mapping[str, tuple[str, type[np.generic]]] = {
    "BF16": ("bfloat16", np.uint16),
    "F8_E4M3": ("float8_e4m3fn", np.uint8),
    "F8_E5M2": ("float8_e5m2", np.uint8),
    "F8_E8M0": ("float8_e8m0fnu", np.uint8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", np.uint8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", np.uint8),
}


class _Stored(NamedTuple):
    ref: TensorRef
    memory: mmap.mmap


class Tensors(Mapping[str, Any]):
    """Tensor by name, made when asked for: a view of memory that lives as long as a view of it.

    Writing to a tensor changes this process's copy of the pages it touches, never the file.
    `bound_node`: the NUMA node that holds all of it, None where nothing was bound. `notes`: what a
    caller should know.
    """

    def __init__(
        self,
        stored: Mapping[str, _Stored],
        framework: str,
        bound_node: int | None,
        notes: tuple[str, ...],
    ) -> None:
        self._stored = stored
        self._make = _MAKERS[framework]
        self.bound_node = bound_node
        self.notes = notes

    def __getitem__(self, name: str) -> Any:
        stored = self._stored[name]
        if self.bound_node is None:
            _read_ahead(stored)
        return self._make(stored)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def __repr__(self) -> str:
        return f"<{len(self)} tensors, bound_node={self.bound_node}>"


def load(
    dst: Name,
    rank: int = 0,
    *,
    numa: int | None = None,
    bind: bool = False,
    framework: str = "torch",
) -> Tensors:
    """Return the tensors of one rank (of all of them, for hf), or of one NUMA part, by name.

    Zero-copy, copy-on-write views of the memory-mapped files. `bind` copies the NUMA part into
    memory of its node. `framework="numpy"`: arrays; what numpy has no dtype for (BF16, FP8) has
    ml_dtypes' dtype where that is installed, else the bits as uint16 or uint8.
    Refused for a rank or part that the output does not have; VerifyFailed for an output that is
    unfinished or whose files are not those of the manifest.
    """
    if framework not in _MAKERS:
        raise UsageError(f"framework {framework!r} is not one of {', '.join(_MAKERS)}")
    if bind and numa is None:
        raise UsageError("bind=True places a NUMA part on its node", hint="say which: numa=0")
    finished = read_finished(Path(dst))
    files = chosen_files(finished, rank, numa)
    node = node_for(numa) if bind and numa is not None else None
    notes = []
    if node is not None and node != numa:
        notes.append(f"this machine has no NUMA node {numa}: its part lies on node {node}")
    if node is not None:
        _check_memory(sum(file.nbytes for file in files))
    stored: dict[str, _Stored] = {}
    for file in files:
        path = finished.root / file.name
        refs = _tensors(path, file)
        memory = _mapped(path, file) if node is None else _copied(path, file, node)
        stored.update({ref.name: _Stored(ref, memory) for ref in refs})
    return Tensors(stored, framework, node, tuple(notes))


def chosen_files(finished: Finished, rank: int, numa: int | None) -> tuple[RecordedFile, ...]:
    """Return the files of a rank, and of a NUMA part where one is asked for."""
    ranks = sorted({file.rank for file in finished.files})
    if rank not in ranks:
        raise Refused(
            f"the output has no rank {rank!r:.40}",
            where=str(finished.root),
            hint=f"it has ranks {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else "it has rank 0",
        )
    of_rank = [file for file in finished.files if file.rank == rank]
    if numa is None:
        return tuple(of_rank)
    parts = sorted({file.numa for file in of_rank if file.numa is not None})
    if numa not in parts:
        has = f"NUMA parts {parts[0]} to {parts[-1]}" if parts else "no NUMA parts"
        raise Refused(
            f"the output has no NUMA part {numa!r:.40}",
            where=str(finished.root),
            hint=f"a {finished.layout} output of {len(ranks)} ranks: it has {has}",
        )
    return tuple(file for file in of_rank if file.numa in (numa, None))


def expert_map(dst: Name, rank: int = 0) -> tuple[int, ...]:
    """Return the logical expert in each physical slot of a rank; Refused without such a map."""
    finished = read_finished(Path(dst))
    ranks = finished.facts["layout_facts"].get("experts")
    if not isinstance(ranks, list):
        raise Refused(
            f"a {finished.layout} output has no map of experts", hint="layouts with ranks have one"
        )
    if not 0 <= rank < len(ranks):
        raise Refused(f"the output has no rank {rank}", hint=f"it has ranks 0 to {len(ranks) - 1}")
    return tuple(ranks[rank])


def _tensors(path: Path, file: RecordedFile) -> tuple[TensorRef, ...]:
    """Return a file's tensors; VerifyFailed unless the header is the one that was written."""
    if not path.is_file():
        raise VerifyFailed("a file of the output is missing", where=str(path))
    try:
        header = read_header(path, file.name)
    except BadHeader as error:
        raise VerifyFailed(error.what, where=str(path), hint=_DAMAGED_HINT) from error
    expected = file.segments[0] if file.segments else None
    if expected is None or header.digest != expected.digest or header.file_nbytes != file.nbytes:
        what = "a file is not the one that the manifest tells of"
        raise VerifyFailed(what, where=str(path), hint=_DAMAGED_HINT)
    return header.tensors


def _mapped(path: Path, file: RecordedFile) -> mmap.mmap:
    """Return a private mapping of a whole file, writable without changing the file."""
    descriptor = open_regular(path, file.name)
    try:
        # No reservation: pages that nobody writes take no memory, and a file may be larger than it.
        flags = mmap.MAP_PRIVATE | MAP_NORESERVE
        return mmap.mmap(descriptor, 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except (OSError, ValueError) as error:
        raise Refused(f"the file cannot be mapped: {error}", where=str(path)) from error
    finally:
        os.close(descriptor)


def _copied(path: Path, file: RecordedFile, node: int) -> mmap.mmap:
    """Return memory of a NUMA node that holds the bytes of a whole file."""
    memory = bound_memory(file.nbytes, node).memory
    view = memoryview(memory)
    descriptor = open_regular(path, file.name)

    def copy(at: int) -> int:
        return read_range(descriptor, file.name, at, view[at : at + COPY_NBYTES])

    try:
        starts = range(0, file.nbytes, COPY_NBYTES)
        copied = sum(count for _, count in in_threads(copy, starts, COPY_THREADS))
    finally:
        os.close(descriptor)
        view.release()
    if copied != file.nbytes:
        raise VerifyFailed("the file became shorter while it was read", where=str(path))
    return memory


def _check_memory(nbytes: int) -> None:
    free = memory_limit()
    if nbytes > free:
        raise Refused(
            f"bind=True copies {human(nbytes)} into memory; {human(free)} are free",
            hint="load with bind=False",
        )


def _read_ahead(stored: _Stored) -> None:
    """Ask the kernel to begin reading a large tensor."""
    ref = stored.ref
    if ref.nbytes < READ_AHEAD_NBYTES or not hasattr(mmap, "MADV_WILLNEED"):
        return
    start = ref.offset // PAGE_NBYTES * PAGE_NBYTES
    with contextlib.suppress(OSError):  # advice only
        stored.memory.madvise(mmap.MADV_WILLNEED, start, ref.offset + ref.nbytes - start)


def _torch_tensor(stored: _Stored) -> Any:
    """Return torch's view [shape] of a tensor's bytes."""
    import torch

    ref = stored.ref
    dtype = torch_dtype(ref.dtype)
    if not ref.nbytes:
        return torch.empty(ref.shape, dtype=dtype)
    found = torch.frombuffer(
        stored.memory, dtype=dtype, count=element_count(ref.shape), offset=ref.offset
    )
    return found.reshape(ref.shape)


def _numpy_array(stored: _Stored) -> Any:
    """Return numpy's view [shape] of a tensor's bytes."""
    ref = stored.ref
    dtype = numpy_dtype(ref.dtype)
    count = element_count(ref.shape)
    return np.frombuffer(stored.memory, dtype, count, ref.offset).reshape(ref.shape)


@cache
def numpy_dtype(dtype: str) -> Any:
    """Return numpy's dtype, ml_dtypes' or that of the bits; Refused for less than a byte."""
    if dtype in NUMPY_DTYPES:
        return np.dtype(NUMPY_DTYPES[dtype])
    if dtype not in EXTENDED_DTYPES:
        raise Refused(f"numpy has no dtype for {dtype}")
    name, bits = EXTENDED_DTYPES[dtype]
    if importlib.util.find_spec("ml_dtypes") is None:
        return np.dtype(bits)
    return np.dtype(getattr(importlib.import_module("ml_dtypes"), name))


_MAKERS = {"torch": _torch_tensor, "numpy": _numpy_array}
