"""Source + Family -> Model: codecs detected, shapes checked, every expert there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moeconv.codecs import CODECS
from moeconv.codecs.base import Codec, QuantScheme, header_shapes
from moeconv.complete import check_complete
from moeconv.dims import parse_dims
from moeconv.errors import BadSource, ShapeMismatch, UnrecognizedTensor
from moeconv.families.base import Family, Rule
from moeconv.families.tables import FAMILIES, MAIN_STACKS
from moeconv.grouping import Group, LayerName, group_tensors
from moeconv.quantization import Quantization, read_quantization
from moeconv.sizes import Sizes, config_value, read_sizes
from moeconv.store.source import Source
from moeconv.types import Key, Params, Place, Span, TensorRef, Weight, element_count


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


class Detected(NamedTuple):
    """A group's codec, its parameters and the decoded shape as stored."""

    codec: Codec
    params: Params
    shape: tuple[int, ...]


def build_model(source: Source, *, orientation: str | None = None) -> Model:
    """Return the model of a source, read from headers alone.

    Raises BadSource and its kinds for anything that no rule and no codec explains.
    """
    family = find_family(source.config)
    sizes = read_sizes(source.config, family)
    quantization = read_quantization(source.config, source.extra_configs)
    experts, others = group_tensors(source.tensors, family, quantized=bool(quantization.method))
    builder = _Builder(family, sizes, quantization, orientation)
    weights = [builder.expert(group) for group in experts if group.parts]
    weights += [builder.other(group) for group in others if group.parts]
    places = _places(weights)
    expert_layers, notes = check_complete(weights, places, family, sizes)
    dropped = tuple(
        Dropped(ref, "activation scale")
        for group in (*experts, *others)
        for ref in group.activations
    )
    return Model(
        source,
        family,
        sizes,
        quantization,
        tuple(weights),
        places,
        dropped,
        expert_layers,
        (*source.notes, *notes),
    )


def find_family(config: Mapping[str, object]) -> Family:
    """Return the family of a config's model_type; BadSource names one that is not known."""
    found = config_value(config, ("model_type",))
    for family in FAMILIES:
        if found in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise BadSource(
        f"model_type {found!r} is not a family that moeconv knows",
        where="config.json",
        hint=f"known: {known}",
    )


class _Builder:
    """Group -> Weight; holds what every group of a model shares, and the detections made so far."""

    def __init__(
        self,
        family: Family,
        sizes: Sizes,
        quantization: Quantization,
        orientation: str | None,
    ) -> None:
        self.family = family
        self.sizes = sizes
        self.quantization = quantization
        self.orientation = orientation
        self._seen: dict[object, Detected] = {}

    def expert(self, group: Group) -> Weight:
        """Return the weight of an expert group; stacked, fused and transposed as its rule says."""
        assert group.match is not None
        match = group.match
        detected = self.detect(group, vector=match.part == "bias")
        rule, rows, cols, experts = self.arrange(group, detected.shape)
        dims = parse_dims(rule.dims)
        projections = rule.projections[match.projection]
        form = parse_dims(rule.form or rule.dims)
        per_projection = rows // len(projections)
        bias = match.part == "bias"
        first = next(iter(group.parts.values()))
        dotted = not dims.stacked or any(
            ref.name.startswith(f"{group.name}.") for ref in group.parts.values()
        )
        weight = Weight(
            name=first.name if bias else group.name + (".weight" if dotted else ""),
            codec=detected.codec.name,
            rows=rows,
            cols=cols,
            slots=experts if dims.stacked else None,
            parts={"weight": first} if bias else group.parts,
            transposed=dims.transposed,
            params=detected.params,
            stack=self.stack(group.place),
            layer=group.place.layer,
            expert=match.expert,
            projections=tuple(
                (projection + rule.suffix, dims.rows_of(index, len(projections), per_projection))
                for index, projection in enumerate(projections)
            ),
            shape=form.shape(experts, len(projections), per_projection, cols),
            form_transposed=form.transposed,
            is_expert=True,
        )
        check_parts(weight, detected.codec)
        return weight

    def other(self, group: Group) -> Weight:
        """Return the weight of any other group: a matrix, a vector, or whatever it is, as it is."""
        detected = self.detect(group, vector=False)
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

    def detect(self, group: Group, *, vector: bool) -> Detected:
        """Return the one codec that takes exactly these parts; UnrecognizedTensor if none does."""
        scheme = QuantScheme("", {}) if vector else self.quantization.scheme(group.name)
        signature = (
            tuple(sorted((part, ref.dtype, ref.shape) for part, ref in group.parts.items())),
            scheme.method,
            tuple(sorted(scheme.values.items())),
        )
        found = self._seen.get(signature)
        if found is None:
            parts = {"weight": ref for ref in group.parts.values()} if vector else group.parts
            found = self._seen[signature] = _detect(group, parts, scheme)
        return found

    def arrange(self, group: Group, shape: tuple[int, ...]) -> tuple[Rule, int, int, int]:
        """Return (rule, rows of a slot, cols, experts) of the one rule that the shape fits."""
        assert group.match is not None
        fits = []
        for rule in group.match.rules:
            solved = _solve(rule, group.match.projection, shape, self.sizes)
            if solved is not None:
                fits.append((rule, *solved))
        if len(fits) == 1:
            return fits[0]
        if len(fits) > 1 and self.orientation is not None:
            wanted = self.orientation == "in-out"
            chosen = [fit for fit in fits if parse_dims(fit[0].dims).transposed == wanted]
            if len(chosen) == 1:
                return chosen[0]
        raise _arrangement_error(group, shape, fits, self.sizes)


