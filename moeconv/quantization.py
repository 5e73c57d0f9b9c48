"""Which quantization a checkpoint's config files declare, module by module."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from moeconv.codecs.base import QuantScheme
from moeconv.errors import BadSource
from moeconv.quantization_fields import Origin, contradiction, wrong
from moeconv.quantization_methods import read_method
from moeconv.quantization_names import spell
from moeconv.quantization_rules import UNQUANTIZED, Declared, Rule
from moeconv.types import Json

CONFIG_FILE = "config.json"
QUANTIZATION_KEYS = ("quantization_config", "compression_config", "expert_dtype")
NATIVE_KEY = "quantization"  # Mistral's params.json
DTYPE_KEYS = ("dtype", "torch_dtype")
# Mistral's params.json "quantization", as transformers and llama.cpp read it.
NATIVE_WEIGHTS: Mapping[str, str] = {"fp8_e4m3": "fp8"}


class Place(NamedTuple):
    """Where a quantization may be declared, and the method where it names none."""

    file: str
    path: tuple[str, ...]
    method: str = ""


# Of several that agree, the first counts.
PLACES = (
    Place(CONFIG_FILE, ("quantization_config",)),
    Place(CONFIG_FILE, ("text_config", "quantization_config")),
    Place(CONFIG_FILE, ("compression_config",), "compressed-tensors"),
    Place(CONFIG_FILE, ("text_config", "compression_config"), "compressed-tensors"),
    Place(CONFIG_FILE, ("quantization",)),
    Place("hf_quant_config.json", (), "modelopt"),
    Place("quantize_config.json", (), "gptq"),
    Place("quant_config.json", (), "awq"),  # AutoAWQ before it wrote config.json
    Place("params.json", ("quantization_config",)),
    Place("params.json", ("quantization",)),
)


@dataclass(frozen=True, slots=True)
class Quantization:
    """What the config says of every module; `method` is "" where nothing is quantized."""

    method: str
    rules: tuple[Rule, ...]
    summary: str

    def scheme(self, module: str) -> QuantScheme:
        """Return the scheme of a module by its name in the checkpoint; method "" if it has none."""
        names = spell(module)
        for rule in self.rules:
            if rule.names.has(names):
                return rule.scheme
        return UNQUANTIZED


def read_quantization(
    config: Mapping[str, Json], extra_configs: Mapping[str, Json]
) -> Quantization:
    """Return the quantization that config.json and the files beside it (by name) declare.

    A BadSource names two places that contradict each other, an unknown method, a wrong field.
    """
    declared = [_read(raw, place, config) for place, raw in _found(config, extra_configs)]
    for one in declared[1:]:
        _check_agreement(declared[0], one)
    if not declared:
        return Quantization("", (), "none")
    chosen = next((one for one in declared if one.complete), None)
    if chosen is None:
        raise BadSource(
            "MIXED_PRECISION without quantized_layers: nothing says how each module is written",
            where=str(declared[0].origin),
            hint="put the checkpoint's hf_quant_config.json beside config.json",
        )
    return Quantization(chosen.method, chosen.rules, _summary(chosen))


def _found(
    config: Mapping[str, Json], extra_configs: Mapping[str, Json]
) -> Iterator[tuple[Place, Mapping[str, Json]]]:
    files = {**extra_configs, CONFIG_FILE: config}
    for place in PLACES:
        value: Json = files.get(place.file)
        for key in place.path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is None:
            continue
        if not isinstance(value, Mapping):
            raise wrong(_origin(place), value, "an object")
        yield place, value


def _origin(place: Place) -> Origin:
    return Origin(place.file, ".".join(place.path))


def _read(raw: Mapping[str, Json], place: Place, config: Mapping[str, Json]) -> Declared:
    origin = _origin(place)
    if "qformat_weight" in raw:
        return _read_native(raw, origin)
    method = raw.get("quant_method") or place.method
    if not isinstance(method, str) or not method:
        raise wrong(origin.below("quant_method"), raw.get("quant_method"), "a method's name")
    if method == "fp8" and config.get("expert_dtype") is not None:
        # DeepSeek-V4 says at the top level what V4.1 says in the quantization config.
        raw = {"expert_dtype": config["expert_dtype"], **raw}
    return read_method(method.lower(), raw, origin)


def _read_native(raw: Mapping[str, Json], origin: Origin) -> Declared:
    weights = raw["qformat_weight"]
    method = NATIVE_WEIGHTS.get(weights) if isinstance(weights, str) else None
    if method is None:
        expected = "one of " + ", ".join(NATIVE_WEIGHTS)
        raise wrong(origin.below("qformat_weight"), weights, expected)
    return read_method(method, {}, origin)  # one scale per tensor; qscheme_act is of activations


def _check_agreement(first: Declared, second: Declared) -> None:
    if first.method != second.method:
        names = (first.method or "none", second.method or "none")
        raise contradiction("quant_method", (first.origin, names[0]), (second.origin, names[1]))
    for name in first.facts.keys() & second.facts.keys():
        if first.facts[name] != second.facts[name]:
            raise contradiction(
                name, (first.origin, first.facts[name]), (second.origin, second.facts[name])
            )


def _summary(declared: Declared) -> str:
    """Return one line: the method, its schemes, and how many names are left out."""
    if not declared.method:
        return "none"
    schemes: list[str] = []
    for rule in declared.rules:
        text = " ".join(f"{name}={value}" for name, value in rule.scheme.values.items())
        if text and text not in schemes:
            schemes.append(text)
    pieces = [declared.method + (": " if schemes else "") + "; ".join(schemes)]
    if declared.skipped:
        pieces.append(f"not quantized: {_shortened(declared.skipped)}")
    return f"{'; '.join(pieces)} ({declared.origin})"


def _shortened(names: tuple[str, ...], shown: int = 6) -> str:
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")


def strip_quantization(config: Mapping[str, Json]) -> dict[str, Json]:
    """Return a deep copy that declares no quantization, for an output of plain numbers."""
    stripped = copy.deepcopy(dict(config))
    inner = [stripped[name] for name in stripped if name.endswith("_config")]
    for level in (stripped, *(one for one in inner if isinstance(one, dict))):
        for key in QUANTIZATION_KEYS:
            level.pop(key, None)
    if isinstance(stripped.get(NATIVE_KEY), dict):
        del stripped[NATIVE_KEY]
    return stripped


def with_dtype(config: Mapping[str, Json], dtype: str) -> dict[str, Json]:
    """Return a deep copy that says `dtype` ("bfloat16") under the key that it has, or torch_dtype.

    text_config follows where it says a dtype of its own.
    """
    changed = copy.deepcopy(dict(config))
    text = changed.get("text_config")
    for level in (changed, text if isinstance(text, dict) else {}):
        level.update({key: dtype for key in DTYPE_KEYS if key in level})
    if not any(key in changed for key in DTYPE_KEYS):
        changed["torch_dtype"] = dtype
    return changed
