"""FP8 weights for tests of kernels: every byte, every kind of scale."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from moeconv.types import Params
from tests.kernels import oracle

FORMATS = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
SCALES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
}


def around(bits: int) -> list[int]:
    return [bits - 1, bits, bits + 1]


def special_scales() -> torch.Tensor:
    """Return float32 [N]: every exponent, the edges of both ways through the kernel, noise."""
    powers = [exponent << 23 for exponent in range(1, 255)]
    edges = [0, 1, 2, 0x00400000, 0x007FFFFF, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000]
    # 2^-126 over the smallest number, 2^127 and 2^15 over the largest, of E4M3 and of E5M2
    for exponent in (-117, -110, 118, 111, 6, -1):
        edges += around((exponent + 127) << 23)
    noise = np.random.default_rng(3).integers(0, 1 << 32, 200).tolist()
    bits = np.array([*powers, *edges, *(bit | 1 << 31 for bit in edges), *noise], np.uint32)
    return torch.from_numpy(bits.view(np.float32))


def codes(shape: tuple[int, ...], dtype: str, seed: int = 0) -> torch.Tensor:
    found = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return torch.from_numpy(found).view(FORMATS[dtype])


def scales(shape: tuple[int, ...], dtype: str, seed: int = 1) -> torch.Tensor:
    """Return scales, most of them ordinary; each 16th is any bits at all."""
    rng = np.random.default_rng(seed)
    if dtype in ("F8_E8M0", "U8"):
        found = rng.integers(110, 135, shape, dtype=np.uint8)
        wild = rng.integers(0, 256, shape, dtype=np.uint8)
        chosen = np.where(rng.integers(0, 16, shape) == 0, wild, found)
        return torch.from_numpy(chosen).view(SCALES[dtype])
    plain = torch.from_numpy(rng.uniform(1e-4, 2.0, shape).astype(np.float32)).to(SCALES[dtype])
    whole = torch.int32 if dtype == "F32" else torch.int16
    bits = rng.integers(0, 1 << 32, shape, dtype=np.uint32).astype(f"u{plain.element_size()}")
    wild_bits = torch.from_numpy(bits.view(f"i{bits.itemsize}"))
    chosen = torch.from_numpy(rng.integers(0, 16, shape) == 0)
    return torch.where(chosen, wild_bits, plain.view(whole)).view(SCALES[dtype])


def every_byte(rows: int, dtype: str) -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).repeat(rows, 1).view(FORMATS[dtype])


def finite_bytes(rows: int, dtype: str) -> torch.Tensor:
    found = every_byte(rows, dtype)
    return found[:, found[0].float().isfinite()]


def grid(rows: int, cols: int, block: tuple[int, int]) -> tuple[int, int]:
    return -(-rows // block[0]), -(-cols // block[1])


def params_of(form: str, block: tuple[int, int] | None = None) -> Params:
    found: dict[str, int | str | bool | float] = {"dtype": form, "scale": "weight_scale"}
    return found if block is None else found | {"block_rows": block[0], "block_cols": block[1]}


def check_blocks(
    size: tuple[int, int],
    block: tuple[int, int],
    kinds: tuple[str, str],
    *,
    transposed: bool = False,
    dtypes: tuple[str, ...] = ("BF16", "F32"),
    check: Callable[..., None] = oracle.check,
) -> None:
    """Compare a weight of random codes and scales; kinds: dtypes of both."""
    (rows, cols), (form, scale) = size, kinds
    weight, by = codes(size, form), scales(grid(rows, cols, block), scale)
    if transposed:
        weight, by = weight.T.contiguous(), by.T.contiguous()
    tensors = {"weight": weight, "weight_scale": by}
    params = params_of(form, block)
    check("fp8-block", tensors, params, transposed=transposed, dtypes=dtypes)


def check_shape(
    size: tuple[int, int],
    block: tuple[int, int],
    *,
    transposed: bool,
    check: Callable[..., None] = oracle.check,
) -> None:
    """Compare a weight of the usual dtypes, whose size and block are what matters."""
    kinds, dtypes = ("F8_E4M3", "F32"), ("BF16", "F16", "F32")
    check_blocks(size, block, kinds, transposed=transposed, dtypes=dtypes, check=check)
