"""Which files of a directory are moeconv's own, by what it wrote down, and which a loader reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from moeconv.digest import json_digest
from moeconv.store.strictjson import UNPRINTABLE, JsonProblem, parse_object
from moeconv.types import Json

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")
# What a started plan and a manifest both say, and of what type.
_FIELDS: Mapping[str, type] = {
    "format": int,
    "plan": str,
    "source": str,
    "options": dict,
    "files": list,
}
_NAME_LISTS = ("auxiliary", "configs")
_MANIFEST_FIELDS: Mapping[str, type] = {"moeconv": str, "digest": str, "beside": dict}


def read_object(path: Path) -> Mapping[str, Json] | None:
    """Return the JSON object in a file; None where there is no file, or another thing in it."""
    try:
        return parse_object(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, JsonProblem):
        return None


def is_started(facts: Mapping[str, Json]) -> bool:
    """Return whether this is what a run writes down as it begins: types and names as it does."""
    return _has(facts, _FIELDS) and all(map(is_plain_name, facts["files"])) and _names_fit(facts)


def is_manifest(facts: Mapping[str, Json]) -> bool:
    """Return whether this has a manifest's types and names; its digest is another question."""
    if not _has(facts, _FIELDS) or not _has(facts, _MANIFEST_FIELDS) or not _names_fit(facts):
        return False
    entries = facts["files"]
    return (
        bool(entries)
        and all(_has(entry, {"name": str, "nbytes": int}) for entry in entries)
        and all(is_plain_name(entry["name"]) for entry in entries)
        and all(map(is_plain_name, facts["beside"]))
    )


def is_undamaged(facts: Mapping[str, Json]) -> bool:
    """Return whether a manifest is the one that its own digest names."""
    rest = {name: value for name, value in facts.items() if name != "digest"}
    return bool(json_digest(rest) == facts["digest"])


def _has(found: Json, fields: Mapping[str, type]) -> bool:
    return type(found) is dict and all(
        type(found.get(name)) is kind for name, kind in fields.items()
    )


def _names_fit(facts: Mapping[str, Json]) -> bool:
    lists = [facts[name] for name in _NAME_LISTS if facts.get(name) is not None]
    return all(type(names) is list and all(map(is_plain_name, names)) for names in lists)


def is_plain_name(name: Json) -> bool:
    """Return whether this names a file in a directory itself, neither above nor below it."""
    if type(name) is not str or name in ("", ".", "..") or UNPRINTABLE.search(name):
        return False
    return Path(name).name == name


def is_for_loaders(name: str) -> bool:
    """Return whether a loader may take the file for a model's: weights, an index, config.json."""
    return name == CONFIG or name.lower().endswith(WEIGHT_SUFFIXES)


def own_names(facts: Mapping[str, Json]) -> Iterator[str]:
    """Yield the names of the files that belong to an output, finished or begun.

    A begun whole model may already have its index and config.json: they come last.
    """
    for entry in facts["files"]:
        yield entry["name"] if isinstance(entry, dict) else entry
    for name in _NAME_LISTS:
        yield from facts.get(name) or ()
    yield from facts.get("beside") or ()
    if "digest" not in facts and _is_model(facts["options"]):
        yield CONFIG
        if facts["options"].get("layout") == "hf":
            yield INDEX


def _is_model(options: Mapping[str, Json]) -> bool:
    parts = ("experts_only", "include", "exclude")
    partial = options.get("layers") is not None or any(options.get(name) for name in parts)
    return options.get("layout") != "ktransformers" and not partial


def strangers(dst: Path, facts: Mapping[str, Json]) -> tuple[str, ...]:
    """Return the names in `dst` that a loader reads and moeconv did not write, sorted.

    kt-kernel reads a .safetensors file in any sub-directory too.
    """
    own = set(own_names(facts))
    deep = facts["options"].get("layout") == "ktransformers"
    found = []
    for entry in dst.iterdir():
        if entry.is_dir():
            if deep and any(entry.rglob("*.safetensors")):
                found.append(f"{entry.name}/")
        elif entry.name not in own and is_for_loaders(entry.name):
            found.append(entry.name)
    return tuple(sorted(found))
