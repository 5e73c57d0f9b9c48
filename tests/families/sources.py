"""Sources made from lists of names: {pattern: [dtype, shape, count]}, N for any index."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moeconv.store.source import Source
from moeconv.types import TensorRef, tensor_nbytes

FILE = "model.safetensors"
# Modules of layers without experts: the first layers. Whatever else only some layers have is in
# the last ones.
_DENSE = re.compile(
    r"\.(mlp|feed_forward|block_sparse_moe)\.(gate_proj|up_proj|down_proj|linear_gate|w[123])\."
)
_LAYER_FIELDS = ("num_hidden_layers", "num_layers", "n_layers")


class Names(NamedTuple):
    """One entry of a list of names: what a checkpoint's config and headers say."""

    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]


def read_names(entry: Mapping[str, Any], experts: int) -> Names:
    """Return an entry's config and its tensors under the names that a checkpoint has."""
    layers = layer_count(entry["config"])
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for pattern, (dtype, shape, count) in entry["tensors"].items():
        names = expand(pattern, count, layers, experts)
        assert not tensors.keys() & set(names)
        tensors |= {name: (dtype, tuple(shape)) for name in names}
    return Names(entry["config"], tensors)


def layer_count(config: Mapping[str, Any]) -> int:
    for section in (config.get("text_config"), config.get("llm_config"), config):
        for field in _LAYER_FIELDS:
            if section and section.get(field):
                return int(section[field])
    return len(config["layers_block_type"])


def expand(pattern: str, count: int, layers: int, experts: int) -> list[str]:
    """Return `count` names for a pattern: all experts of as many layers as the count allows."""
    words = pattern.split(".")
    places = [index for index, word in enumerate(words) if word == "N"]
    if not places:
        assert count == 1
        return [pattern]
    sizes = [experts if words[index - 1] == "experts" else 0 for index in places]
    rest = count // max(experts if experts in sizes else 1, 1)
    free = [index for index, size in enumerate(sizes) if not size]
    for index in free[1:]:
        sizes[index] = max(rest // layers, 1)
        rest //= sizes[index]
    if free:
        sizes[free[0]] = rest
    ranges = [range(size) for size in sizes]
    if free and rest <= layers and not _DENSE.search(pattern):
        ranges[free[0]] = range(layers - rest, layers)
    names = []
    for indices in itertools.product(*ranges):
        for place, index in zip(places, indices, strict=True):
            words[place] = str(index)
        names.append(".".join(words))
    assert len(names) == count, pattern
    return names


def source_of(names: Names, root: Path, *, native: bool = False) -> Source:
    """Return a source with these headers; its one file is written where payloads are peeked at.

    weight_shape says what its weight_packed of 4-bit codes has; all other bytes are zeros.
    """
    refs: dict[str, TensorRef] = {}
    offset = 0
    for name, (dtype, shape) in names.tensors.items():
        nbytes = tensor_nbytes(dtype, shape)
        refs[name] = TensorRef(name, dtype, shape, FILE, offset, nbytes)
        offset += nbytes
    with open(root / FILE, "wb") as file:
        file.truncate(offset)
        for name, ref in refs.items():
            packed = refs.get(name.removesuffix("shape") + "packed")
            if packed is not None and name.endswith(".weight_shape"):
                rows, words = packed.shape
                file.seek(ref.offset)
                file.write(np.array([rows, words * 8], np.int32).tobytes())
    return Source(
        root=root,
        kind="safetensors",
        config={} if native else names.config,
        tensors=refs,
        files={FILE: root / FILE},
        sizes={FILE: offset},
        auxiliary=(),
        extra_configs={"params.json": names.config} if native else {},
        fingerprint="",
        notes=(),
    )
