"""MXFP4: pairs of e2m1 codes, one E8M0 scale per 32 columns (OCP Microscaling Formats v1.0)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moeconv.codecs.base import QuantScheme, Tile, Window
from moeconv.types import Params, TensorRef

if TYPE_CHECKING:
    import torch

GROUP = 32  # columns per scale, OCP MX v1.0, 5.1
# e2m1 codes 0..15, OCP MX v1.0, table 5
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def e8m0_values(scales: torch.Tensor) -> torch.Tensor:
    """Return float32 2^(b-127) of uint8 bytes: 0 is the subnormal 2^-127, 255 is NaN (OCP)."""
    import torch

    bits = scales.to(torch.int32)
    exponent = bits << 23
    exponent = torch.where(bits == 0, torch.full_like(exponent, 0x00400000), exponent)
    exponent = torch.where(bits == 255, torch.full_like(exponent, 0x7FC00000), exponent)
    return exponent.view(torch.float32)


def e2m1_values(packed: torch.Tensor) -> torch.Tensor:
    """Return float32 [R, 2*B] of uint8 pairs [R, B], low nibble first."""
    import torch

    table = torch.tensor(E2M1, dtype=torch.float32, device=packed.device)
    codes = torch.stack((packed & 15, packed >> 4), dim=-1)  # [R, B, 2]
    return table[codes.long()].flatten(-2)  # [R, 2*B]


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """w[n, 32g+j] = e2m1 * 2^(s[n,g]-127). Parts by `names`: (codes, scales)."""

    name: str = "mxfp4"

    def tiles(self, params: Params) -> Mapping[str, Tile]:
        return {
            "blocks": Tile(("U8",), cols=GROUP, elements=GROUP // 2, inner=(GROUP // 2,)),
            "scales": Tile(("U8",), cols=GROUP),
        }

    def detect(self, found: Mapping[str, TensorRef], scheme: QuantScheme) -> Params | None:
        return {} if set(found) == {"blocks", "scales"} else None

    def shape(self, found: Mapping[str, TensorRef], params: Params) -> tuple[int, ...]:
        *outer, groups, _ = found["blocks"].shape
        return (*outer, groups * GROUP)

    def decode(
        self, parts: Mapping[str, torch.Tensor], window: Window, params: Params
    ) -> torch.Tensor:
        """Return float32 [R, C] from blocks [R, C/2] and scales [R, C/32], both uint8."""
        values = e2m1_values(parts["blocks"])  # [R, C]
        scales = e8m0_values(parts["scales"])  # [R, C/32]
        return values * scales.repeat_interleave(GROUP, dim=1)
