"""How each quant_method declares what it did to which module: one reader per kind of config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from moeconv.codecs.base import QuantScheme
from moeconv.errors import BadSource
from moeconv.quantization_compressed import read_compressed
from moeconv.quantization_fields import (
    Field,
    Origin,
    read_block,
    read_fields,
    read_names,
    read_object,
)
from moeconv.quantization_modelopt import read_modelopt
from moeconv.quantization_names import LINEAR, Names, names_of
from moeconv.quantization_rules import UNQUANTIZED, Declared, Rule, pattern_names, read_skips
from moeconv.types import Json


class Uniform(NamedTuple):
    """A method with one scheme for the whole model, less the modules that it skips."""

    fields: tuple[Field, ...] = ()
    block: str = ""
    skips: tuple[str, ...] = ()
    dynamic: bool = False  # GPTQModel's overrides by pattern
    head: bool = False  # lm_head is left out unless `lm_head` is true


SKIPS = ("modules_to_not_convert", "ignored_layers")
BITS = Field("bits", "count", ("w_bit",), (2, 3, 4, 8), required=True)
GROUP = Field("group_size", "group", ("q_group_size",), required=True)
PACK_DTYPE = Field("pack_dtype", "word", (), ("int32",))
FP8_FIELDS = (
    Field("fmt", "word"),
    Field("scale_fmt", "word"),
    Field("expert_dtype", "word"),  # "fp4": DeepSeek-V4's experts are MXFP4 all the same
)
UNIFORM: Mapping[str, Uniform] = {
    "bitsandbytes": Uniform(
        (
            Field("load_in_4bit", "flag", ("_load_in_4bit",)),
            Field("load_in_8bit", "flag", ("_load_in_8bit",)),
            Field("bnb_4bit_quant_type", "word", (), ("nf4", "fp4")),
            Field("bnb_4bit_use_double_quant", "flag"),
            Field("bnb_4bit_quant_storage", "word"),
        ),
        skips=("llm_int8_skip_modules",),
    ),
    "gptq": Uniform(
        (
            BITS,
            GROUP,
            Field("desc_act", "flag"),
            Field("sym", "flag"),
            Field("checkpoint_format", "word", ("format",)),
            PACK_DTYPE,
        ),
        skips=SKIPS,
        dynamic=True,
        head=True,
    ),
    "awq": Uniform(
        (
            BITS,
            GROUP,
            Field("zero_point", "flag"),
            Field("version", "word", ("format", "checkpoint_format")),
            PACK_DTYPE,
        ),
        skips=SKIPS,
        dynamic=True,
        head=True,
    ),
    "fp8": Uniform(FP8_FIELDS, block="weight_block_size", skips=SKIPS),
    "mxfp4": Uniform(skips=SKIPS),
    "mxfp8": Uniform(FP8_FIELDS, block="weight_block_size", skips=SKIPS),
}


def _read_uniform(row: Uniform, method: str, raw: Mapping[str, Json], origin: Origin) -> Declared:
    values = read_fields(row.fields, raw, origin)
    if row.block:
        values |= read_block(raw, row.block, origin)
    skipped = tuple(entry for name in row.skips for entry in read_names(raw, name, origin))
    rules: list[Rule] = []
    facts = dict(values)
    if row.head and not read_fields((Field("lm_head", "flag"),), raw, origin).get("lm_head"):
        rules.append(Rule(names_of(exact=("lm_head", "model.lm_head")), UNQUANTIZED))
    if skipped:
        rules.append(Rule(read_skips(skipped, origin), UNQUANTIZED))
    if row.dynamic:
        for pattern, scheme in _overrides(row, QuantScheme(method, values), raw, origin):
            rules.append(Rule(pattern_names((pattern,), origin.below("dynamic")), scheme))
            facts |= {f"dynamic.{pattern}.{name}": value for name, value in scheme.values.items()}
    rules.append(Rule(Names(kind=LINEAR), QuantScheme(method, values)))
    return Declared(method, origin, tuple(rules), facts, skipped)


def _overrides(
    row: Uniform, scheme: QuantScheme, raw: Mapping[str, Json], origin: Origin
) -> list[tuple[str, QuantScheme]]:
    """Return (pattern, scheme) in the config's order: GPTQModel `dynamic_get`, first match wins."""
    result = []
    place = origin.below("dynamic")
    dynamic = read_object(raw, "dynamic", origin)
    for pattern in dynamic:
        if pattern.startswith("-:"):
            result.append((pattern.removeprefix("-:"), UNQUANTIZED))
            continue
        changes = read_fields(
            row.fields, read_object(dynamic, pattern, place), place.below(pattern), partial=True
        )
        changed = QuantScheme(scheme.method, {**scheme.values, **changes})
        result.append((pattern.removeprefix("+:"), changed))
    return result


def _read_none(raw: Mapping[str, Json], origin: Origin) -> Declared:
    return Declared("", origin, (), {}, ())


METHODS: Mapping[str, Callable[[Mapping[str, Json], Origin], Declared]] = {
    **{method: partial(_read_uniform, row, method) for method, row in UNIFORM.items()},
    "compressed-tensors": read_compressed,
    "modelopt": read_modelopt,
    "none": _read_none,
}


def read_method(method: str, raw: Mapping[str, Json], origin: Origin) -> Declared:
    """Return what a config of this quant_method declares."""
    reader = METHODS.get(method)
    if reader is None:
        raise BadSource(
            f"quant_method {method!r} is not known; known: {', '.join(sorted(METHODS))}",
            where=str(origin),
            hint="convert a checkpoint in one of the known methods, or the unquantized original",
        )
    return reader(raw, origin)
