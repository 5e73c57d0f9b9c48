"""AWQ "gemm": 4-bit codes and zero points packed along the rows in an interleaved order.

Layout: AutoAWQ 0.2.9, awq/modules/linear/gemm.py and awq/utils/packing_utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moeconv.codecs import bits as b
from moeconv.codecs.base import QuantScheme, Tile, Window
from moeconv.errors import IncompleteModel
from moeconv.types import Params, TensorRef

if TYPE_CHECKING:
    import torch

BITS = 4
PER_WORD = b.WORD_BITS // BITS
# Row 8c + j of the weight is nibble ORDER[j] of word c: AutoAWQ's AWQ_REVERSE_ORDER.
ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
PARTS = {"qweight", "qzeros", "scales"}


def awq_fields(words: torch.Tensor) -> torch.Tensor:
    """Return int64 fields [A, 8*W] of int32 words [A, W], in the order of the weight's rows."""
    count = words.shape[1] * PER_WORD
    nibbles = b.unpack(words, BITS, b.dense_run(BITS), count).reshape(-1, PER_WORD)
    return nibbles[:, list(ORDER)].reshape(words.shape[0], count)


@dataclass(frozen=True, slots=True)
class Awq:
    """w[n,k] = s[g,n] * (q[k,n] - z[g,n]), g = k // group_size, z as stored.

    Parameters: group_size, zeros ("packed" or "absent": z = 8, symmetric files without qzeros).
    """

    name: str = "awq"
    reference_nbytes: int = 30

    def tiles(self, params: Params) -> Mapping[str, Tile]:
        cols = b.group_cols(int(params["group_size"]))
        tiles = {
            "qweight": Tile(("I32",), rows=PER_WORD, axes="cr"),
            "scales": Tile(b.SCALE_DTYPES, cols=cols, axes="cr"),
        }
        if params["zeros"] == "packed":
            tiles["qzeros"] = Tile(("I32",), rows=PER_WORD, cols=cols, axes="cr")
        return tiles

    def detect(self, found: Mapping[str, TensorRef], scheme: QuantScheme) -> Params | None:
        if scheme.method != self.name or not {"qweight", "scales"} <= set(found) <= PARTS:
            return None
        qweight, values = found["qweight"], scheme.values
        version = str(values.get("version") or values.get("format") or "gemm").lower()
        if version != "gemm":
            raise b.unsupported(f"AWQ of version '{version}'", qweight, "gemm")
        bits = b.required_int(values, "bits", qweight)
        if bits != BITS:
            raise b.unsupported(f"{bits}-bit AWQ", qweight, "4 bits")
        if "qzeros" not in found and values.get("zero_point", True):
            raise IncompleteModel(
                f"zero_point is true, but '{qweight.name}' has no qzeros", where=qweight.file
            )
        zeros = "packed" if "qzeros" in found else "absent"
        params: Params = {"group_size": b.group_size_of(values, qweight), "zeros": zeros}
        b.check_headers(found, self.tiles(params), self.shape(found, params))
        return params

    def shape(self, found: Mapping[str, TensorRef], params: Params) -> tuple[int, ...]:
        lead = b.stacked_axes(found["qweight"])
        cols, words = found["qweight"].shape[-2:]
        return (*lead, words * PER_WORD, cols)

    def decode(
        self, parts: Mapping[str, torch.Tensor], window: Window, params: Params
    ) -> torch.Tensor:
        """Return float32 [R, C] from int32 qweight [C, R/8] and qzeros [G, R/8], scales [G, R]."""
        codes = awq_fields(parts["qweight"]).T  # [R, C]
        zeros: torch.Tensor | int = 1 << (BITS - 1)
        if params["zeros"] == "packed":
            zeros = awq_fields(parts["qzeros"]).T  # [R, G]
        index = b.column_groups(window, int(params["group_size"]), None, codes.device)
        return b.scaled(codes, zeros, parts["scales"].T, index)
