"""Which modules a name, pattern or class in a quantization config speaks of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

# Checkpoints and configs name the same module with different prefixes: a config written by
# transformers says `model.language_model.layers`, the file `language_model.model.layers`.
SPELLINGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("language_model.model.", ("model.language_model.", "model.")),
    ("model.language_model.", ("language_model.model.", "model.")),
    ("language_model.", ("",)),
    ("layers.", ("model.layers.",)),  # DeepSeek-V4, Mistral native
)
# compressed_tensors `match_name(fused=...)`: a fused module is matched through its shards.
FUSED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("gate_up_proj", ("gate_proj", "up_proj")),
    ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
)
KINDS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("embedding", re.compile(r"(.*\.)?(embed_\w+|\w*embeddings?|wte|wpe)$")),
    ("norm", re.compile(r".*norm\w*$")),
)
LINEAR = "linear"
# Class names in a config, by a word in them; a class without such a word is some linear module.
CLASS_WORDS: tuple[tuple[str, str], ...] = (
    ("Embedding", "embedding"),
    ("Norm", "norm"),
    ("Attention", "attention"),
    ("Conv", "convolution"),
)
_CLASS = re.compile(r"[A-Z]\w*")
_WILDCARD = re.compile(r"[*?]")
# Groups that change their meaning inside a longer expression: back references, names, flags.
_NOT_JOINABLE = re.compile(r"\\[1-9]|\(\?[^:=!<]|\(\?<[^=!]")


class Module(NamedTuple):
    """A module name in every spelling that a config may use for it, and its kind."""

    names: tuple[str, ...]
    segments: tuple[str, ...]
    kind: str


@dataclass(frozen=True, slots=True)
class Names:
    """A set of modules.

    `exact`: whole names. `runs`: whole dotted segments anywhere in the name ("mlp.gate" has
    "x.mlp.gate" and "x.mlp.gate.y", not "x.mlp.gate_proj"). `patterns`: matched from the start of
    the name. `kind`: every module of this kind.
    """

    exact: frozenset[str] = frozenset()
    runs: frozenset[str] = frozenset()
    run_lengths: tuple[int, ...] = ()
    patterns: tuple[re.Pattern[str], ...] = ()
    kind: str = ""

    def has(self, module: Module) -> bool:
        """Return whether the module is one of these."""
        if self.kind and self.kind == module.kind:
            return True
        if self.exact and not self.exact.isdisjoint(module.names):
            return True
        if any(pattern.match(name) for pattern in self.patterns for name in module.names):
            return True
        return bool(self.runs) and self._has_run(module.segments)

    def _has_run(self, segments: tuple[str, ...]) -> bool:
        return any(
            ".".join(segments[start : start + length]) in self.runs
            for length in self.run_lengths
            for start in range(len(segments) - length + 1)
        )


def spell(name: str) -> Module:
    """Return the module of a name as the checkpoint has it: its spellings, shards and kind."""
    names = [name]
    for prefix, others in SPELLINGS:
        if name.startswith(prefix):
            names += [other + name[len(prefix) :] for other in others]
            break
    for suffix, shards in FUSED:
        if name.endswith(suffix):
            names += [one[: -len(suffix)] + shard for one in tuple(names) for shard in shards]
    kind = next((kind for kind, pattern in KINDS if pattern.match(name)), LINEAR)
    return Module(tuple(names), tuple(name.split(".")), kind)


def names_of(
    *,
    exact: Iterable[str] = (),
    runs: Iterable[str] = (),
    patterns: Iterable[str] = (),
    kind: str = "",
) -> Names:
    """Return the set of these names and patterns; a re.error has the bad pattern."""
    whole = frozenset(run.strip(".") for run in runs) - {""}
    lengths = tuple(sorted({run.count(".") + 1 for run in whole}))
    return Names(frozenset(exact), whole, lengths, _compile(tuple(patterns)), kind)


def _compile(patterns: Sequence[str]) -> tuple[re.Pattern[str], ...]:
    compiled = [re.compile(pattern) for pattern in patterns]
    joinable = [pattern for pattern in patterns if not _NOT_JOINABLE.search(pattern)]
    apart = [one for one in compiled if _NOT_JOINABLE.search(one.pattern)]
    if joinable:
        apart.append(re.compile("|".join(f"(?:{pattern})" for pattern in joinable)))
    return tuple(apart)


def is_class(target: str) -> bool:
    """Return whether a target of compressed-tensors is a class name ("Linear")."""
    return _CLASS.fullmatch(target) is not None


def class_kind(target: str) -> str:
    """Return the kind of module that a class name stands for."""
    return next((kind for word, kind in CLASS_WORDS if word in target), LINEAR)


def skip_names(entries: Iterable[str]) -> Names:
    """Return the modules of a `modules_to_not_convert` list.

    transformers 5.23 `should_convert_module` reads an entry as a regex from the start up to a
    segment's end, or as a suffix; AutoAWQ as a substring. Whole segments anywhere cover the three
    without taking `gate_proj` for `gate`.
    """
    plain = [entry for entry in entries if not _has_regex(entry)]
    patterns = [f"(?:{_skip_pattern(e)})(?:(?<=\\.)|(?=\\.|$))" for e in entries if _has_regex(e)]
    return names_of(runs=plain, patterns=patterns)


def _has_regex(entry: str) -> bool:
    return re.fullmatch(r"[\w.\-]*", entry) is None


def _skip_pattern(entry: str) -> str:
    return _translate(entry) if entry.startswith("*") else entry


def wildcard_names(entries: Iterable[str]) -> Names:
    """Return the modules of a ModelOpt `exclude_modules` list and everything below them.

    `*` and `?` as in fnmatch over the whole name: "layers.1*" has layers.1 and layers.10.
    """
    entries = tuple(entries)
    wild = [f"(?:{_translate(entry)})(?:\\.|$)" for entry in entries if _WILDCARD.search(entry)]
    return names_of(runs=(e for e in entries if not _WILDCARD.search(e)), patterns=wild)


def _translate(entry: str) -> str:
    return re.escape(entry).replace(r"\*", ".*").replace(r"\?", ".")
