"""MXFP4: pairs of e2m1 codes, one E8M0 scale per 32 columns (OCP Microscaling Formats v1.0)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from moeconv.codecs.base import QuantScheme, Tile, Window
from moeconv.types import Params, TensorRef

if TYPE_CHECKING:
    import torch

GROUP = 32  # columns per scale, OCP MX v1.0, 5.1
# e2m1 codes 0..15, OCP MX v1.0, table 5
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E8M0_DTYPES = ("U8", "F8_E8M0")  # the same bytes under two names


class Naming(NamedTuple):
    """One way of naming the two parts: `inner` is the block axis of the codes, `format` the
    config's word without which U8 scales are not taken for exponents."""

    codes: str
    scales: str
    code_dtypes: tuple[str, ...]
    inner: tuple[int, ...] = ()
    format: str = ""


NAMINGS = (
    Naming("blocks", "scales", ("U8",), inner=(GROUP // 2,)),  # gpt-oss
    Naming("weight_packed", "weight_scale", ("U8",), format="mxfp4-pack-quantized"),
    Naming("weight", "scale", ("I8", "U8")),  # DeepSeek-V4
)
_BY_CODES: Mapping[str, Naming] = {naming.codes: naming for naming in NAMINGS}


def as_bytes(stored: torch.Tensor) -> torch.Tensor:
    """Return the uint8 view of a tensor of any one-byte dtype."""
    import torch

    return stored.view(torch.uint8)


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
    """w[n, 32g+j] = e2m1 * 2^(s[n,g]-127).

    Parameters: codes and scales, the names of the two parts.
    """

    name: str = "mxfp4"
    reference_nbytes: int = 13

    def tiles(self, params: Params) -> Mapping[str, Tile]:
        naming = _BY_CODES[str(params["codes"])]
        return {
            naming.codes: Tile(
                naming.code_dtypes, cols=GROUP, elements=GROUP // 2, inner=naming.inner
            ),
            naming.scales: Tile(E8M0_DTYPES, cols=GROUP),
        }

    def detect(self, found: Mapping[str, TensorRef], scheme: QuantScheme) -> Params | None:
        """Return the names of the parts; U8 scales beside packed codes need the config's word."""
        for naming in NAMINGS:
            if set(found) == {naming.codes, naming.scales} and _fits(naming, found, scheme):
                return {"codes": naming.codes, "scales": naming.scales}
        return None

    def shape(self, found: Mapping[str, TensorRef], params: Params) -> tuple[int, ...]:
        naming = _BY_CODES[str(params["codes"])]
        stored = found[naming.codes].shape
        outer = stored[: len(stored) - 1 - len(naming.inner)]
        per_code = GROUP if naming.inner else 2
        return (*outer, stored[len(outer)] * per_code)

    def decode(
        self, parts: Mapping[str, torch.Tensor], window: Window, params: Params
    ) -> torch.Tensor:
        """Return float32 [R, C] from codes [R, C/2] and scales [R, ceil(C/32)], bytes both."""
        values = e2m1_values(as_bytes(parts[str(params["codes"])]))  # [R, C]
        scales = e8m0_values(as_bytes(parts[str(params["scales"])]))  # [R, ceil(C/32)]
        return values * scales.repeat_interleave(GROUP, dim=1)[:, : window.cols]


def _fits(naming: Naming, found: Mapping[str, TensorRef], scheme: QuantScheme) -> bool:
    """Return whether dtypes, ranks and config are those of a naming.

    NVFP4 has the same packed codes: its scales are F8_E4M3, and it has a further part.
    """
    codes, scales = found[naming.codes], found[naming.scales]
    return (
        codes.dtype in naming.code_dtypes
        and scales.dtype in E8M0_DTYPES
        and len(codes.shape) == len(scales.shape) + len(naming.inner)
        and len(scales.shape) >= 2
        and (not naming.format or scheme.values.get("format") == naming.format)
    )
