"""compressed-tensors "pack-quantized": 2 to 8-bit integers packed along the columns of int32.

Layout: compressed-tensors 0.20.0, compressors/pack_quantized/helpers.py (a dense stream of
fields); up to 0.15.0 it never split a field over two words, which differs for 3, 5, 6, 7 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moeconv.codecs import bits as b
from moeconv.codecs import int_quantized
from moeconv.codecs.base import QuantScheme, Tile, Window
from moeconv.codecs.int_quantized import scale_tile, strategy_params
from moeconv.errors import BadSource, ShapeMismatch
from moeconv.types import Params, TensorRef

if TYPE_CHECKING:
    import torch

REQUIRED = {"weight_packed", "weight_scale"}
PARTS = REQUIRED | {"weight_shape", "weight_zero_point", "weight_g_idx"}
FORMATS = ("pack-quantized", "mixed-precision")


def run_of(params: Params) -> b.Run:
    """Return how the fields lie in words."""
    bits = int(params["bits"])
    return b.padded_run(bits) if params.get("packing") == "padded" else b.dense_run(bits)


def packing_of(words: int, cols: int, bits: int) -> str:
    """Return "dense" or "padded": the packing in which `cols` fields fill `words` words."""
    dense = b.words_for(cols, b.dense_run(bits))
    padded = b.words_for(cols, b.padded_run(bits))
    if b.dense_run(bits) == b.padded_run(bits) or words == dense == padded == 1:
        padded = dense  # the two are one layout
    elif words == dense == padded:
        raise BadSource(
            f"{cols} columns of {bits} bits fill {words} words in both packings of "
            "compressed-tensors (fields across words, or not), and nothing says which it is"
        )
    if words not in (dense, padded):
        raise ShapeMismatch(
            f"{words} words per row, expected {dense} (or {padded}) for {cols} columns "
            f"of {bits} bits"
        )
    return "dense" if words == dense else "padded"


@dataclass(frozen=True, slots=True)
class PackedInt:
    """w[n,k] = s[n,g] * (q[n,k] - z[n,g]), q and z stored with 2^(bits-1) added.

    Parameters: bits, strategy, group_size, groups, act_order (weight_g_idx is looked up), zeros
    ("absent", "packed" along the rows, "plain" int8), shape_len (numbers in weight_shape, 0
    without it); from `settle`: rows, cols, packing ("dense" or "padded").
    """

    name: str = "packed-int"
    reference_nbytes: int = 30

    def tiles(self, params: Params) -> Mapping[str, Tile]:
        elements, words = run_of(params)
        scale = scale_tile(params)
        tiles = {
            "weight_packed": Tile(("I32",), cols=elements, elements=words),
            "weight_scale": scale,
        }
        if params["zeros"] == "plain":
            tiles["weight_zero_point"] = scale._replace(dtypes=("I8",))
        if params["zeros"] == "packed":
            tiles["weight_zero_point"] = scale._replace(
                dtypes=("I32",), rows=elements, pack_rows=words
            )
        if params["act_order"]:
            tiles["weight_g_idx"] = Tile(("I32", "I64"), axes="c")
        if params["shape_len"]:
            numbers = int(params["shape_len"])
            tiles["weight_shape"] = Tile(("I64", "I32"), None, None, "c", elements=numbers)
        return tiles

    def detect(self, found: Mapping[str, TensorRef], scheme: QuantScheme) -> Params | None:
        if scheme.method != "compressed-tensors" or not REQUIRED <= set(found) <= PARTS:
            return None
        packed, values = found["weight_packed"], scheme.values
        if packed.dtype != "I32":  # U8 holds pairs of FP4
            return None
        kind = (values.get("format") or FORMATS[0], values.get("type") or "int")
        if kind[0] not in FORMATS or kind[1] != "int":
            raise b.unsupported(f"'{kind[0]}' of type {kind[1]} in int32", packed, "pack-quantized")
        bits = b.required_int(values, "num_bits", packed)
        if not 2 <= bits <= 8:
            raise b.unsupported(f"{bits}-bit pack-quantized", packed, "2 to 8 bits")
        b.stacked_axes(packed)
        shape_ref = found.get("weight_shape")
        params: Params = {
            **strategy_params(found, values, packed),
            "bits": bits,
            "zeros": _zeros_kind(found.get("weight_zero_point"), str(values.get("strategy"))),
            "shape_len": shape_ref.shape[-1] if shape_ref and shape_ref.shape else 0,
        }
        if shape_ref is None:
            params = self._settled(found, params, _cols_without_shape(found, params))
        return params

    def settle(
        self, found: Mapping[str, TensorRef], params: Params, payloads: Mapping[str, np.ndarray]
    ) -> Params:
        """Return params with rows, cols and packing, from the numbers in weight_shape."""
        if "weight_shape" not in found:
            return params
        numbers = payloads["weight_shape"].reshape(-1, int(params["shape_len"]))[:, -2:]
        rows, cols = (int(number) for number in numbers[0])
        ref = found["weight_shape"]
        if not (numbers == numbers[0]).all() or rows != found["weight_packed"].shape[-2]:
            raise ShapeMismatch(
                f"'{ref.name}' says {numbers.tolist()}, but '{found['weight_packed'].name}' has "
                f"shape {list(found['weight_packed'].shape)}",
                where=ref.file,
            )
        return self._settled(found, params, cols)

    def _settled(self, found: Mapping[str, TensorRef], params: Params, cols: int) -> Params:
        packed = found["weight_packed"]
        rows, words = packed.shape[-2:]
        try:
            packing = packing_of(words, cols, int(params["bits"]))
        except (BadSource, ShapeMismatch) as error:
            raise type(error)(f"'{packed.name}': {error.what}", where=packed.file) from None
        groups = b.group_count(cols, int(params["group_size"]))
        full = {**params, "rows": rows, "cols": cols, "packing": packing, "groups": groups}
        b.check_headers(found, self.tiles(full), self.shape(found, full))
        return full

    def shape(self, found: Mapping[str, TensorRef], params: Params) -> tuple[int, ...]:
        *lead, rows, words = found["weight_packed"].shape
        return (*lead, rows, int(params.get("cols", words * b.WORD_BITS // int(params["bits"]))))

    def decode(
        self, parts: Mapping[str, torch.Tensor], window: Window, params: Params
    ) -> torch.Tensor:
        """Return float32 [R, C] from int32 weight_packed [R, C*bits/32], weight_scale [R, G],
        weight_zero_point int32 [R*bits/32, G] or int8 [R, G], weight_g_idx [1, C]."""
        bits, run = int(params["bits"]), run_of(params)
        if "weight_shape" in parts:
            check_shape(parts["weight_shape"].reshape(-1).tolist()[-2:], params)
        middle = 1 << (bits - 1)
        codes = b.unpack(parts["weight_packed"], bits, run, window.cols)  # [R, C], q + middle
        zeros: torch.Tensor | int = middle
        if params["zeros"] == "plain":
            zeros = parts["weight_zero_point"].long() + middle
        if params["zeros"] == "packed":
            zeros = b.unpack(parts["weight_zero_point"].T, bits, run, window.rows).T  # [R, G]
        g_idx, device = parts.get("weight_g_idx"), codes.device
        index = b.column_groups(window, int(params["group_size"]), g_idx, device)
        return b.scaled(codes, zeros, parts["weight_scale"], index)


def check_payload(parts: Mapping[str, np.ndarray], window: Window, params: Params) -> None:
    """Raise where weight_shape is not that of its kind, or a column's group none of its row."""
    if "weight_shape" in parts:
        check_shape(parts["weight_shape"].reshape(-1).tolist()[-2:], params)
    int_quantized.check_payload(parts, window, params)


def check_shape(numbers: list[int], params: Params) -> None:
    """Raise where a weight_shape is not that of its kind: planning looks at a sample of them."""
    if numbers != [params["rows"], params["cols"]]:
        raise ShapeMismatch(
            f"weight_shape says {numbers}, other weights with the same headers "
            f"[{params['rows']}, {params['cols']}]",
            hint="the tensor is damaged",
        )


def _zeros_kind(ref: TensorRef | None, strategy: str) -> str:
    """Return how zero points are stored: int32 is packed, except that one number never is."""
    if ref is None:
        return "absent"
    return "plain" if ref.dtype == "I8" or strategy == "tensor" else "packed"


def _cols_without_shape(found: Mapping[str, TensorRef], params: Params) -> int:
    packed, bits = found["weight_packed"], int(params["bits"])
    if params["group_size"] != b.ONE_GROUP:  # the writer refuses groups that are not full
        return found["weight_scale"].shape[-1] * int(params["group_size"])
    if bits not in (2, 4, 8):
        raise BadSource(
            f"'{packed.name}' has no weight_shape beside it, so its columns cannot be counted",
            where=packed.file,
        )
    return packed.shape[-1] * b.WORD_BITS // bits
