"""MXFP8: e4m3 or e5m2 codes, one E8M0 scale per 32 columns (OCP Microscaling Formats v1.0)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moeconv.codecs.base import QuantScheme, Tile, Window
from moeconv.codecs.fp8 import detect_scaling, fp8_values, scale_values
from moeconv.codecs.mxfp4 import E8M0_DTYPES, GROUP
from moeconv.types import Params, TensorRef

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Mxfp8:
    """w[n, 32g+j] = fp8 * 2^(s[n,g]-127).

    Told from block FP8 with ue8m0 scales by the config alone: see `detect_scaling`.
    """

    name: str = "mxfp8"
    reference_nbytes: int = 13

    def tiles(self, params: Params) -> Mapping[str, Tile]:
        return {
            "weight": Tile((str(params["dtype"]),)),
            str(params["scale"]): Tile(E8M0_DTYPES, cols=GROUP),
        }

    def detect(self, found: Mapping[str, TensorRef], scheme: QuantScheme) -> Params | None:
        return detect_scaling("mx", found, scheme)

    def shape(self, found: Mapping[str, TensorRef], params: Params) -> tuple[int, ...]:
        return found["weight"].shape

    def decode(
        self, parts: Mapping[str, torch.Tensor], window: Window, params: Params
    ) -> torch.Tensor:
        """Return float32 [R, C] from codes [R, C] and exponents [R, ceil(C/32)]."""
        values = fp8_values(parts["weight"], str(params["dtype"]))
        scales = scale_values(parts[str(params["scale"])])
        return values * scales.repeat_interleave(GROUP, dim=1)[:, : window.cols]
