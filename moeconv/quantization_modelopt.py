"""How ModelOpt declares its algorithms, in config.json and in hf_quant_config.json."""

from __future__ import annotations

from collections.abc import Mapping

from moeconv.codecs.base import QuantScheme
from moeconv.quantization_fields import Field, Origin, Value, read_fields, read_names, read_object
from moeconv.quantization_names import LINEAR, Names, names_of, wildcard_names
from moeconv.quantization_rules import UNQUANTIZED, Declared, Rule
from moeconv.types import Json

MIXED = "MIXED_PRECISION"
# ModelOpt's algorithms, and what the name alone fixes about the weights.
MODELOPT_ALGOS: Mapping[str, Mapping[str, Value]] = {
    "FP8": {},
    "FP8_PB_WO": {"block_rows": 128, "block_cols": 128},
    "FP8_PER_CHANNEL_PER_TOKEN": {},
    "MXFP8": {"group_size": 32},
    "NVFP4": {"group_size": 16},
    "NVFP4_AWQ": {"group_size": 16},
    "NVFP4_SVD": {"group_size": 16},
    "W4A16_AWQ": {},
    "W4A16_NVFP4": {"group_size": 16},
    "W4A8_AWQ": {},
    "W4A8_MXFP4_FP8": {"group_size": 32},
    "W4A8_NVFP4_FP8": {"group_size": 16},
    "W8A16": {},
    "W8A8_SQ_PER_CHANNEL": {},
    MIXED: {},
}
MODELOPT_FIELDS = (
    Field("quant_algo", "name", (), tuple(MODELOPT_ALGOS)),
    Field("group_size", "group"),
    Field("has_zero_point", "flag"),
    Field("pre_quant_scale", "flag"),
)


def read_modelopt(raw: Mapping[str, Json], origin: Origin) -> Declared:
    """Return what a ModelOpt config declares, in either of its two forms."""
    inner = read_object(raw, "quantization", origin)
    if inner:
        raw, origin = inner, origin.below("quantization")
    values = _modelopt_values(raw, origin)
    excluded = tuple(
        name for key in ("exclude_modules", "ignore") for name in read_names(raw, key, origin)
    )
    rules = [Rule(wildcard_names(excluded), UNQUANTIZED)]
    algo = values.get("quant_algo")
    layers = read_object(raw, "quantized_layers", origin)
    if algo == MIXED:
        rules += _layer_rules(layers, origin.below("quantized_layers"))
    elif algo is not None:  # null: only the KV cache is quantized
        rules.append(Rule(Names(kind=LINEAR), QuantScheme("modelopt", values)))
    complete = algo != MIXED or bool(layers)
    return Declared("modelopt", origin, tuple(rules), values, excluded, complete)


def _modelopt_values(raw: Mapping[str, Json], origin: Origin) -> dict[str, Value]:
    values = read_fields(MODELOPT_FIELDS, raw, origin)
    groups = read_object(raw, "config_groups", origin)
    for name in groups if "group_size" not in values and values.get("quant_algo") != MIXED else ():
        place = origin.below("config_groups").below(name)
        weights = read_object(
            read_object(groups, name, origin.below("config_groups")), "weights", place
        )
        values |= read_fields((Field("group_size", "group"),), weights, place.below("weights"))
    return {**MODELOPT_ALGOS[str(values.get("quant_algo", "FP8"))], **values}


def _layer_rules(layers: Mapping[str, Json], origin: Origin) -> list[Rule]:
    by_values: dict[tuple[tuple[str, Value], ...], list[str]] = {}
    for name in layers:
        values = _modelopt_values(read_object(layers, name, origin), origin.below(name))
        by_values.setdefault(tuple(sorted(values.items())), []).append(name)
    schemes = [(QuantScheme("modelopt", dict(key)), names) for key, names in by_values.items()]
    return [
        *(Rule(names_of(exact=names), scheme) for scheme, names in schemes),
        *(Rule(names_of(runs=names), scheme) for scheme, names in schemes),
    ]
