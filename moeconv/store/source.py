"""What a source holds: its tensors, its config and what lies beside them, from headers alone."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import xxhash

from moeconv.errors import BadSource, UsageError
from moeconv.store.safetensors import Header, read_header
from moeconv.store.shards import (
    INDEX_SUFFIX,
    SUFFIX,
    Choice,
    choose_by_index,
    choose_by_name,
    choose_one,
    find_index,
    join_tensors,
    read_whole,
    shorten,
)
from moeconv.store.strictjson import UNPRINTABLE, JsonProblem, parse_config
from moeconv.types import Json, TensorRef

CONFIG = "config.json"
NATIVE_CONFIG = "params.json"  # of Mistral's own format, which has no config.json
EXTRA_CONFIGS = (
    "generation_config.json",
    "hf_quant_config.json",
    NATIVE_CONFIG,
    "quantize_config.json",
)

_Entries = dict[str, os.stat_result | None]
_GGUF_MODULE = "moeconv.store.gguf"
_MAX_CONFIG_NBYTES = 10_000_000
# What is larger and not known to be weights is left behind rather than copied.
_MAX_AUXILIARY_NBYTES = 256 << 20
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_WEIGHTS = (
    *(SUFFIX, ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".npz", ".npy", ".ot"),
    *(".tflite", ".mlmodel", ".zip", ".tar", ".gz", ".incomplete", ".partial", *_PICKLES),
)
# Written anew for an output, or wrong beside weights that are no longer quantized.
_NOT_COPIED = frozenset(
    {CONFIG, NATIVE_CONFIG, "hf_quant_config.json", "quantize_config.json", "quant_config.json"}
    | {"moeconv.json"}
)


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint at rest.

    `files`, `sizes`: name of each file with weights -> path to open, bytes; `auxiliary`: names of
    the files in `root` to copy beside an output; `extra_configs`: by file name; `fingerprint`:
    xxh3_128 of names, sizes, headers and configs, the same wherever the source lies.
    `config` is {} for Mistral's own format, whose params.json is an extra config.
    """

    root: Path
    kind: str
    config: Mapping[str, Json]
    tensors: Mapping[str, TensorRef]
    files: Mapping[str, Path]
    sizes: Mapping[str, int]
    auxiliary: tuple[str, ...]
    extra_configs: Mapping[str, Json]
    fingerprint: str
    notes: tuple[str, ...]


class _Configs(NamedTuple):
    """Parsed configs, and the bytes they were parsed from, by file name."""

    config: Mapping[str, Json]
    extra: Mapping[str, Json]
    raw: Mapping[str, bytes]
    notes: tuple[str, ...]


def open_source(path: Path, *, config: Path | None = None) -> Source:
    """Return what the directory, file or index `path` holds, read from headers alone.

    `config`: stands in for config.json.
    """
    mode = _mode(path)
    if stat.S_ISDIR(mode):
        return _open_directory(path, config)
    if not stat.S_ISREG(mode):
        raise BadSource("not a regular file (a pipe, socket or device)", where=str(path))
    if path.name.endswith(".gguf"):
        return _open_gguf(path, config)
    if path.name.endswith(INDEX_SUFFIX):
        entries = list_entries(path.parent)
        choice = choose_by_index(path.parent, path.name, _weight_names(entries))
        return _assemble(path.parent, entries, choice, config)
    if path.name.endswith(SUFFIX):
        entries = list_entries(path.parent)
        if config is not None and CONFIG not in entries:
            entries = {}  # a file among strangers: what lies beside it is not of this model
        return _assemble(path.parent, entries, choose_one(path.name), config)
    if path.name.endswith(_PICKLES):
        raise _pickles(str(path))
    hint = f"give a directory, a {SUFFIX} file, a {INDEX_SUFFIX} or a .gguf file"
    raise BadSource("a file of an unknown kind", where=str(path), hint=hint)


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the path
        raise UsageError(f"there is no {str(path)!r}", hint="check the path of SRC") from None
    except OSError as problem:
        raise _unreadable(path, problem) from problem


def _unreadable(path: Path, problem: OSError) -> BadSource:
    return BadSource(f"the source cannot be read: {problem.strerror}", where=str(path))


def _open_directory(root: Path, config: Path | None) -> Source:
    entries = list_entries(root)
    present = _weight_names(entries)
    index = find_index(entries)
    if index is not None:
        return _assemble(root, entries, choose_by_index(root, index, present), config)
    if present:
        return _assemble(root, entries, choose_by_name(present), config)
    if any(name.endswith(".gguf") for name in entries):
        return _open_gguf(root, config)
    if any(name.endswith(_PICKLES) for name in entries):
        raise _pickles(str(root))
    hint = "give the directory that holds the model's .safetensors files"
    if (root / "snapshots").is_dir():
        hint = "this is a hub cache: give one directory in its snapshots/"
    raise BadSource("no .safetensors file in this directory", where=str(root), hint=hint)


def _open_gguf(path: Path, config: Path | None) -> Source:
    if importlib.util.find_spec(_GGUF_MODULE) is None:
        raise BadSource("GGUF sources are not supported", where=str(path))
    module = importlib.import_module(_GGUF_MODULE)
    return cast(Source, module.open_gguf(path, config=config))


