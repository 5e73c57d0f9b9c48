"""ggml's block formats: every GGUF tensor type that gguf-py decodes, through its own decoders.

A stored row is a row of blocks: `block_nbytes` bytes describe `block_cols` columns. Header shapes
count bytes ([..., rows, bytes per row]), so a part is plain bytes to everything but this codec.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from moeconv.codecs.base import QuantScheme, Tile, Window
from moeconv.errors import BadSource
from moeconv.types import GGML_PREFIX, Params, TensorRef

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch


@cache
def block_of(kind: str) -> tuple[int, int] | None:
    """Return columns and bytes of a block of a ggml type; None where gguf-py cannot decode it."""
    import numpy as np
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType  # 0.2 s to import
    from gguf.quants import dequantize

    if kind not in GGMLQuantizationType.__members__:
        return None
    block_cols, block_nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    try:
        dequantize(np.zeros((1, block_nbytes), np.uint8), GGMLQuantizationType[kind])
    except NotImplementedError:
        return None
    return int(block_cols), int(block_nbytes)


def dequantize_rows(rows: npt.NDArray[np.uint8], kind: str) -> npt.NDArray[np.float32]:
    """Return float32 [R, C] of the stored rows [R, C / block_cols * block_nbytes] uint8.

    Bit for bit what ggml's own to_float gives: an E8M0 byte of 255 in MXFP4 is a number there,
    and NVFP4 reads the scale byte 0x7f as zero.
    """
    import numpy as np
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    with np.errstate(all="ignore"):  # scales of NaN and Inf are values like any other here
        values: npt.NDArray[np.float32] = dequantize(rows, GGMLQuantizationType[kind])
    return values


@dataclass(frozen=True, slots=True)
class Ggml:
    """Every block type of GGUF that gguf-py decodes, as ggml does.

    Parameters: type, ggml's name of it (the tensor's dtype is `GGML:` and this name), block_cols,
    block_nbytes.
    """

    name: str = "ggml"
    reference_nbytes: int = 30  # in large windows 9: gguf-py decodes 16 rows at a time

    def tiles(self, params: Params) -> Mapping[str, Tile]:
        return {
            "weight": Tile(
                (f"{GGML_PREFIX}{params['type']}",),
                cols=int(params["block_cols"]),
                elements=int(params["block_nbytes"]),
            )
        }

    def detect(self, found: Mapping[str, TensorRef], scheme: QuantScheme) -> Params | None:
        """Return the block's parameters; BadSource names a type that has no decoder."""
        if set(found) != {"weight"} or not found["weight"].dtype.startswith(GGML_PREFIX):
            return None
        kind = found["weight"].dtype.removeprefix(GGML_PREFIX)
        block = block_of(kind)
        if block is None:
            raise BadSource(
                f"the GGUF tensor type {kind} has no decoder",
                where=f"{found['weight'].file}, tensor {found['weight'].name}",
                hint="a newer gguf package may have one; else take another quantization",
            )
        return {"type": kind, "block_cols": block[0], "block_nbytes": block[1]}

    def shape(self, found: Mapping[str, TensorRef], params: Params) -> tuple[int, ...]:
        """Return [..., rows, cols] of the stored [..., rows, bytes per row]."""
        *outer, row_nbytes = found["weight"].shape
        blocks = row_nbytes // int(params["block_nbytes"])
        return (*outer, blocks * int(params["block_cols"]))

    def decode(
        self, parts: Mapping[str, torch.Tensor], window: Window, params: Params
    ) -> torch.Tensor:
        """Return float32 [R, C] of the weight's bytes [R, C / block_cols * block_nbytes] uint8."""
        import torch

        stored = parts["weight"]
        values = dequantize_rows(stored.contiguous().cpu().numpy(), str(params["type"]))
        return torch.from_numpy(values).to(stored.device)
