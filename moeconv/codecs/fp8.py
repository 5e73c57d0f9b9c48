"""FP8 weights with one scale per block, per row or per weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from moeconv.codecs.base import QuantScheme, Tile, Window
from moeconv.codecs.mxfp4 import E8M0_DTYPES, GROUP, as_bytes, e8m0_values
from moeconv.errors import BadSource, ShapeMismatch
from moeconv.types import Params, TensorRef

if TYPE_CHECKING:
    import torch

Shapes = tuple[tuple[int, ...], ...]

FLOAT_SCALES = ("F32", "BF16", "F16")
SCALE_DTYPES = (*FLOAT_SCALES, *E8M0_DTYPES)
# Multiplied all of them, whatever "inv" seems to say.
SCALE_PARTS = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")


class Fp8Format(NamedTuple):
    """How the bits of an FP8 byte are shared out; `infinities`: the last exponent is IEEE's."""

    mantissa_bits: int
    bias: int
    infinities: bool


# OCP 8-bit Floating Point (OFP8) v1.0, table 1
FP8_FORMATS: Mapping[str, Fp8Format] = {
    "F8_E4M3": Fp8Format(mantissa_bits=3, bias=7, infinities=False),
    "F8_E5M2": Fp8Format(mantissa_bits=2, bias=15, infinities=True),
}


@cache
def fp8_table(dtype: str) -> tuple[float, ...]:
    """Return the values of the 256 bytes of an FP8 dtype, exact in float32."""
    return tuple(_fp8_value(byte, FP8_FORMATS[dtype]) for byte in range(256))


def _fp8_value(byte: int, form: Fp8Format) -> float:
    sign = -1.0 if byte & 0x80 else 1.0
    magnitude = byte & 0x7F
    exponent, mantissa = divmod(magnitude, 1 << form.mantissa_bits)
    if form.infinities and exponent == 0x7F >> form.mantissa_bits:
        return sign * float("nan" if mantissa else "inf")
    if not form.infinities and magnitude == 0x7F:
        return float("nan")
    if exponent:
        mantissa += 1 << form.mantissa_bits
    return sign * mantissa * 2.0 ** (max(exponent, 1) - form.bias - form.mantissa_bits)


