"""`--dtype keep` into the ktransformers layout: the quantized forms that kt-kernel reads.

Names, dtypes and groups as the loaders of kt-kernel 0.7.2 (utils/loader.py, utils/amx.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from moeconv.errors import Refused
from moeconv.layouts.base import Draft, Fill
from moeconv.layouts.raw import part_key
from moeconv.types import Key, Place, Span, Weight

PROJECTIONS = ("gate", "up", "down")
_MLP = "model.layers.{layer}.mlp.experts.{expert}.{name}_proj."
_MIXTRAL = "model.layers.{layer}.block_sparse_moe.experts.{expert}.{w}."
_DEEPSEEK4 = "layers.{layer}.ffn.experts.{expert}.{w}."
_W = {"gate": "w1", "up": "w3", "down": "w2"}
_FP8_SCALES = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")
_FLOATS = ("F32", "BF16", "F16")
RAWINT4_TILE = 128  # seen running: other sizes end AMXInt4_KGroup_MOE, on AVX-512 too
DECODE = "--dtype int4, int8 or bf16 decodes it"
LOADED = (
    f"{DECODE}; kt-kernel loads FP8 (blocks of 128 x 128 or per row), RAWINT4, GPTQ_INT4, MXFP4 "
    "and MXFP8 as they are stored"
)
UNUSED: Mapping[str, str] = {
    "qzeros": "symmetric: kt-kernel knows the zero point",
    "g_idx": "groups are in order: kt-kernel has no index of them",
    "weight_g_idx": "groups are in order: kt-kernel has no index of them",
    "weight_shape": "gate and up are one weight: its shape is neither's",
}
UNUSED_SCALE = "kt-kernel has no scales of activations"


class Need(NamedTuple):
    """A parameter of a codec, the one value that kt-kernel takes, and what any other one means."""

    param: str
    value: int | str | bool
    otherwise: str


class RawForm(NamedTuple):
    """A codec's form in kt-kernel.

    `parts`: stored part -> its name here. `multiple`: of both sides of a NUMA part, besides the
    groups. `scales`: dtypes of the scales. `clamps`: takes a swiglu_limit. `turned`: stored [K, N].
    """

    method: str
    key: str
    parts: Mapping[str, str]
    scales: tuple[str, ...]
    needs: tuple[Need, ...]
    multiple: int = 32
    clamps: bool = False
    turned: bool = False


_E4M3 = Need("dtype", "F8_E4M3", "its codes are {value}")
_FOUR = Need("bits", 4, "it has {value} bits")
_ORDER = Need("act_order", False, "its groups are in activation order (desc_act, g_idx)")
RAW_FORMS: Mapping[str, RawForm] = {
    "fp8-block": RawForm(
        "FP8",
        _MLP,
        {"weight": "weight", **dict.fromkeys(_FP8_SCALES, "weight_scale_inv")},
        (*_FLOATS, "F8_E8M0"),
        (
            _E4M3,
            Need("block_rows", 128, "its blocks have {value} rows, not 128"),
            Need("block_cols", 128, "its blocks have {value} columns, not 128"),
        ),
        multiple=128,
        clamps=True,
    ),
    "fp8-channel": RawForm(
        "FP8_PERCHANNEL",
        _MLP,
        {"weight": "weight", **dict.fromkeys(_FP8_SCALES, "weight_scale")},
        (*_FLOATS, "F8_E8M0"),
        (_E4M3,),
    ),
    "packed-int": RawForm(
        "RAWINT4",
        _MLP,
        {part: part for part in ("weight_packed", "weight_scale", "weight_shape")},
        ("BF16",),
        (
            _FOUR,
            Need("zeros", "absent", "it is asymmetric (zero points)"),
            _ORDER,
            Need("strategy", "group", "its scales are per {value}, not per group"),
        ),
    ),
    "gptq": RawForm(
        "GPTQ_INT4",
        _MLP,
        {"qweight": "qweight", "scales": "scales"},
        _FLOATS,
        (_FOUR, Need("sym", True, "it is asymmetric (zero points)"), _ORDER),
        turned=True,
    ),
    "mxfp4": RawForm(
        "MXFP4",
        _DEEPSEEK4,
        {
            **dict.fromkeys(("weight", "weight_packed", "blocks"), "weight"),
            **dict.fromkeys(("scale", "weight_scale", "scales"), "scale"),
        },
        ("F8_E8M0", "U8"),
        (),
        clamps=True,
    ),
    "mxfp8": RawForm(
        "MXFP8",
        _MIXTRAL,
        {"weight": "weight", **dict.fromkeys(_FP8_SCALES, "weight_scale_inv")},
        ("U8", "F8_E8M0"),
        (_E4M3,),
        clamps=True,
    ),
}
# What scales are called in the stored parts, to tell them from the codes.
_SCALE_PARTS = (*_FP8_SCALES, "scales")


def raw_form(places: Mapping[Key, Place]) -> RawForm | None:
    """Return the form that the decoder's experts are stored in; None: plain BF16.

    Refused where kt-kernel loads it not, or not all of them, as they are.
    """
    first: Weight | None = None
    for key, place in places.items():
        if key.stack != "main" or key.expert is None:
            continue
        weight = place.weight
        if first is None:
            first = weight
            _check_codec(weight)
        _check_alike(first, weight)
        _check_params(weight)
    return None if first is None else RAW_FORMS.get(first.codec)


def _check_codec(weight: Weight) -> None:
    stored = str(weight.params.get("dtype", ""))
    if weight.codec == "float" and stored != "BF16":
        raise Refused(
            f"'{weight.name}' is {stored}; kt-kernel takes plain experts in BF16",
            hint="--dtype bf16 rounds them; int4 and int8 pack them",
        )
    if weight.codec != "float" and weight.codec not in RAW_FORMS:
        raise Refused(
            f"'{weight.name}' is quantized as {weight.codec}, which kt-kernel does not load",
            hint=LOADED,
        )


def _check_alike(first: Weight, weight: Weight) -> None:
    """Raise Refused for experts of two kinds: kt-kernel has one method for all.

    It looks at the dtype of the first scale alone and reads all others as that.
    """
    for one, other in zip(_kind(first), _kind(weight), strict=True):
        if one != other:
            raise Refused(
                f"'{first.name}' and '{weight.name}' differ ({one}, {other}); kt-kernel has one "
                "method for all experts",
                hint=DECODE,
            )


def _kind(weight: Weight) -> tuple[str, ...]:
    """Return in words what all experts share."""
    names = RAW_FORMS[weight.codec].parts if weight.codec in RAW_FORMS else {"weight": "weight"}
    dtypes = sorted(
        f"{names[part]} {ref.dtype}" for part, ref in weight.parts.items() if part in names
    )
    return (
        weight.codec,
        ", ".join(dtypes),
        f"groups of {weight.params.get('group_size', 'none')}",
    )


def _check_params(weight: Weight) -> None:
    form = RAW_FORMS.get(weight.codec)
    if form is None:
        return
    for need in form.needs:
        value = weight.params.get(need.param)
        if value != need.value:
            problem = need.otherwise.format(value=value)
            raise Refused(
                f"'{weight.name}' is not kt-kernel's {form.method}: {problem}", hint=LOADED
            )
    for part, ref in weight.parts.items():
        if part in _SCALE_PARTS and part in form.parts and ref.dtype not in form.scales:
            raise Refused(
                f"'{ref.name}' is {ref.dtype}; kt-kernel's {form.method} takes scales in "
                f"{' or '.join(form.scales)}",
                hint=DECODE,
            )


def raw_multiple(form: RawForm, places: Mapping[Key, Place]) -> int:
    """Return what both sides of a NUMA part have to be multiples of: whole groups and tiles."""
    weight = next(one.weight for key, one in places.items() if key.expert is not None)
    group = int(weight.params.get("group_size", 0))
    return max(group, form.multiple)


def raw_notes(form: RawForm, places: Mapping[Key, Place], multiple: int) -> tuple[str, ...]:
    """Return what a user has to know to serve a form; `multiple`: what divides all sides."""
    weight = next(one.weight for key, one in places.items() if key.expert is not None)
    group = int(weight.params.get("group_size", 0))
    if form.method == "RAWINT4" and (group != 32 or multiple % RAWINT4_TILE):
        return (
            f"groups of {group}, sizes that {multiple} divides: kt-kernel's first backend for "
            f"RAWINT4 crashes or computes nonsense unless these are 32 and {RAWINT4_TILE}; its "
            "AVX-VNNI backend computes it: set KT_RAWINT4_BACKEND=avxvnni",
        )
    return ()


def raw_drafts(
    form: RawForm, held: Mapping[Key, Place], layer: int, experts: int
) -> Iterator[Draft]:
    """Yield the stored parts of each expert's projections; `held`: where the parts lie."""
    for expert in range(experts):
        for name in PROJECTIONS:
            key = form.key.format(layer=layer, expert=expert, name=name, w=_W[name])
            for part, renamed in form.parts.items():
                place = held.get(Key("main", layer, expert, part_key(name, part)))
                if place is None or (part == "weight_shape" and len(place.weight.projections) > 1):
                    continue
                yield _draft(form, f"{key}{renamed}", place, (layer, expert, part_key(name, part)))


def _draft(form: RawForm, name: str, place: Place, at: tuple[int, int, str]) -> Draft:
    layer, expert, key = at
    rows, cols = place.rows.length, place.weight.cols
    shape: tuple[int, ...] = (cols, rows) if form.turned else (rows, cols)
    if key.endswith("/weight_shape"):
        shape = (cols,)
    fill = Fill(
        "main",
        layer,
        key,
        (expert,),
        Span(0, rows),
        Span(0, cols),
        own_rows=rows,
        own_cols=cols,
    )
    dtype = str(place.weight.params["dtype"])
    return Draft(name, dtype, shape, 1, rows, cols, (fill,), transposed=form.turned, layer=layer)


def unused_parts(form: RawForm, held: Mapping[Key, Place]) -> Mapping[str, str]:
    """Return key name -> rule of the experts' parts that kt-kernel has no name for."""
    parts = {key.name: key.name.rpartition("/")[2] for key in held if key.expert is not None}
    return {
        name: UNUSED.get(part, UNUSED_SCALE)
        for name, part in sorted(parts.items())
        if part not in form.parts or part in UNUSED
    }
