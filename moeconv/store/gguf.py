"""GGUF sources: one file, a split model's files, or a directory that holds one model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import xxhash

from moeconv.errors import BadSource
from moeconv.gguf_config import config_from_metadata
from moeconv.store.gguf_header import GgufHeader, read_header
from moeconv.store.shards import read_whole, shorten
from moeconv.store.source import (
    CONFIG,
    Source,
    list_auxiliary,
    list_entries,
    parse_config_file,
)
from moeconv.types import Json, TensorRef

SUFFIX = ".gguf"
METADATA = "gguf"  # the extra config that holds the metadata of the (first) file

_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<total>[0-9]{5})\.gguf")
# Not models, but published beside them: vision projectors, importance matrices.
_COMPANIONS = ("mmproj", "imatrix")
_COMPANION_TYPES = ("mmproj", "imatrix", "adapter")
_MAX_CONFIG_NBYTES = 10_000_000
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


class _Choice(NamedTuple):
    """The files of one model, in the order of their numbers."""

    root: Path
    names: tuple[str, ...]
    notes: tuple[str, ...] = ()


def open_gguf(path: Path, *, config: Path | None = None) -> Source:
    """Return what a .gguf file (its split siblings found) or a directory holds, from headers.

    The config is the given one, else the config.json beside the file, else what the metadata says
    of an architecture that moeconv knows, else {}. Quantized tensors have the dtype `GGML:<type>`
    and a shape that counts bytes: [..., rows, bytes per row].
    """
    choice = _choose_in(path) if path.is_dir() else _choose_file(path)
    headers = {name: read_header(choice.root / name, name) for name in choice.names}
    metadata = headers[choice.names[0]].metadata
    _check_kind(metadata, choice.names[0])
    if len(headers) > 1 or "split.count" in metadata:
        _check_split(headers)
    tensors = _join(headers)
    found, raw, notes = _config(choice.root, config, metadata, tensors)
    beside = os.path.lexists(choice.root / CONFIG)
    auxiliary, left = list_auxiliary(list_entries(choice.root)) if beside else ((), ())
    return Source(
        root=choice.root,
        kind="gguf",
        config=found,
        tensors=tensors,
        files={name: choice.root / name for name in headers},
        sizes={name: header.file_nbytes for name, header in headers.items()},
        auxiliary=auxiliary,
        extra_configs={METADATA: metadata},
        fingerprint=_fingerprint(headers, raw),
        notes=(*choice.notes, *notes, *_tokenizer_note(metadata, auxiliary), *left),
    )


def _choose_file(path: Path) -> _Choice:
    split = _SPLIT.fullmatch(path.name)
    if split is None:
        return _Choice(path.parent, (path.name,))
    present = tuple(list_entries(path.parent))
    return _split_choice(path.parent, split["stem"], split["total"], present)


def _choose_in(root: Path) -> _Choice:
    """Return the one model of a directory; BadSource names several, or says there is none."""
    every = [name for name in list_entries(root) if name.endswith(SUFFIX)]
    skipped = [name for name in every if any(word in name.lower() for word in _COMPANIONS)]
    models: dict[tuple[str, str], None] = {}
    for name in every:
        split = _SPLIT.fullmatch(name)
        if name not in skipped:
            models[(split["stem"], split["total"]) if split else (name, "")] = None
    if not models:
        raise BadSource("no model's .gguf file in this directory", where=str(root))
    if len(models) > 1:
        listed = shorten(
            f"{stem}-*-of-{total}{SUFFIX}" if total else stem for stem, total in models
        )
        raise BadSource(
            f"several models in this directory: {listed}",
            where=str(root),
            hint="give the one to convert, as a file; of a split one, any of its files",
        )
    notes = (f"not part of the model, left out: {shorten(skipped)}",) if skipped else ()
    ((stem, total),) = models
    if not total:
        return _Choice(root, (stem,), notes)
    return _split_choice(root, stem, total, every)._replace(notes=notes)


def _split_choice(root: Path, stem: str, total: str, present: Sequence[str]) -> _Choice:
    names = tuple(f"{stem}-{number + 1:05d}-of-{total}{SUFFIX}" for number in range(int(total)))
    missing = [name for name in names if name not in set(present)]
    if missing or not names:
        raise BadSource(
            f"{len(missing)} of the model's {int(total)} files are missing: {shorten(missing)}",
            where=str(root),
            hint="download them into the same directory",
        )
    return _Choice(root, names)


def _check_kind(metadata: Mapping[str, Json], name: str) -> None:
    kind = metadata.get("general.type")
    if kind in _COMPANION_TYPES or metadata.get("general.architecture") == "clip":
        raise BadSource(
            f"this file holds no model ({kind or 'clip'})",
            where=name,
            hint="give the model's own .gguf file",
        )


def _check_split(headers: Mapping[str, GgufHeader]) -> None:
    """Refuse files that contradict each other or their names on how the model is split."""
    tensor_count = sum(len(header.tensors) for header in headers.values())
    for index, (name, header) in enumerate(headers.items()):
        expected = {
            "split.count": len(headers),
            "split.no": index,
            "split.tensors.count": tensor_count,
        }
        _check_part(name, header.metadata, expected)
    found = {header.metadata.get("general.architecture") for header in headers.values()} - {None}
    if len(found) > 1:
        what = f"the files are of different architectures: {shorten(sorted(map(str, found)))}"
        raise BadSource(what, where=shorten(headers))


def _check_part(name: str, metadata: Mapping[str, Json], expected: Mapping[str, int]) -> None:
    count = metadata.get("split.count")
    if count == 0 and expected["split.count"] == 1:
        return  # what llama.cpp writes into a model that was put together again
    if count != expected["split.count"] and _SPLIT.fullmatch(name) is None:
        what = f"this is one of {count} files of a split model, but is not named like one"
        raise BadSource(what, where=name, hint="the names end in -00001-of-0000N.gguf")
    for key, value in expected.items():
        if metadata.get(key, value if key != "split.count" else None) != value:
            raise BadSource(
                f"{key} is {metadata.get(key)}, by the names and files it should be {value}",
                where=name,
                hint="the files are not of one model, or were renamed: download them again",
            )


def _join(headers: Mapping[str, GgufHeader]) -> Mapping[str, TensorRef]:
    tensors: dict[str, TensorRef] = {}
    for header in headers.values():
        for ref in header.tensors:
            if ref.name in tensors:
                where = f"{tensors[ref.name].file} and {ref.file}"
                raise BadSource(f"tensor {ref.name} is in two files", where=where)
            tensors[ref.name] = ref
    if not tensors:
        raise BadSource("no tensors in the source", where=shorten(headers))
    return tensors


def _config(
    root: Path,
    given: Path | None,
    metadata: Mapping[str, Json],
    tensors: Mapping[str, TensorRef],
) -> tuple[Mapping[str, Json], bytes, tuple[str, ...]]:
    """Return the config, the bytes it was read from (none where it was made), and notes."""
    beside = root / CONFIG
    if given is None and not os.path.lexists(beside):
        made = config_from_metadata(metadata, tensors)
        if made is not None:
            return made, b"", ("config.json is made from the GGUF metadata",)
        name = metadata.get("general.architecture")
        return {}, b"", (f"no config can be made for the GGUF architecture {name!r}: --config",)
    name = CONFIG if given is None else str(given)
    raw = read_whole(given or beside, name, _MAX_CONFIG_NBYTES)
    return parse_config_file(raw, name), raw, (f"the config is {name}",)


def _tokenizer_note(metadata: Mapping[str, Json], auxiliary: Sequence[str]) -> tuple[str, ...]:
    inside = any(key.startswith("tokenizer.ggml.") for key in metadata)
    if not inside or any(name in auxiliary for name in _TOKENIZERS):
        return ()
    return (
        "the tokenizer inside the GGUF file is not converted: put the model's tokenizer files "
        "beside the output",
    )


def _fingerprint(headers: Mapping[str, GgufHeader], config: bytes) -> str:
    files = [[name, found.file_nbytes, found.digest] for name, found in sorted(headers.items())]
    texts = [[CONFIG, xxhash.xxh3_128_hexdigest(config)]] if config else []
    return xxhash.xxh3_128_hexdigest(json.dumps([files, texts]).encode())
