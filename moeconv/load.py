"""Tensors of a finished output, straight from its memory-mapped files."""

from __future__ import annotations

import contextlib
import importlib.util
import mmap
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from moeconv.errors import BadHeader, Refused, UsageError, VerifyFailed
from moeconv.finished import Finished, RecordedFile, read_finished
from moeconv.mapping import PAGE_NBYTES, Stored, copied, mapped
from moeconv.numa import node_for
from moeconv.store.safetensors import read_header
from moeconv.store.space import human, memory_limit
from moeconv.torch_dtypes import torch_dtype
from moeconv.types import TensorRef, element_count

Name = str | PathLike[str]

_DAMAGED_HINT = "moeconv verify says what is damaged"
READ_AHEAD_NBYTES = 1 << 20  # tensors from here on are read ahead when they are asked for
_NUMA_NAME = re.compile(r"\.numa\.(\d+)\.")

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


class Tensors(Mapping[str, Any]):
    """Tensor by name, made when asked for: a view of memory that lives as long as a view of it.

    Writing to a tensor changes this process's copy of the pages it touches, never the file.
    `bound_node`: the NUMA node that holds all of it, None where nothing was bound. `notes`: what a
    caller should know.
    """

    def __init__(
        self,
        stored: Mapping[str, Stored],
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
    files = chosen_tensors(finished, chosen_files(finished, rank), numa)
    node = node_for(numa) if bind and numa is not None else None
    notes = []
    if node is not None and node != numa:
        notes.append(f"this machine has no NUMA node {numa}: its part lies on node {node}")
    if node is not None:
        _check_memory(sum(ref.nbytes for _, refs in files for ref in refs))
    stored: dict[str, Stored] = {}
    for file, refs in files:
        path = finished.root / file.name
        if node is not None:
            stored.update(copied(path, file, refs, node))
        elif refs:
            memory = mapped(path, file)
            stored.update({ref.name: Stored(ref, memory) for ref in refs})
    return Tensors(stored, framework, node, tuple(notes))


def chosen_files(finished: Finished, rank: int) -> tuple[RecordedFile, ...]:
    """Return the files of a rank; Refused names the ranks that there are."""
    ranks = sorted({file.rank for file in finished.files})
    if rank not in ranks:
        raise Refused(
            f"the output has no rank {rank!r:.40}",
            where=str(finished.root),
            hint=f"it has ranks {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else "it has rank 0",
        )
    return tuple(file for file in finished.files if file.rank == rank)


def numa_part(file: RecordedFile, name: str) -> int | None:
    """Return the NUMA part that a tensor is of, None where it is of all of them.

    kt-kernel's names say it: blk.0.ffn_up_exps.3.numa.1.weight.
    """
    found = _NUMA_NAME.search(name)
    return file.numa if found is None else int(found[1])


def chosen_tensors(
    finished: Finished, files: Sequence[RecordedFile], numa: int | None
) -> list[tuple[RecordedFile, tuple[TensorRef, ...]]]:
    """Return the tensors of each file, those of one NUMA part where one is asked for."""
    tensors = [(file, _tensors(finished.root / file.name, file)) for file in files]
    if numa is None:
        return tensors
    parts = {numa_part(file, ref.name) for file, refs in tensors for ref in refs} - {None}
    if numa not in parts:
        has = ", ".join(str(part) for part in sorted(part for part in parts if part is not None))
        raise Refused(
            f"the output has no NUMA part {numa!r:.40}",
            where=str(finished.root),
            hint=f"a {finished.layout} output: it has NUMA parts {has or '(none)'}",
        )
    return [
        (file, tuple(ref for ref in refs if numa_part(file, ref.name) in (numa, None)))
        for file, refs in tensors
    ]


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


def _check_memory(nbytes: int) -> None:
    free = memory_limit()
    if nbytes > free:
        raise Refused(
            f"bind=True copies {human(nbytes)} into memory; {human(free)} are free",
            hint="load with bind=False",
        )


def _read_ahead(stored: Stored) -> None:
    """Ask the kernel to begin reading a large tensor."""
    ref = stored.ref
    if ref.nbytes < READ_AHEAD_NBYTES or not hasattr(mmap, "MADV_WILLNEED"):
        return
    start = ref.offset // PAGE_NBYTES * PAGE_NBYTES
    with contextlib.suppress(OSError):  # advice only
        stored.memory.madvise(mmap.MADV_WILLNEED, start, ref.offset + ref.nbytes - start)


def _torch_tensor(stored: Stored) -> Any:
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


def _numpy_array(stored: Stored) -> Any:
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
