"""Small checkpoints for the tests of sources."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from moeconv.store.safetensors import build_header

CONFIG = {"model_type": "mixtral", "num_local_experts": 4}
INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def weights(path: Path, names: Iterable[str]) -> None:
    rows = [(name, "U8", (4,), 4) for name in names]
    path.write_bytes(build_header(rows, {"format": "pt"}, 8) + bytes(4 * len(rows)))


def put(path: Path, value: object) -> None:
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def write_index(root: Path, weight_map: object, name: str = INDEX, **metadata: object) -> None:
    put(root / name, {"metadata": metadata, "weight_map": weight_map})


def write_model(root: Path) -> Path:
    """Write a model of two shards with an index, and return its directory."""
    root.mkdir()
    weights(root / FIRST, ["a", "b"])
    weights(root / SECOND, ["c"])
    write_index(root, {"a": FIRST, "b": FIRST, "c": SECOND}, total_size=12)
    put(root / "config.json", CONFIG)
    return root
