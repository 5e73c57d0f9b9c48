"""Is the model whole? Every expert of every layer, with all projections, of one shape."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice

from moeconv.dense import check_extra_layers
from moeconv.errors import BadSource, IncompleteModel, ShapeMismatch
from moeconv.families.base import Family
from moeconv.sizes import Sizes
from moeconv.types import Key, Place, Weight

_SHOWN = 5  # names in one message
Grid = Mapping[tuple[str, int], Mapping[str, set[int]]]


def check_complete(
    weights: Sequence[Weight], places: Mapping[Key, Place], family: Family, sizes: Sizes
) -> tuple[Mapping[tuple[str, int], int], tuple[str, ...]]:
    """Return ((stack, layer) -> experts, notes); raise for anything that is missing.

    IncompleteModel: a missing expert, projection or layer; ShapeMismatch: projections that
    disagree; BadSource: sizes that contradict the config.
    """
    check_extra_layers(weights, sizes)
    grid = _grid(places)
    if not grid:
        raise IncompleteModel(
            f"no expert tensors: this is not a mixture-of-experts checkpoint of {family.name}",
            hint="moeconv converts mixture-of-experts models only",
        )
    counts = {layer: _check_layer(layer, found, family) for layer, found in grid.items()}
    _check_counts(counts, sizes)
    _check_alike(grid)
    _check_shapes(places, sizes)
    _check_layers(weights, set(grid), family, sizes)
    return counts, _notes(weights, sizes)


def _grid(places: Mapping[Key, Place]) -> Grid:
    grid: dict[tuple[str, int], dict[str, set[int]]] = {}
    for stack, layer, expert, name in places:
        if expert is not None and layer is not None:
            grid.setdefault((stack, layer), {}).setdefault(name, set()).add(expert)
    return grid


def _check_layer(layer: tuple[str, int], found: Mapping[str, set[int]], family: Family) -> int:
    everyone = set().union(*found.values())
    count = max(everyone) + 1
    for name in {*family.projections, *found}:
        missing = sorted(set(range(count)) - found.get(name, set()))
        if missing:
            shown = ", ".join(str(expert) for expert in missing[:_SHOWN])
            more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
            raise IncompleteModel(
                f"layer {_layer_text(layer)} has {count} experts, but no '{name}' of expert "
                f"{shown}{more}",
                hint="a file of the checkpoint is missing or damaged; download it again",
            )
    return count


def _layer_text(layer: tuple[str, int]) -> str:
    stack, index = layer
    return str(index) if stack == "main" else f"{index} of {stack}"


def _check_counts(counts: Mapping[tuple[str, int], int], sizes: Sizes) -> None:
    allowed = set(sizes.experts) or set(counts.values())
    for layer, count in counts.items():
        if count not in allowed:
            raise IncompleteModel(
                f"layer {_layer_text(layer)} has {count} experts; config.json says "
                f"{' or '.join(str(one) for one in sizes.experts)}",
                hint="experts are missing, or config.json does not belong to these files",
            )
    first: dict[str, tuple[str, int]] = {}
    for layer, count in counts.items():
        other = first.setdefault(layer[0], layer)
        if count != counts[other]:
            raise IncompleteModel(
                f"layer {_layer_text(layer)} has {count} experts, layer {_layer_text(other)} has "
                f"{counts[other]}",
                hint="a file of the checkpoint is missing or damaged; download it again",
            )


def _check_alike(grid: Grid) -> None:
    """Raise where one layer's experts have what another's of the same run have not."""
    every: dict[str, dict[str, tuple[str, int]]] = defaultdict(dict)
    for layer, found in grid.items():
        for name in found:
            every[layer[0]].setdefault(name, layer)
    for layer, found in grid.items():
        for name, other in every[layer[0]].items():
            if name not in found:
                raise IncompleteModel(
                    f"the experts of layer {_layer_text(layer)} have no '{name}', which those of "
                    f"layer {_layer_text(other)} have",
                    hint="a file of the checkpoint is missing or damaged; download it again",
                )


def _check_shapes(places: Mapping[Key, Place], sizes: Sizes) -> None:
    shapes: dict[tuple[str, int | None, int | None], dict[str, tuple[int, int]]]
    shapes = defaultdict(dict)
    for (stack, layer, expert, name), place in places.items():
        if expert is not None:
            shapes[stack, layer, expert][name] = (place.rows.length, place.weight.cols)
    checked: set[tuple[tuple[str, tuple[int, int]], ...]] = set()
    for (stack, layer, expert), found in shapes.items():
        signature = tuple(sorted(found.items()))
        if signature in checked:
            continue
        checked.add(signature)
        where = f"layer {_layer_text((stack, layer or 0))}, expert {expert}"
        _check_expert(where, found, sizes)


def _check_expert(where: str, found: Mapping[str, tuple[int, int]], sizes: Sizes) -> None:
    up = found["up"]
    down = found["down"]
    gate = found.get("gate", up)
    biases = all(
        shape[0] == found[name.removesuffix(".bias")][0]
        for name, shape in found.items()
        if name.endswith(".bias")
    )
    if gate != up or down != (up[1], up[0]) or not biases:
        listing = ", ".join(f"{name} {list(shape)}" for name, shape in sorted(found.items()))
        raise ShapeMismatch(
            f"{where}: projections disagree: {listing}",
            where=where,
            hint="gate and up must be [intermediate, hidden] and down [hidden, intermediate]",
        )
    for said, is_one, name in (
        (sizes.intermediate, up[0], "intermediate"),
        ((sizes.hidden, *sizes.latent), up[1], "hidden"),
    ):
        if said and None not in said and is_one not in said:
            raise BadSource(
                f"{where}: {name} size is {is_one}; config.json says "
                f"{' or '.join(str(one) for one in said)}",
                where="config.json",
                hint="config.json does not belong to these files",
            )


def _check_layers(
    weights: Iterable[Weight], with_experts: set[tuple[str, int]], family: Family, sizes: Sizes
) -> None:
    found: dict[int, bool] = {}
    for weight in weights:
        if weight.stack == "main" and weight.layer is not None:
            dense = any(weight.projections[0][0].startswith(f"{name}.") for name in family.dense)
            found[weight.layer] = found.get(weight.layer, False) or dense
    # lazily: a config may say a billion layers
    absent = (layer for layer in range(sizes.layers or 0) if layer not in found)
    missing = list(islice(absent, _SHOWN))
    if missing:
        raise IncompleteModel(
            f"config.json says {sizes.layers} layers; no tensor of layer "
            f"{', '.join(str(layer) for layer in missing)} is there",
            hint="a file of the checkpoint is missing; download it again",
        )
    bare = sorted(
        layer for layer, dense in found.items() if not dense and ("main", layer) not in with_experts
    )
    if bare and family.dense:
        raise IncompleteModel(
            f"layer {', '.join(str(layer) for layer in bare[:_SHOWN])} has neither experts nor "
            f"a dense {' or '.join(family.dense)}",
            hint="a file of the checkpoint is missing or damaged; download it again",
        )


def _notes(weights: Iterable[Weight], sizes: Sizes) -> tuple[str, ...]:
    if not sizes.mtp_layers or any("mtp" in weight.stack for weight in weights):
        return ()
    return (f"config.json promises {sizes.mtp_layers} MTP layers; the files have none",)
