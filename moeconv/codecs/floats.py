"""Plain floating numbers: BF16, F16, F32, F64, one stored element per element."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moeconv.codecs.base import QuantScheme, Tile, Window
from moeconv.types import FLOAT_DTYPES, Params, TensorRef

if TYPE_CHECKING:
    import torch

# Never the numbers of a weight: I8, U8 and the FP8 dtypes are not among them.
RAW_DTYPES = ("I64", "I32", "I16", "U64", "U32", "U16", "BOOL")


@dataclass(frozen=True, slots=True)
class Floats:
    """w = the stored number: BF16, F16, F32 or F64.

    Parameters: dtype, the stored one.
    """

    name: str = "float"
    reference_nbytes: int = 4

    def tiles(self, params: Params) -> Mapping[str, Tile]:
        return {"weight": Tile((str(params["dtype"]),))}

    def detect(self, found: Mapping[str, TensorRef], scheme: QuantScheme) -> Params | None:
        if set(found) == {"weight"} and found["weight"].dtype in FLOAT_DTYPES:
            return {"dtype": found["weight"].dtype}
        return None

    def shape(self, found: Mapping[str, TensorRef], params: Params) -> tuple[int, ...]:
        return found["weight"].shape

    def decode(
        self, parts: Mapping[str, torch.Tensor], window: Window, params: Params
    ) -> torch.Tensor:
        """Return float32 [rows, cols]; F64 rounds once."""
        return parts["weight"].float()


@dataclass(frozen=True, slots=True)
class Raw:
    """Integers and truth values (routing tables, positions): copied as they are."""

    name: str = "raw"
    reference_nbytes: int = 4

    def tiles(self, params: Params) -> Mapping[str, Tile]:
        return {"weight": Tile((str(params["dtype"]),))}

    def detect(self, found: Mapping[str, TensorRef], scheme: QuantScheme) -> Params | None:
        if set(found) == {"weight"} and found["weight"].dtype in RAW_DTYPES:
            return {"dtype": found["weight"].dtype}
        return None

    def shape(self, found: Mapping[str, TensorRef], params: Params) -> tuple[int, ...]:
        return found["weight"].shape

    def decode(
        self, parts: Mapping[str, torch.Tensor], window: Window, params: Params
    ) -> torch.Tensor:
        """Return float32 [rows, cols]: the shapes that vLLM keeps as floating numbers."""
        return parts["weight"].float()


@dataclass(frozen=True, slots=True)
class Repeated:
    """Scales of a coarse grid read as those of a finer one: each stands for `rows` x `cols`.

    Made while planning, never found in a file.
    """

    name: str = "repeated"
    reference_nbytes: int = 8

    def tiles(self, params: Params) -> Mapping[str, Tile]:
        dtype, rows, cols = str(params["dtype"]), int(params["rows"]), int(params["cols"])
        return {"weight": Tile((dtype,), rows=rows, cols=cols)}

    def detect(self, found: Mapping[str, TensorRef], scheme: QuantScheme) -> Params | None:
        return None

    def shape(self, found: Mapping[str, TensorRef], params: Params) -> tuple[int, ...]:
        return found["weight"].shape

    def decode(
        self, parts: Mapping[str, torch.Tensor], window: Window, params: Params
    ) -> torch.Tensor:
        """Return float32 [rows, cols] of stored numbers [ceil(rows/r), ceil(cols/c)]."""
        values = parts["weight"].float().repeat_interleave(int(params["rows"]), dim=0)
        values = values.repeat_interleave(int(params["cols"]), dim=1)
        return values[: window.rows, : window.cols]
