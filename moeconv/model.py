"""Source + Family -> Model: codecs detected, shapes checked, every expert there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moeconv.complete import check_complete
from moeconv.detection import Detected, Detector
from moeconv.dims import parse_dims
from moeconv.errors import BadSource, UnrecognizedTensor
from moeconv.families.base import Family
from moeconv.families.config_fields import MAIN_STACKS
from moeconv.families.tables import FAMILIES
from moeconv.fitting import Fit, Fitter, check_parts
from moeconv.gguf_model import in_model_form, stored_family, translate_names
from moeconv.grouping import Group, LayerName, group_tensors
from moeconv.quantization import Quantization, read_quantization
from moeconv.sizes import Sizes, model_types, read_sizes
from moeconv.store.reader import Reader
from moeconv.store.source import NATIVE_CONFIG, Source
from moeconv.types import Json, Key, Place, Span, TensorRef, Weight, element_count

UNQUANTIZED = Quantization("", (), "none")  # of GGUF: each tensor says its type itself


class Dropped(NamedTuple):
    """A tensor that a named rule leaves out."""

    ref: TensorRef
    rule: str


@dataclass(frozen=True, slots=True)
class Model:
    """A source understood: every tensor is a part of one weight, or dropped by a named rule."""

    source: Source
    family: Family
    sizes: Sizes
    quantization: Quantization
    weights: tuple[Weight, ...]
    places: Mapping[Key, Place]
    dropped: tuple[Dropped, ...]
    expert_layers: Mapping[tuple[str, int], int]  # (stack, layer) -> experts
    notes: tuple[str, ...]


def build_model(
    source: Source, *, orientation: str | None = None, experts_only: bool = False
) -> Model:
    """Return the model of a source, read from headers and a few tiny payloads.

    `experts_only`: of a GGUF source, whose other tensors may be more than moeconv knows.
    Raises BadSource and its kinds for anything that no rule and no codec explains.
    """
    names = translate_names(source, experts_only=experts_only) if source.kind == "gguf" else None
    config = (names and names.config) or _config(source)
    family = (names and names.family) or find_family(config)
    sizes = read_sizes(config, family)
    quantization = UNQUANTIZED if names else read_quantization(source.config, source.extra_configs)
    experts, others = group_tensors(
        names.tensors if names else source.tensors,
        stored_family(family) if names else family,
        quantized=bool(quantization.method),
    )
    with Reader(source.files) as reader:
        detector = Detector(quantization, reader)
        builder = _Builder(sizes, detector, orientation)
        weights = [builder.expert(group) for group in experts if group.parts]
        weights += [builder.other(group) for group in others if group.parts]
        found = detector.finish()
    if names:
        weights = [in_model_form(weight, names) for weight in weights]
    places = _places(weights)
    expert_layers, notes = check_complete(weights, places, family, sizes)
    return Model(
        source,
        family,
        sizes,
        quantization,
        tuple(weights),
        places,
        _dropped((*experts, *others), names.left_out if names else ()),
        expert_layers,
        (*source.notes, *found, *notes),
    )


def _dropped(groups: Iterable[Group], left_out: Iterable[TensorRef]) -> tuple[Dropped, ...]:
    scales = (Dropped(ref, "activation scale") for group in groups for ref in group.activations)
    return (*scales, *(Dropped(ref, "--experts-only") for ref in left_out))


def _config(source: Source) -> Mapping[str, Json]:
    native: Json = source.extra_configs.get(NATIVE_CONFIG)
    return source.config or (native if isinstance(native, Mapping) else {})


def find_family(config: Mapping[str, Json]) -> Family:
    """Return the family of a config's model_type; BadSource names one that is not known.

    A wrapper (of vision and text) that is not known itself goes by the type of its text model.
    """
    found = model_types(config)
    for name in found:
        for family in FAMILIES:
            if name in family.model_types:
                return family
    if not found:
        for family in FAMILIES:
            if family.config_fields and all(field in config for field in family.config_fields):
                return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    what = (
        f"model_type {found[0]!r} is not a family that moeconv knows"
        if found
        else ("the config has no model_type")
    )
    raise BadSource(what, where="config.json", hint=f"known: {known}")


class _Builder:
    """Group -> Weight; holds what every group of a model shares."""

    def __init__(self, sizes: Sizes, detector: Detector, orientation: str | None) -> None:
        self.sizes = sizes
        self.detector = detector
        self.fitter = Fitter(sizes, orientation)

    def expert(self, group: Group) -> Weight:
        """Return the weight of an expert group; stacked, fused and transposed as its rule says."""
        assert group.match is not None
        match = group.match
        detected = self.detector.detect(group, vector=match.part == "bias")
        fit = self.fitter.fit(group, detected.shape)
        weight = self._expert(group, detected, fit)
        check_parts(weight, detected.codec, flat=len(fit.dims.groups[0]) > 1)
        return weight

    def _expert(self, group: Group, detected: Detected, fit: Fit) -> Weight:
        assert group.match is not None
        rule, dims, match = fit.rule, fit.dims, group.match
        projections = rule.projections[match.projection]
        form = parse_dims(rule.form or rule.dims)
        per_projection = fit.rows // len(projections)
        bias = match.part == "bias"
        first = next(iter(group.parts.values()))
        return Weight(
            name=first.name if bias else group.name + _ending(group, stacked=dims.stacked),
            codec=detected.codec.name,
            rows=fit.rows,
            cols=fit.cols,
            slots=fit.experts if dims.stacked else None,
            parts=group.parts,
            transposed=dims.transposed,
            params=detected.params,
            stack=self.stack(group.place),
            layer=group.place.layer,
            expert=match.expert,
            projections=tuple(
                (projection + rule.suffix, dims.rows_of(index, len(projections), per_projection))
                for index, projection in enumerate(projections)
            ),
            shape=form.shape(fit.experts, len(projections), per_projection, fit.cols),
            form_transposed=form.transposed,
            is_expert=True,
        )

    def other(self, group: Group) -> Weight:
        """Return the weight of any other group: a matrix, a vector, or whatever it is, as it is."""
        detected = self.detector.detect(group)
        shape = detected.shape
        ref = group.parts.get("weight")
        name = ref.name if ref is not None else f"{group.name}.weight"
        rows = shape[0] if shape else 1
        cols = element_count(shape[1:])
        place = group.place
        rest = name[len(group.name) - len(place.rest) :]
        weight = Weight(
            name=name,
            codec=detected.codec.name,
            rows=rows,
            cols=cols,
            slots=None,
            parts=group.parts,
            transposed=False,
            params=detected.params,
            stack=self.stack(place),
            layer=place.layer,
            expert=None,
            projections=((rest, Span(0, rows)),),
            shape=shape,
            form_transposed=False,
            is_expert=False,
        )
        check_parts(weight, detected.codec)
        return weight

    def stack(self, place: LayerName) -> str:
        """Return "main", "mtp" for layers after the last one, or the prefix of another run."""
        if place.layer is None:
            return "main"
        if place.stack not in MAIN_STACKS:
            return place.stack
        layers = self.sizes.layers
        return "mtp" if layers is not None and place.layer >= layers else "main"


def _ending(group: Group, *, stacked: bool) -> str:
    """Return what the name of the decoded tensor has after the group's: stacked ones vary."""
    if stacked and "blocks" in group.parts:
        return ""
    dotted = any(ref.name.startswith(f"{group.name}.") for ref in group.parts.values())
    return ".weight" if dotted or not stacked else ""


def _places(weights: Sequence[Weight]) -> Mapping[Key, Place]:
    places: dict[Key, Place] = {}
    for weight in weights:
        for slot in range(weight.slots or 1):
            for key, rows in weight.keys(slot):
                other = places.get(key)
                if other is not None:
                    raise UnrecognizedTensor(
                        f"'{weight.name}' and '{other.weight.name}' are the same weight",
                        where=next(iter(weight.parts.values())).file,
                        hint="keep one of them",
                    )
                places[key] = Place(weight, slot, rows)
    return places