def _detect(group: Group, parts: Mapping[str, TensorRef], scheme: QuantScheme) -> Detected:
    found = [
        Detected(codec, params, codec.shape(parts, params))
        for codec in CODECS.values()
        if (params := codec.detect(parts, scheme)) is not None
    ]
    if len(found) == 1:
        return found[0]
    listing = ", ".join(f"{ref.name} {ref.dtype} {list(ref.shape)}" for ref in parts.values())
    takers = " and ".join(one.codec.name for one in found) or "no codec"
    raise UnrecognizedTensor(
        f"{takers} takes the parts of '{group.name}': {listing}"
        f" (config: {scheme.method or 'not quantized'})",
        where=next(iter(parts.values())).file,
        hint="a part is missing, or the config does not belong to these files",
    )


def _solve(
    rule: Rule, projection: str, shape: tuple[int, ...], sizes: Sizes
) -> tuple[int, int, int] | None:
    """Return (rows of a slot, cols, experts) if the shape fits the rule and the declared sizes."""
    dims = parse_dims(rule.dims)
    if len(shape) != len(dims.groups):
        return None
    extents = {axis: 0 for group in dims.groups for axis in group}
    experts = sizes.experts[0] if sizes.experts else 1
    known = {"P": len(rule.projections[projection]), "E": experts}
    for group, extent in zip(dims.groups, shape, strict=True):
        free = [axis for axis in group if axis not in known or len(group) == 1]
        product = element_count(tuple(known[axis] for axis in group if axis not in free))
        if len(free) != 1 or product == 0 or extent % product:
            return None
        extents[free[0]] = extent // product
    rows = extents["R"] * (known["P"] if dims.fused else 1)
    cols = extents.get("C", 1)
    stacked = extents.get("E") or (experts if dims.stacked else 0)
    return (rows, cols, stacked) if _fits_sizes(rule, projection, rows, cols, sizes) else None


def _fits_sizes(rule: Rule, projection: str, rows: int, cols: int, sizes: Sizes) -> bool:
    """Return whether the hidden side of a matrix is the hidden size that the config declares."""
    if sizes.hidden is None or parse_dims(rule.dims).vector:
        return True
    side = rows if rule.projections[projection] == ("down",) else cols
    return side in (sizes.hidden, *sizes.latent)


def _arrangement_error(
    group: Group, shape: tuple[int, ...], fits: Sequence[object], sizes: Sizes
) -> BadSource:
    assert group.match is not None
    ref = next(iter(group.parts.values()))
    rules = " or ".join(sorted({rule.dims for rule in group.match.rules}))
    if fits:
        return BadSource(
            f"'{group.name}' {list(shape)} can be read as {rules} and nothing in the config decides",
            where=ref.file,
            hint="say which with --orientation in-out ([E, in, out]) or out-in ([E, out, in])",
        )
    return ShapeMismatch(
        f"'{group.name}' has shape {list(shape)}; expected {rules} with hidden {sizes.hidden}",
        where=ref.file,
        hint="the config does not belong to these files, or a file is damaged",
    )


def check_parts(weight: Weight, codec: Codec) -> None:
    """Raise ShapeMismatch for a part whose dtype or shape is not what its codec needs."""
    tiles = codec.tiles(weight.params)
    for part, ref in weight.parts.items():
        tile = tiles.get(part)
        if tile is None:
            continue
        if ref.dtype not in tile.dtypes:
            raise ShapeMismatch(
                f"'{ref.name}' is {ref.dtype}; {codec.name} needs {' or '.join(tile.dtypes)}",
                where=ref.file,
            )
        if codec.name in ("float", "raw"):
            continue
        shapes = header_shapes(tile, weight.rows, weight.cols, transposed=weight.transposed)
        if weight.slots is not None:
            shapes = tuple((weight.slots, *shape) for shape in shapes)
        if ref.shape not in shapes:
            raise ShapeMismatch(
                f"'{ref.name}' has shape {list(ref.shape)}, expected {list(shapes[0])} for a "
                f"{codec.name} weight [{weight.rows}, {weight.cols}]",
                where=ref.file,
                hint="the file is damaged, or config.json does not belong to it",
            )


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
