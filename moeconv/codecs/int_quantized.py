"""compressed-tensors "int-quantized": plain int8 weights, scales per group, channel or tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moeconv.codecs import bits as b
from moeconv.codecs.base import QuantScheme, Tile, Window
from moeconv.errors import IncompleteModel
from moeconv.types import Params, TensorRef

if TYPE_CHECKING:
    import numpy as np
    import torch

REQUIRED = {"weight", "weight_scale"}
PARTS = REQUIRED | {"weight_zero_point", "weight_g_idx"}
FORMATS = ("int-quantized", "naive-quantized", "mixed-precision")
STRATEGIES = ("group", "channel", "tensor")


def strategy_params(found: Mapping[str, TensorRef], values: Params, ref: TensorRef) -> Params:
    """Return strategy, group_size and act_order of compressed-tensors integers, or raise."""
    strategy = str(values.get("strategy"))
    if strategy not in STRATEGIES:
        raise b.unsupported(f"quantized by strategy '{strategy}'", ref, ", ".join(STRATEGIES))
    if not values.get("symmetric", True) and "weight_zero_point" not in found:
        raise IncompleteModel(
            f"symmetric is false, but '{ref.name}' has no weight_zero_point", where=ref.file
        )
    act_order = "weight_g_idx" in found
    if act_order and strategy != "group":
        raise b.unsupported(f"quantized per {strategy} with a weight_g_idx", ref, "group")
    group_size = b.group_size_of(values, ref) if strategy == "group" else b.ONE_GROUP
    return {"strategy": strategy, "group_size": group_size, "act_order": act_order}


def scale_tile(params: Params) -> Tile:
    """Return the tile of weight_scale: [rows, groups], [rows, 1] or one number."""
    rows = None if params["strategy"] == "tensor" else 1
    if params["act_order"]:  # any column may take any group
        return Tile(b.SCALE_DTYPES, rows, None, elements=int(params.get("groups", 1)))
    return Tile(b.SCALE_DTYPES, rows, b.group_cols(int(params["group_size"])))


def check_payload(parts: Mapping[str, np.ndarray], window: Window, params: Params) -> None:
    """Raise BadSource where a column's group is none of its row: weight_scale [R or 1, G]."""
    if params["act_order"]:
        b.check_groups(parts["weight_g_idx"], parts["weight_scale"].shape[1])


@dataclass(frozen=True, slots=True)
class IntQuantized:
    """w[n,k] = s[n,g] * (q[n,k] - z[n,g]), all of them signed; z = 0 without weight_zero_point.

    Parameters: strategy, group_size, groups, act_order, zeros (there is a weight_zero_point).
    """

    name: str = "int-quantized"
    reference_nbytes: int = 28

    def tiles(self, params: Params) -> Mapping[str, Tile]:
        scale = scale_tile(params)
        tiles = {"weight": Tile(("I8",)), "weight_scale": scale}
        if params["zeros"]:
            tiles["weight_zero_point"] = scale._replace(dtypes=("I8", "I32"))
        if params["act_order"]:
            tiles["weight_g_idx"] = Tile(("I32", "I64"), axes="c")
        return tiles

    def detect(self, found: Mapping[str, TensorRef], scheme: QuantScheme) -> Params | None:
        if scheme.method != "compressed-tensors" or not REQUIRED <= set(found) <= PARTS:
            return None
        weight, values = found["weight"], scheme.values
        if weight.dtype != "I8":
            return None
        kind = (values.get("format") or FORMATS[0], values.get("type") or "int")
        if kind[0] not in FORMATS or kind[1] != "int":
            raise b.unsupported(f"'{kind[0]}' of type {kind[1]} in int8", weight, "int-quantized")
        b.stacked_axes(weight)
        params = strategy_params(found, values, weight)
        groups = b.group_count(weight.shape[-1], int(params["group_size"]))
        params = {**params, "groups": groups, "zeros": "weight_zero_point" in found}
        b.check_headers(found, self.tiles(params), weight.shape)
        return params

    def shape(self, found: Mapping[str, TensorRef], params: Params) -> tuple[int, ...]:
        return found["weight"].shape

    def decode(
        self, parts: Mapping[str, torch.Tensor], window: Window, params: Params
    ) -> torch.Tensor:
        """Return float32 [R, C] from int8 weight [R, C], weight_scale and weight_zero_point
        [R, G] or [1, 1], weight_g_idx [1, C]."""
        zeros = parts["weight_zero_point"].long() if params["zeros"] else 0
        g_idx, device = parts.get("weight_g_idx"), parts["weight"].device
        index = b.column_groups(window, int(params["group_size"]), g_idx, device)
        return b.scaled(parts["weight"].long(), zeros, parts["weight_scale"], index)