def fp8_values(stored: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return float32 of the same shape; NaN bytes are NaN and -0 stays -0."""
    import torch

    table = torch.tensor(fp8_table(dtype), dtype=torch.float32, device=stored.device)
    return table[as_bytes(stored).long()]


def scale_values(stored: torch.Tensor) -> torch.Tensor:
    """Return float32 of the same shape; one-byte scales are E8M0 exponents."""
    return e8m0_values(as_bytes(stored)) if stored.element_size() == 1 else stored.float()


class Scaling(NamedTuple):
    """What one scale covers: `kind` "block", "channel", "tensor" or "mx"; a block's extent."""

    kind: str
    block_rows: int = 0
    block_cols: int = 0


def detect_scaling(kind: str, found: Mapping[str, TensorRef], scheme: QuantScheme) -> Params | None:
    """Return the parameters of an FP8 weight whose scales are of this kind, else None.

    BadSource for a grid of scales whose block size the config does not give; ShapeMismatch for
    scales that are not what the config says. Block sizes never come from the shapes.
    """
    pair = _weight_and_scale(found)
    if pair is None:
        return None
    part, weight, scale = pair
    scaling = _declared(part, scale, scheme) or _by_shape(weight, scale)
    expected = _EXPECTED[scaling.kind](weight.shape[:-2], weight.shape[-2:], scaling)
    if scale.shape not in expected:
        raise _mismatch(weight, scale, scaling, expected)
    if scaling.kind != kind:
        return None
    params: dict[str, int | str | bool | float] = {"dtype": weight.dtype, "scale": part}
    if kind == "block":
        params |= {"block_rows": scaling.block_rows, "block_cols": scaling.block_cols}
    return params


def _weight_and_scale(
    found: Mapping[str, TensorRef],
) -> tuple[str, TensorRef, TensorRef] | None:
    """Return (scale part, weight, scale) where these are exactly the parts of an FP8 weight."""
    for part in SCALE_PARTS:
        if set(found) == {"weight", part}:
            weight, scale = found["weight"], found[part]
            known = weight.dtype in FP8_FORMATS and scale.dtype in SCALE_DTYPES
            return (part, weight, scale) if known and len(weight.shape) >= 2 else None
    return None


def _declared(part: str, scale: TensorRef, scheme: QuantScheme) -> Scaling | None:
    """Return the scaling that the config declares, or None where it leaves it to the shapes.

    MXFP8 is a block of 1 x 32 with exponents for scales. MiniMax-M3 keeps U8 exponents in
    `weight_scale_inv`: without a block size in the config, U8 scales mean MXFP8 (whose 32 is
    fixed), because ue8m0 block scales come with `weight_block_size`.
    """
    values = scheme.values
    strategy = values.get("strategy", "")
    if strategy in ("channel", "tensor"):
        return Scaling(str(strategy))
    rows, cols = int(values.get("block_rows", 0)), int(values.get("block_cols", 0))
    if strategy == "group":
        rows, cols = 1, int(values.get("group_size", 0))
    if "mxfp8" in (scheme.method, str(values.get("quant_algo", "")).lower()) or (
        values.get("format") == "mxfp8-quantized"
    ):
        rows, cols = rows or 1, cols or GROUP
    exponents = scale.dtype in E8M0_DTYPES
    if exponents and (rows, cols) == (1, GROUP):
        return Scaling("mx")
    if rows > 0 and cols > 0:
        return Scaling("block", rows, cols)
    if strategy in ("block", "group"):
        raise _no_block_size(scale)
    return Scaling("mx") if scale.dtype == "U8" and part.startswith("weight_scale") else None


def _by_shape(weight: TensorRef, scale: TensorRef) -> Scaling:
    """Return "tensor" or "channel" where the shape is exactly that; a grid is an error."""
    outer, matrix = weight.shape[:-2], weight.shape[-2:]
    for kind in ("tensor", "channel"):
        if scale.shape in _EXPECTED[kind](outer, matrix, Scaling(kind)):
            return Scaling(kind)
    raise _no_block_size(scale)


def _tensor_shapes(outer: tuple[int, ...], matrix: tuple[int, ...], scaling: Scaling) -> Shapes:
    return (outer, (*outer, 1), (*outer, 1, 1))


def _channel_shapes(outer: tuple[int, ...], matrix: tuple[int, ...], scaling: Scaling) -> Shapes:
    usual: Shapes = ((*outer, matrix[0], 1), (*outer, matrix[0]))
    return (*usual, (*outer, 1, matrix[1]), (*outer, matrix[1])) if outer else usual


def _block_shapes(outer: tuple[int, ...], matrix: tuple[int, ...], scaling: Scaling) -> Shapes:
    rows, cols = scaling.block_rows, scaling.block_cols
    usual = (*outer, -(-matrix[0] // rows), -(-matrix[1] // cols))
    # stacked weights may be stored transposed, their scales with them
    return (usual, (*outer, -(-matrix[0] // cols), -(-matrix[1] // rows))) if outer else (usual,)


def _mx_shapes(outer: tuple[int, ...], matrix: tuple[int, ...], scaling: Scaling) -> Shapes:
    return _block_shapes(outer, matrix, Scaling("block", 1, GROUP))


_EXPECTED: Mapping[str, Callable[[tuple[int, ...], tuple[int, ...], Scaling], Shapes]] = {
    "tensor": _tensor_shapes,
    "channel": _channel_shapes,
    "block": _block_shapes,
    "mx": _mx_shapes,
}


def _no_block_size(scale: TensorRef) -> BadSource:
    return BadSource(
        f"'{scale.name}' {list(scale.shape)} is a grid of scales, and the config gives no block"
        " size for it",
        where=scale.file,
        hint="add the block size of the quantizer (weight_block_size, block_structure) to"
        " config.json; it is not guessed from shapes",
    )


def _mismatch(
    weight: TensorRef, scale: TensorRef, scaling: Scaling, expected: Shapes
) -> ShapeMismatch:
    wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(expected))
    says = f"{scaling.kind} scales"
    if scaling.kind == "block":
        says = f"scales per block of {scaling.block_rows} x {scaling.block_cols}"
    return ShapeMismatch(
        f"'{scale.name}' has shape {list(scale.shape)}, expected {wanted}: {says} of"
        f" '{weight.name}' {list(weight.shape)}",
        where=scale.file,
        hint="the file is damaged, or config.json does not belong to it",
    )


@dataclass(frozen=True, slots=True)
class Fp8Block:
    """w[i, j] = q[i, j] * s[i // block_rows, j // block_cols]; the last blocks may be cut off."""

    name: str = "fp8-block"
    reference_nbytes: int = 12

    def tiles(self, params: Params) -> Mapping[str, Tile]:
        rows, cols = int(params["block_rows"]), int(params["block_cols"])
        return {
            "weight": Tile((str(params["dtype"]),)),
            str(params["scale"]): Tile(SCALE_DTYPES, rows=rows, cols=cols),
        }

    def detect(self, found: Mapping[str, TensorRef], scheme: QuantScheme) -> Params | None:
        return detect_scaling("block", found, scheme)

    def shape(self, found: Mapping[str, TensorRef], params: Params) -> tuple[int, ...]:
        return found["weight"].shape

    def decode(
        self, parts: Mapping[str, torch.Tensor], window: Window, params: Params
    ) -> torch.Tensor:
        """Return float32 [R, C] from codes [R, C] and scales [ceil R/block, ceil C/block]."""
        values = fp8_values(parts["weight"], str(params["dtype"]))
        scales = scale_values(parts[str(params["scale"])])
        rows, cols = int(params["block_rows"]), int(params["block_cols"])
        scales = scales.repeat_interleave(rows, dim=0)[: window.rows]  # [R, ceil C/block]
        return values * scales.repeat_interleave(cols, dim=1)[:, : window.cols]


@dataclass(frozen=True, slots=True)
class Fp8Channel:
    """w[n, k] = q[n, k] * s[n]."""

    name: str = "fp8-channel"
    reference_nbytes: int = 12

    def tiles(self, params: Params) -> Mapping[str, Tile]:
        return {
            "weight": Tile((str(params["dtype"]),)),
            str(params["scale"]): Tile(SCALE_DTYPES, cols=None),
        }

    def detect(self, found: Mapping[str, TensorRef], scheme: QuantScheme) -> Params | None:
        return detect_scaling("channel", found, scheme)

    def shape(self, found: Mapping[str, TensorRef], params: Params) -> tuple[int, ...]:
        return found["weight"].shape

    def decode(
        self, parts: Mapping[str, torch.Tensor], window: Window, params: Params
    ) -> torch.Tensor:
        """Return float32 [R, C] from codes [R, C] and scales [R, 1]."""
        scales = scale_values(parts[str(params["scale"])])
        return fp8_values(parts["weight"], str(params["dtype"])) * scales


@dataclass(frozen=True, slots=True)
class Fp8Tensor:
    """w[n, k] = q[n, k] * s: one scale per matrix, one per expert where experts are stacked."""

    name: str = "fp8-tensor"
    reference_nbytes: int = 12

    def tiles(self, params: Params) -> Mapping[str, Tile]:
        return {
            "weight": Tile((str(params["dtype"]),)),
            str(params["scale"]): Tile(SCALE_DTYPES, rows=None, cols=None),
        }

    def detect(self, found: Mapping[str, TensorRef], scheme: QuantScheme) -> Params | None:
        return detect_scaling("tensor", found, scheme)

    def shape(self, found: Mapping[str, TensorRef], params: Params) -> tuple[int, ...]:
        return found["weight"].shape

    def decode(
        self, parts: Mapping[str, torch.Tensor], window: Window, params: Params
    ) -> torch.Tensor:
        """Return float32 [R, C] from codes [R, C] and one scale [1, 1]."""
        scales = scale_values(parts[str(params["scale"])])
        return fp8_values(parts["weight"], str(params["dtype"])) * scales