def _pickles(where: str) -> BadSource:
    return BadSource(
        "PyTorch pickles are not read: opening one runs the code in it",
        where=where,
        hint="download the model's safetensors, or load it where you trust it and call "
        "save_pretrained(..., safe_serialization=True)",
    )


def list_entries(root: Path) -> _Entries:
    """Return what lies in a directory by name, hidden names left out; None: a broken link."""
    found: _Entries = {}
    try:
        with os.scandir(root) as entries:
            names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    except OSError as problem:
        raise _unreadable(root, problem) from problem
    for name in names:
        try:
            found[name] = (root / name).stat()
        except OSError:
            found[name] = None
    return found


def _weight_names(entries: _Entries) -> list[str]:
    """Return the names that look like weights; a broken link counts, a directory does not."""
    return [
        name
        for name, found in entries.items()
        if name.endswith(SUFFIX) and not (found and stat.S_ISDIR(found.st_mode))
    ]


def _assemble(root: Path, entries: _Entries, choice: Choice, config: Path | None) -> Source:
    """Return the source that the chosen files make."""
    for name in choice.names:
        if UNPRINTABLE.search(name):
            raise BadSource("a file name has control characters", where=repr(name))
    headers = {name: read_header(root / name, name) for name in choice.names}
    tensors = join_tensors(choice, (ref for found in headers.values() for ref in found.tensors))
    if not tensors:
        raise BadSource("no tensors in the source", where=shorten(choice.names))
    configs = _read_configs(root, entries, choice.names, config)
    auxiliary, left = list_auxiliary(entries)
    return Source(
        root=root,
        kind="safetensors",
        config=configs.config,
        tensors=tensors,
        files={name: root / name for name in headers},
        sizes={name: found.file_nbytes for name, found in headers.items()},
        auxiliary=auxiliary,
        extra_configs=configs.extra,
        fingerprint=_fingerprint(headers, configs.raw),
        notes=(*choice.notes, *_total_note(choice, tensors), *configs.notes, *left),
    )


def _total_note(choice: Choice, tensors: Mapping[str, TensorRef]) -> tuple[str, ...]:
    total = sum(tensor.nbytes for tensor in tensors.values())
    if choice.total_nbytes is None or choice.total_nbytes == total:
        return ()
    return (f"the index says total_size {choice.total_nbytes!r:.40}, the tensors take {total}",)


def _read_configs(
    root: Path, entries: _Entries, weights: tuple[str, ...], given: Path | None
) -> _Configs:
    raw = {
        name: read_whole(root / name, name, _MAX_CONFIG_NBYTES)
        for name in EXTRA_CONFIGS
        if name in entries
    }
    extra = {name: parse_config_file(data, name) for name, data in raw.items()}
    inside = CONFIG in entries
    if given is not None:
        _mode_of_option(given)
        note = (f"{CONFIG} is not used: another config was given",) if inside else ()
        raw[CONFIG] = read_whole(given, str(given), _MAX_CONFIG_NBYTES)
        return _Configs(parse_config_file(raw[CONFIG], str(given)), extra, raw, note)
    if inside:
        raw[CONFIG] = read_whole(root / CONFIG, CONFIG, _MAX_CONFIG_NBYTES)
        return _Configs(parse_config_file(raw[CONFIG], CONFIG), extra, raw, ())
    if NATIVE_CONFIG in extra and all(name.startswith("consolidated") for name in weights):
        note = (f"Mistral's own format: {NATIVE_CONFIG} stands for {CONFIG}",)
        return _Configs({}, extra, raw, note)
    raise BadSource(f"there is no {CONFIG}", where=str(root), hint="give one: --config FILE")


def _mode_of_option(path: Path) -> None:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise UsageError(f"there is no {str(path)!r}", hint="check the path of --config") from None
    except OSError as problem:
        raise _unreadable(path, problem) from problem


def parse_config_file(data: bytes, name: str) -> Mapping[str, Json]:
    """Return the JSON object of a config file; BadSource names what is wrong with it."""
    try:
        return parse_config(data)
    except JsonProblem as problem:
        raise BadSource(f"the config {problem}", where=name, hint="download it again") from None


def list_auxiliary(entries: _Entries) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the files to copy beside an output, and a note on what is left out."""
    names: list[str] = []
    left: list[str] = []
    for name, found in entries.items():
        if name in _NOT_COPIED or name.endswith((".index.json", *_WEIGHTS)):
            continue
        if found is not None and stat.S_ISDIR(found.st_mode):
            continue
        usable = found is not None and stat.S_ISREG(found.st_mode) and not UNPRINTABLE.search(name)
        small = found is not None and found.st_size <= _MAX_AUXILIARY_NBYTES
        (names if usable and small else left).append(name)
    return tuple(names), (f"left out of a copy: {shorten(left)}",) if left else ()


def _fingerprint(headers: Mapping[str, Header], configs: Mapping[str, bytes]) -> str:
    files = [[name, found.file_nbytes, found.digest] for name, found in sorted(headers.items())]
    texts = [[name, xxhash.xxh3_128_hexdigest(data)] for name, data in sorted(configs.items())]
    return xxhash.xxh3_128_hexdigest(json.dumps([files, texts]).encode())
