"""Which safetensors files of a directory are the model: by its index, else by their names."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from moeconv.errors import BadSource
from moeconv.store.reader import open_regular, read_range
from moeconv.store.strictjson import UNPRINTABLE, JsonProblem, parse_object
from moeconv.types import Json, TensorRef

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
MAIN_INDEX = "model" + INDEX_SUFFIX
MAIN_FILE = "model" + SUFFIX

_MAX_INDEX_NBYTES = 100_000_000
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{1,9})-of-(?P<total>[0-9]{1,9})\.safetensors")
_SHOWN = 5


class Choice(NamedTuple):
    """The files that count, and, where an index says it, the file of every tensor."""

    names: tuple[str, ...]
    weight_map: Mapping[str, str] | None = None
    total_nbytes: Json = None
    notes: tuple[str, ...] = ()


def shorten(names: Iterable[str]) -> str:
    """Return the first few names, quoted, and how many more there are."""
    every = list(names)
    shown = ", ".join(f"{name!r:.200}" for name in every[:_SHOWN])
    return shown + (f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else "")


def read_whole(path: Path, name: str, max_nbytes: int) -> bytes:
    """Return the bytes of a file that must not be larger than `max_nbytes`."""
    descriptor = open_regular(path, name)
    try:
        nbytes = os.fstat(descriptor).st_size
        if nbytes > max_nbytes:
            what = f"the file has {nbytes} bytes; {max_nbytes} are the most that make sense"
            raise BadSource(what, where=name)
        buffer = bytearray(nbytes)
        return bytes(buffer[: read_range(descriptor, name, 0, buffer)])
    finally:
        os.close(descriptor)


def find_index(names: Collection[str]) -> str | None:
    """Return the name of the index that decides, None where there is none."""
    found = sorted(name for name in names if name.endswith(INDEX_SUFFIX))
    if MAIN_INDEX in found:
        return MAIN_INDEX
    if len(found) > 1:
        raise BadSource(
            "more than one index, and none is called " + MAIN_INDEX,
            where=shorten(found),
            hint="give the index to use as SRC",
        )
    return found[0] if found else None


def choose_by_index(root: Path, index: str, present: Collection[str]) -> Choice:
    """Return the files that an index names; names that leave the directory are refused."""
    try:
        found = parse_object(read_whole(root / index, index, _MAX_INDEX_NBYTES))
    except JsonProblem as problem:
        raise BadSource(f"the index {problem}", where=index, hint="download it again") from None
    weight_map = found.get("weight_map")
    if type(weight_map) is not dict or not weight_map:
        raise BadSource("the index has no weight_map, or an empty one", where=index)
    for tensor, file in weight_map.items():
        fault = _name_fault(file)
        if fault:
            where = f"{index}, tensor {tensor!r:.200}"
            hint = "an index may name files beside it only; do not trust this source"
            raise BadSource(f"the file name {file!r:.200} {fault}", where=where, hint=hint)
    names = tuple(sorted(set(weight_map.values())))
    missing = [name for name in names if name not in present]
    if missing:
        what = f"{len(missing)} of {len(names)} files that the index names are missing"
        hint = "download them, or give the file to use as SRC"
        raise BadSource(f"{what}: {shorten(missing)}", where=index, hint=hint)
    metadata = found.get("metadata")
    total = metadata.get("total_size") if type(metadata) is dict else None
    return Choice(names, weight_map, total, _ignored(present, names))


def _name_fault(file: Json) -> str:
    if type(file) is not str:
        return "is not a string"
    if not file or file in (".", "..") or "/" in file or "\\" in file:
        return "is empty or leads out of the directory"
    if UNPRINTABLE.search(file):
        return "has control characters"
    return "" if file.endswith(SUFFIX) else f"does not end in {SUFFIX}"


def choose_one(name: str) -> Choice:
    """Return the one file that was asked for."""
    sharded = _SHARD.fullmatch(name) is not None
    return Choice((name,), notes=(f"one file of several: {name!r}",) if sharded else ())


def choose_by_name(present: Collection[str]) -> Choice:
    """Return the files that make a whole model by their names, or refuse and say why."""
    sets: dict[str, list[str]] = {}
    for name in sorted(present):
        match = _SHARD.fullmatch(name)
        key = f"{match['stem']}-*-of-{match['total']}" if match else name
        sets.setdefault(key, []).append(name)
    gaps = {key: _gap(key, names) for key, names in sets.items()}
    whole = [key for key, names in sets.items() if _is_main(names) and not gaps[key]]
    if len(whole) != 1 and len(sets) > 1:
        raise BadSource(
            "several safetensors files, no index, and no name says which ones are the model",
            where="; ".join(filter(None, [shorten(sorted(present)), *gaps.values()])),
            hint=f"give one file or an index as SRC, or add the {MAIN_INDEX} that belongs to them",
        )
    (chosen,) = whole or sets
    if gaps[chosen]:
        hint = "download the whole set, with its index"
        raise BadSource("a set of files is incomplete", where=gaps[chosen], hint=hint)
    return Choice(tuple(sets[chosen]), notes=_ignored(present, sets[chosen]))


def _is_main(names: list[str]) -> bool:
    sharded = _SHARD.fullmatch(names[0]) is not None
    return names[0].startswith("model") if sharded else names == [MAIN_FILE]


def _gap(key: str, names: list[str]) -> str:
    """Return which shards of a set are missing or there twice; "" for a whole set."""
    matches = [match for match in map(_SHARD.fullmatch, names) if match]
    if not matches:
        return ""
    total = int(matches[0]["total"])
    numbers = sorted(int(match["number"]) for match in matches)
    if len(numbers) == total and numbers == list(range(1, total + 1)):
        return ""
    there = set(numbers)
    absent = islice((number for number in range(1, total + 1) if number not in there), _SHOWN)
    listed = ", ".join(map(str, absent))
    return f"{key}: {len(numbers)} of {total} files" + (f", without {listed}" if listed else "")


def _ignored(present: Collection[str], chosen: Collection[str]) -> tuple[str, ...]:
    rest = sorted(set(present) - set(chosen))
    return (f"not part of the model: {shorten(rest)}",) if rest else ()


def join_tensors(choice: Choice, found: Iterable[TensorRef]) -> dict[str, TensorRef]:
    """Return every tensor by name; a tensor held twice, or not as the index says, is refused."""
    tensors: dict[str, TensorRef] = {}
    twice: list[TensorRef] = []
    for tensor in found:
        if tensors.setdefault(tensor.name, tensor) is not tensor:
            twice.append(tensor)
    if twice:
        names = shorten(tensor.name for tensor in twice)
        where = f"{tensors[twice[0].name].file}, {twice[0].file}"
        raise BadSource(f"tensors lie in two files: {names}", where=where)
    if choice.weight_map is not None:
        _check_agreement(choice.weight_map, tensors)
    return tensors


def _check_agreement(weight_map: Mapping[str, str], tensors: Mapping[str, TensorRef]) -> None:
    hint = "the index and the files are not of one version: download both again"
    absent = [
        name
        for name, file in weight_map.items()
        if name not in tensors or tensors[name].file != file
    ]
    if absent:
        what = f"tensors are not in the file that the index names: {shorten(absent)}"
        raise BadSource(what, where=weight_map[absent[0]], hint=hint)
    extra = [name for name in tensors if name not in weight_map]
    if extra:
        what = f"tensors that the index does not name: {shorten(extra)}"
        raise BadSource(what, where=tensors[extra[0]].file, hint=hint)
