"""Which rule of a family a tensor's shape fits, and whether its parts are what the codec needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moeconv.codecs.base import Codec, header_shapes
from moeconv.dims import Dims, parse_dims
from moeconv.errors import BadSource, Refused, ShapeMismatch, UnrecognizedTensor
from moeconv.families.base import Rule
from moeconv.grouping import Group
from moeconv.sizes import Sizes
from moeconv.types import Weight, element_count

IN_OUT = "in-out"
# What ends the name of a tensor that is integers by nature: tables of tokens, positions, counters.
INTEGERS = ("tid2eid", "_ids", "_index", "num_batches_tracked", "weight_shape")


class Fit(NamedTuple):
    """A rule that a shape fits: rows (of all its projections) and cols of a slot, and its slots."""

    rule: Rule
    rows: int
    cols: int
    experts: int

    @property
    def dims(self) -> Dims:
        return parse_dims(self.rule.dims)


class Fitter:
    """(group, decoded shape) -> Fit, remembered by shape."""

    def __init__(self, sizes: Sizes, orientation: str | None) -> None:
        self.sizes = sizes
        self.orientation = orientation
        self._known: dict[object, Fit] = {}

    def fit(self, group: Group, shape: tuple[int, ...]) -> Fit:
        """Return the one fit; BadSource where the config leaves two, ShapeMismatch for none."""
        assert group.match is not None
        match = group.match
        key = (tuple(map(id, match.rules)), match.projection, shape)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._choose(group, shape)
        return found

    def _choose(self, group: Group, shape: tuple[int, ...]) -> Fit:
        assert group.match is not None
        projection = group.match.projection
        fits = [
            fit
            for rule in group.match.rules
            if (fit := _solve(rule, projection, shape, self.sizes))
        ]
        if len(fits) > 1 and self.sizes.intermediate:
            fits = [fit for fit in fits if _inner(fit, projection) in self.sizes.intermediate]
        wanted = None if self.orientation is None else self.orientation == IN_OUT
        if len(fits) > 1 and wanted is not None:
            fits = [fit for fit in fits if fit.dims.transposed == wanted]
        if len(fits) != 1:
            raise _no_fit(group, shape, fits, self.sizes)
        if len(group.match.rules) > 1 and wanted is not None and fits[0].dims.transposed != wanted:
            raise Refused(
                f"--orientation {self.orientation} contradicts '{group.name}' {list(shape)}: with "
                f"hidden {self.sizes.hidden} it is {fits[0].rule.dims}",
                hint="leave --orientation out",
            )
        return fits[0]


def _solve(rule: Rule, projection: str, shape: tuple[int, ...], sizes: Sizes) -> Fit | None:
    """Return the fit if the shape is the rule's and the hidden side is the declared one."""
    dims = parse_dims(rule.dims)
    if len(shape) != len(dims.groups):
        return None
    extents = {axis: 0 for group in dims.groups for axis in group}
    declared = sizes.experts[0] if sizes.experts else 0
    known = {"P": len(rule.projections[projection]), "E": declared}
    for group, extent in zip(dims.groups, shape, strict=True):
        free = [axis for axis in group if axis not in known or len(group) == 1]
        product = element_count(tuple(known[axis] for axis in group if axis not in free))
        if len(free) != 1 or product == 0 or extent % product:
            return None
        extents[free[0]] = extent // product
    rows = extents["R"] * (known["P"] if dims.fused else 1)
    fit = Fit(
        rule, rows, extents.get("C", 1), extents.get("E") or (declared if dims.stacked else 0)
    )
    return fit if dims.vector or _outer(fit, projection) in _hidden(sizes, fit) else None


def _hidden(sizes: Sizes, fit: Fit) -> tuple[int, ...]:
    if sizes.hidden is None:
        return (fit.rows, fit.cols)
    return (sizes.hidden, *sizes.latent)


def _outer(fit: Fit, projection: str) -> int:
    """Return the hidden side of a matrix: the rows of down, the cols of any other."""
    is_down = fit.rule.projections[projection] == ("down",)
    return fit.rows if is_down else fit.cols


def _inner(fit: Fit, projection: str) -> int:
    """Return the intermediate side of a matrix, of one projection."""
    names = fit.rule.projections[projection]
    return fit.cols if names == ("down",) else fit.rows // len(names)


def _no_fit(group: Group, shape: tuple[int, ...], fits: Sequence[Fit], sizes: Sizes) -> BadSource:
    assert group.match is not None
    ref = next(iter(group.parts.values()))
    rules = " or ".join(sorted({rule.dims for rule in group.match.rules}))
    if fits:
        return BadSource(
            f"'{group.name}' {list(shape)} can be read as {rules}; nothing in the config decides",
            where=ref.file,
            hint="say which with --orientation in-out ([E, in, out]) or out-in ([E, out, in])",
        )
    declared = f"hidden {sizes.hidden}"
    if sizes.intermediate:
        declared += f", intermediate {' or '.join(str(one) for one in sizes.intermediate)}"
    return ShapeMismatch(
        f"'{group.name}' has shape {list(shape)}; expected {rules} with {declared}",
        where=ref.file,
        hint="the config does not belong to these files, or a file is damaged",
    )


def check_parts(weight: Weight, codec: Codec, *, flat: bool = False) -> None:
    """Raise ShapeMismatch for a part whose dtype or shape is not what its codec needs.

    BadSource and UnrecognizedTensor: integers where the numbers of a weight are expected.
    `flat`: the slots lie one after another in the first axis.
    """
    if codec.name == "raw":
        _check_integers(weight)
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
            shapes = tuple(_stacked(weight.slots, shape, flat=flat) for shape in shapes)
        if ref.shape not in shapes:
            raise ShapeMismatch(
                f"'{ref.name}' has shape {list(ref.shape)}, expected {list(shapes[0])} for a "
                f"{codec.name} weight [{weight.rows}, {weight.cols}]",
                where=ref.file,
                hint="the file is damaged, or config.json does not belong to it",
            )


def _check_integers(weight: Weight) -> None:
    ref = next(iter(weight.parts.values()))
    if ref.name.endswith(INTEGERS) and not weight.is_expert:
        return
    error = UnrecognizedTensor if weight.is_expert else BadSource
    raise error(
        f"'{ref.name}' is {ref.dtype} {list(ref.shape)}, which are no numbers of a weight",
        where=ref.file,
        hint="the file is damaged, or this release of moeconv does not know the quantization",
    )


def _stacked(slots: int, shape: tuple[int, ...], *, flat: bool) -> tuple[int, ...]:
    if flat and shape:
        return (slots * shape[0], *shape[1:])
    return (slots, *shape)
