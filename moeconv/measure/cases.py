"""Weights to decode: random parts, as stored, of every format that has a CPU kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moeconv.codecs.nf4 import NESTED_CODES, NF4_CODES
from moeconv.kernels.cpu.ggml import BLOCK_TYPES
from moeconv.types import Params

Array = npt.NDArray[Any]
Parts = dict[str, Array]
GROUP = 128  # columns per scale of the integer formats
# Bytes at which a block has float16 scales; random bytes there would be NaN and Inf.
HALVES: Mapping[str, tuple[int, ...]] = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "MXFP4": (),
}


class Tile(NamedTuple):
    """The extent of the weight that one call decodes."""

    rows: int
    cols: int


class Case(NamedTuple):
    """A format to decode: a kernel's name and what it takes. `bits`: per value, as stored."""

    title: str
    kernel: str
    parts: Parts
    params: Params
    bits: int

    def copied(self) -> Case:
        """Return the case with parts in memory of its own."""
        return self._replace(parts={part: array.copy() for part, array in self.parts.items()})


class Draw:
    """Random numbers of the kinds that parts hold; all of them finite."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def bytes(self, *shape: int) -> Array:
        return self.rng.integers(0, 256, shape, dtype=np.uint8)

    def words(self, *shape: int) -> Array:
        return self.rng.integers(0, 1 << 32, shape, dtype=np.uint32).view(np.int32)

    def fp8(self, *shape: int) -> Array:
        """Return bytes that are no NaN and no Inf in E4M3."""
        sign = self.rng.integers(0, 2, shape, dtype=np.uint8) << 7
        return self.rng.integers(0, 0x7F, shape, dtype=np.uint8) | sign

    def exponents(self, *shape: int) -> Array:
        return self.rng.integers(112, 124, shape, dtype=np.uint8)

    def scales(self, *shape: int) -> Array:
        return self.rng.uniform(1e-3, 1e-1, shape).astype(np.float32)

    def normal(self, *shape: int) -> Array:
        return self.rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)


def fours(tile: Tile, draw: Draw) -> Iterator[Case]:
    """Yield the 4-bit floating formats."""
    rows, cols = tile
    pair = (rows, cols // 2)
    mx = {"blocks": draw.bytes(*pair), "scales": draw.exponents(rows, cols // 32)}
    names: Params = {"codes": "blocks", "scales": "scales"}
    yield Case("MXFP4", "mxfp4", mx, names, 4)
    scales = draw.fp8(rows, cols // 16) & np.uint8(0x7F)
    ct = {
        "weight_packed": draw.bytes(*pair),
        "weight_scale": scales,
        "weight_global_scale": np.full((1, 1), 64, np.float32),
    }
    yield Case("NVFP4, compressed-tensors", "nvfp4-ct", ct, {}, 4)
    modelopt = {
        "weight": draw.bytes(*pair),
        "weight_scale": scales,
        "weight_scale_2": np.full((1, 1), 1 / 64, np.float32),
    }
    yield Case("NVFP4, ModelOpt", "nvfp4-modelopt", modelopt, {}, 4)
    yield Case("NF4", "nf4", *nf4(tile, draw), 4)


def nf4(tile: Tile, draw: Draw) -> tuple[Parts, Params]:
    """Return NF4 in bitsandbytes' blocks of 64, its scales quantized in blocks of 256."""
    count = tile.rows * tile.cols
    blocks = -(-count // 64)
    params: Params = {
        "rows": tile.rows,
        "cols": tile.cols,
        "blocksize": 64,
        "nested_blocksize": 256,
        "nested_offset": 0.02,
    }
    parts = {
        "weight": draw.bytes(-(-count // 2), 1),
        "weight.absmax": draw.bytes(1, blocks),
        "weight.quant_map": np.sort(draw.normal(1, NF4_CODES)),
        "weight.nested_absmax": draw.scales(1, -(-blocks // 256)),
        "weight.nested_quant_map": np.sort(draw.normal(1, NESTED_CODES)),
    }
    return parts, params


def eights(tile: Tile, draw: Draw) -> Iterator[Case]:
    """Yield the 8-bit floating formats."""
    rows, cols = tile
    params: Params = {"dtype": "F8_E4M3", "scale": "weight_scale"}
    blocks: Params = {**params, "block_rows": 128, "block_cols": 128}
    grids = (
        ("FP8, blocks of 128 x 128", "fp8-block", blocks, (-(-rows // 128), -(-cols // 128))),
        ("FP8, a scale per row", "fp8-channel", params, (rows, 1)),
        ("FP8, one scale", "fp8-tensor", params, (1, 1)),
    )
    for title, kernel, given, grid in grids:
        parts = {"weight": draw.fp8(rows, cols), "weight_scale": draw.scales(*grid)}
        yield Case(title, kernel, parts, given, 8)
    parts = {"weight": draw.fp8(rows, cols), "weight_scale": draw.exponents(rows, cols // 32)}
    yield Case("MXFP8", "mxfp8", parts, params, 8)


def grouped(cols: int) -> Params:
    """Return the parameters of a scale per row and group of columns."""
    return {
        "strategy": "group",
        "group_size": GROUP,
        "groups": cols // GROUP,
        "act_order": False,
    }


def integers(tile: Tile, draw: Draw) -> Iterator[Case]:
    """Yield the integer formats stored [rows, cols]; groups of 128, no zero points."""
    rows, cols = tile
    groups = cols // GROUP
    for bits in (4, 8):
        packed: Params = {
            **grouped(cols),
            "bits": bits,
            "zeros": "absent",
            "shape_len": 0,
            "rows": rows,
            "cols": cols,
            "packing": "dense",
        }
        parts = {
            "weight_packed": draw.words(rows, cols * bits // 32),
            "weight_scale": draw.scales(rows, groups),
        }
        yield Case(f"packed INT{bits}", "packed-int", parts, packed, bits)
    parts = {
        "weight": draw.bytes(rows, cols).view(np.int8),
        "weight_scale": draw.scales(rows, groups),
    }
    yield Case("INT8", "int-quantized", parts, {**grouped(cols), "zeros": False}, 8)


def turned_integers(tile: Tile, draw: Draw) -> Iterator[Case]:
    """Yield the integer formats stored [cols, rows]; groups of 128 with packed zero points."""
    rows, cols = tile
    groups = cols // GROUP
    turned = {"scales": draw.scales(groups, rows), "qzeros": draw.words(groups, rows // 8)}
    gptq: Params = {
        "bits": 4,
        "group_size": GROUP,
        "groups": groups,
        "rows": rows,
        "sym": False,
        "act_order": False,
        "g_idx": False,
        "zeros": "packed",
        "zero_offset": 1,
    }
    yield Case("GPTQ INT4", "gptq", {"qweight": draw.words(cols // 8, rows), **turned}, gptq, 4)
    awq: Params = {"group_size": GROUP, "zeros": "packed"}
    yield Case("AWQ INT4", "awq", {"qweight": draw.words(cols, rows // 8), **turned}, awq, 4)


def floats(tile: Tile, draw: Draw) -> Iterator[Case]:
    """Yield the floating formats that are cast."""
    values = draw.normal(*tile)
    halves = values.astype(np.float16).view(np.uint16)
    for dtype, stored, bits in (("F32", values, 32), ("F16", halves, 16)):
        yield Case(dtype, "float", {"weight": stored}, {"dtype": dtype}, bits)


def ggml(tile: Tile, draw: Draw) -> Iterator[Case]:
    """Yield ggml's block types that have a kernel."""
    rows, cols = tile
    for name, kind in BLOCK_TYPES.items():
        blocks = draw.bytes(rows, cols // kind.cols, kind.nbytes)
        half = np.array([0.01], np.float16).view(np.uint8)
        for at in HALVES[name]:
            blocks[..., at : at + 2] = half
        if name == "MXFP4":
            blocks[..., 0] = draw.exponents(rows, cols // kind.cols)
        params: Params = {
            "type": name,
            "block_cols": kind.cols,
            "block_nbytes": kind.nbytes,
        }
        parts = {"weight": blocks.reshape(rows, -1)}
        bits = round(kind.nbytes * 8 / kind.cols)
        yield Case(f"ggml {name}", "ggml", parts, params, bits)


MAKERS: tuple[Callable[[Tile, Draw], Iterator[Case]], ...] = (
    fours,
    eights,
    integers,
    turned_integers,
    floats,
    ggml,
)


def cases(tile: Tile) -> Iterator[Case]:
    """Yield every case, its parts made when it is asked for."""
    draw = Draw()
    for make in MAKERS:
        yield from make(tile, draw)
