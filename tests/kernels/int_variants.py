"""Integer weights that are read in other ways than those that are timed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from moeconv.measure.cases import Tile
from tests.kernels.int_parts import with_params
from tests.kernels.int_weights import Made, awq, gptq, ordered, packed, plain


def _packed(tile: Tile) -> Iterator[tuple[str, Made]]:
    make = partial(packed, tuple(tile))
    for bits in (2, 3, 5, 6, 7):
        yield f"{bits} bits", make(bits, 128)
    yield "3 bits, padded", make(3, 128, "packed", packing="padded")
    yield "in activation order", make(4, 128, order="given")
    yield "groups of 4", make(4, 4, "plain")
    yield "one number", make(8, 0, "plain", scale="F16")
    yield "zeros packed", make(4, 32, "packed", scale="BF16")


def _plain(tile: Tile) -> Iterator[tuple[str, Made]]:
    yield "zeros of 32 bits", plain(tuple(tile), 128, torch.int32, False)
    yield "zeros of 8 bits in activation order", plain(tuple(tile), 128, torch.int8, True)


def _gptq(tile: Tile) -> Iterator[tuple[str, Made]]:
    make = partial(gptq, tuple(tile))
    for bits in (2, 3, 8):
        yield f"{bits} bits", make(bits, 128, scale="F16")
    yield "in activation order", ordered(make(4, 128))
    yield "symmetric", make(4, 128, "absent")
    parts, params = make(8, -1)
    yield "v2", (parts, with_params(params, zero_offset=0))


def _awq(tile: Tile) -> Iterator[tuple[str, Made]]:
    yield "without zeros", awq(tuple(tile), 128, "absent")
    yield "groups of 4", awq(tuple(tile), 4)


MAKERS = {"packed INT4": _packed, "INT8": _plain, "GPTQ INT4": _gptq, "AWQ INT4": _awq}


def int_variants(title: str, tile: Tile) -> Iterator[tuple[str, Made]]:
    """Yield a title and what it is made of, for a case that is the usual one of its codec."""
    if title in MAKERS:
        for name, (parts, params) in MAKERS[title](tile):
            given = {part: stored.reshape(-1, stored.shape[-1]) for part, stored in parts.items()}
            yield f"{title}, {name}", (given, params)
