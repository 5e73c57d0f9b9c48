"""NVFP4: pairs of e2m1 codes, one e4m3 scale per 16 columns, one float scale per weight.

Two codecs, because the float scale divides in compressed-tensors' files and multiplies in
ModelOpt's; part names tell them apart, values cannot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moeconv.codecs.base import QuantScheme, Tile, Window
from moeconv.codecs.fp8 import FLOAT_SCALES, fp8_values
from moeconv.codecs.mxfp4 import as_bytes, e2m1_values
from moeconv.errors import BadSource, IncompleteModel
from moeconv.types import Params, TensorRef

if TYPE_CHECKING:
    import torch

GROUP = 16  # columns per e4m3 scale


@dataclass(frozen=True, slots=True)
class Nvfp4Ct:
    """w[n, k] = e2m1 * (s[n, k // 16] / weight_global_scale), as compressed-tensors writes it."""

    name: str = "nvfp4-ct"
    reference_nbytes: int = 14

    def tiles(self, params: Params) -> Mapping[str, Tile]:
        return _tiles("weight_packed", "weight_global_scale")

    def detect(self, found: Mapping[str, TensorRef], scheme: QuantScheme) -> Params | None:
        return _detect("weight_packed", "weight_global_scale", found, scheme)

    def shape(self, found: Mapping[str, TensorRef], params: Params) -> tuple[int, ...]:
        *outer, pairs = found["weight_packed"].shape
        return (*outer, pairs * 2)

    def decode(
        self, parts: Mapping[str, torch.Tensor], window: Window, params: Params
    ) -> torch.Tensor:
        """Return float32 [R, C] from codes [R, C/2], scales [R, ceil(C/16)], divisor [1, 1]."""
        scales = fp8_values(parts["weight_scale"], "F8_E4M3")
        scales = scales / parts["weight_global_scale"].float()
        return _scaled(parts["weight_packed"], scales, window)


@dataclass(frozen=True, slots=True)
class Nvfp4Modelopt:
    """w[n, k] = e2m1 * (s[n, k // 16] * weight_scale_2), as ModelOpt writes it."""

    name: str = "nvfp4-modelopt"
    reference_nbytes: int = 14

    def tiles(self, params: Params) -> Mapping[str, Tile]:
        return _tiles("weight", "weight_scale_2")

    def detect(self, found: Mapping[str, TensorRef], scheme: QuantScheme) -> Params | None:
        return _detect("weight", "weight_scale_2", found, scheme)

    def shape(self, found: Mapping[str, TensorRef], params: Params) -> tuple[int, ...]:
        *outer, pairs = found["weight"].shape
        return (*outer, pairs * 2)

    def decode(
        self, parts: Mapping[str, torch.Tensor], window: Window, params: Params
    ) -> torch.Tensor:
        """Return float32 [R, C] from codes [R, C/2], scales [R, ceil(C/16)], factor [1, 1]."""
        scales = fp8_values(parts["weight_scale"], "F8_E4M3")
        scales = scales * parts["weight_scale_2"].float()
        return _scaled(parts["weight"], scales, window)


def _tiles(codes: str, whole: str) -> Mapping[str, Tile]:
    return {
        codes: Tile(("U8",), cols=GROUP, elements=GROUP // 2),
        "weight_scale": Tile(("F8_E4M3",), cols=GROUP),
        whole: Tile(FLOAT_SCALES, rows=None, cols=None),
    }


def _detect(
    codes: str, whole: str, found: Mapping[str, TensorRef], scheme: QuantScheme
) -> Params | None:
    """Return {} if the parts are codes, e4m3 scales and a scale of the whole weight.

    IncompleteModel where only the last is missing: without it every value is wrong.
    """
    if set(found) - {whole} != {codes, "weight_scale"}:
        return None
    if found[codes].dtype != "U8" or found["weight_scale"].dtype != "F8_E4M3":
        return None
    ref = found[codes]
    if whole not in found:
        raise IncompleteModel(
            f"'{ref.name}' has NVFP4 codes and scales, but no '{whole}'",
            where=ref.file,
            hint="a file of the source is missing, or the quantizer was interrupted",
        )
    group_size = scheme.values.get("group_size") or GROUP
    if group_size != GROUP:
        raise BadSource(
            f"'{ref.name}' is NVFP4, and the config gives group_size {group_size}, not {GROUP}",
            where=ref.file,
            hint="config.json does not belong to these files",
        )
    return {}


def _scaled(codes: torch.Tensor, scales: torch.Tensor, window: Window) -> torch.Tensor:
    """Return float32 [R, C] from byte pairs [R, C/2] and float32 scales [R, ceil(C/16)]."""
    return e2m1_values(as_bytes(codes)) * scales.repeat_interleave(GROUP, dim=1)[:, : window.cols]
