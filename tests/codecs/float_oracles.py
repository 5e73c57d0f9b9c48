"""What the tests of the float codecs share: real files, windows by the tile rule, bit equality."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from moeconv.codecs import CODECS
from moeconv.codecs.base import Codec, QuantScheme, Window, block_of, grow, part_slice
from moeconv.types import Params, Span, TensorRef, Weight

FIXTURES = Path(__file__).parent.parent / "fixtures"
DTYPE_NAMES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
}
Tensors = Mapping[str, torch.Tensor]
PROJECTIONS = {
    "proj": {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
    "w": {"gate": "w1", "up": "w3", "down": "w2"},
}


def ref(part: str, dtype: str, shape: tuple[int, ...]) -> TensorRef:
    return TensorRef(f"m.{part}", dtype, shape, "model.safetensors", 0, 0)


def refs(**parts: tuple[str, tuple[int, ...]]) -> dict[str, TensorRef]:
    return {part: ref(part, dtype, shape) for part, (dtype, shape) in parts.items()}


def refs_of(tensors: Tensors) -> dict[str, TensorRef]:
    return {p: ref(p, DTYPE_NAMES[t.dtype], tuple(t.shape)) for p, t in tensors.items()}


def detect_one(found: Mapping[str, TensorRef], scheme: QuantScheme) -> tuple[Codec, Params]:
    """Return the one codec of all that takes these parts."""
    hits = [(c, p) for c in CODECS.values() if (p := c.detect(found, scheme)) is not None]
    assert len(hits) == 1, [codec.name for codec, _ in hits]
    return hits[0]


def takers(found: Mapping[str, TensorRef], scheme: QuantScheme) -> list[str]:
    return [c.name for c in CODECS.values() if c.detect(found, scheme) is not None]


def weight_of(
    codec: Codec, params: Params, found: Mapping[str, TensorRef], transposed: bool = False
) -> Weight:
    """Return one slot's weight; the refs have no expert axis."""
    stored = codec.shape(found, params)
    rows, cols = reversed(stored) if transposed else stored
    return Weight(
        name="m.weight",
        codec=codec.name,
        rows=rows,
        cols=cols,
        slots=None,
        parts=found,
        transposed=transposed,
        params=params,
        stack="main",
        layer=0,
        expert=0,
        projections=(("gate", Span(0, rows)),),
        shape=(rows, cols),
        form_transposed=False,
        is_expert=True,
    )


def decode_window(codec: Codec, weight: Weight, tensors: Tensors, window: Window) -> torch.Tensor:
    """Return float32 of a window: grow to blocks, take each part's slice, decode, crop."""
    tiles = codec.tiles(weight.params)
    assert set(tiles) == set(tensors)
    block = block_of(tuple(tiles.values()), weight.rows, weight.cols)
    grown = grow(window, block, weight.rows, weight.cols)
    parts = {}
    for part, tile in tiles.items():
        cut = part_slice(tile, grown, weight)
        stored = tensors[part].contiguous().reshape(cut.extent)
        stored = stored[cut.major.start : cut.major.stop, cut.minor.start : cut.minor.stop]
        parts[part] = (stored.T if weight.transposed else stored).contiguous()
    decoded = codec.decode(parts, grown, weight.params)
    assert decoded.dtype == torch.float32
    assert decoded.shape == (grown.rows, grown.cols)
    top, left = window.row_start - grown.row_start, window.col_start - grown.col_start
    return decoded[top : top + window.rows, left : left + window.cols]


def decode_whole(
    tensors: Tensors, scheme: QuantScheme, transposed: bool = False
) -> tuple[str, torch.Tensor]:
    """Return (codec's name, float32 [R, C]) of one slot's tensors, as detection reads them."""
    found = refs_of(tensors)
    codec, params = detect_one(found, scheme)
    weight = weight_of(codec, params, found, transposed)
    whole = Window(0, weight.rows, 0, weight.cols)
    return codec.name, decode_window(codec, weight, tensors, whole)


def assert_windows_are_crops(
    tensors: Tensors, scheme: QuantScheme, transposed: bool = False
) -> None:
    """Compare forty random windows with crops of the whole."""
    found = refs_of(tensors)
    codec, params = detect_one(found, scheme)
    weight = weight_of(codec, params, found, transposed)
    whole = decode_window(codec, weight, tensors, Window(0, weight.rows, 0, weight.cols))
    draw = torch.Generator().manual_seed(7)
    for _ in range(40):
        top, bottom = sorted(torch.randint(0, weight.rows + 1, (2,), generator=draw).tolist())
        left, right = sorted(torch.randint(0, weight.cols + 1, (2,), generator=draw).tolist())
        if top == bottom or left == right:
            continue
        got = decode_window(codec, weight, tensors, Window(top, bottom, left, right))
        assert_same(got, whole[top:bottom, left:right])


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare bit by bit (so 0 is not -0), except that every NaN is the same."""
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    nan = expected.isnan()
    assert torch.equal(got.isnan(), nan)
    bits = torch.int32 if got.dtype == torch.float32 else torch.int16
    differ = (got.contiguous().view(bits) != expected.contiguous().view(bits)) & ~nan
    assert not differ.any(), f"{int(differ.sum())} of {differ.numel()} differ"


def load_checkpoint(name: str) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted((FIXTURES / "checkpoints" / name).glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def load_oracle(name: str) -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / "oracles" / name / "dequantized.safetensors")


def parts_of(tensors: Tensors, base: str, activation: tuple[str, ...] = ()) -> Tensors:
    """Return the parts of a linear layer: what follows its name and a dot."""
    prefix = f"{base}."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and name.removeprefix(prefix) not in activation
    }


def source_name(oracle_name: str, pattern: str, words: str) -> str:
    """Return the module that an oracle's weight was: `pattern` has layer, expert and proj."""
    if oracle_name.startswith("other."):
        return oracle_name.removeprefix("other.").removesuffix(".weight")
    _, layer, _, expert, projection, _ = oracle_name.split(".")
    return pattern.format(layer=layer, expert=expert, proj=PROJECTIONS[words][projection])


def fill(shape: tuple[int, ...], seed: int, low: int = 0, high: int = 256) -> torch.Tensor:
    """Return random bytes."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=draw, dtype=torch.uint8)


def floats(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Return random positive float32 between 2^-8 and 2^2."""
    draw = torch.Generator().manual_seed(seed)
    return 2.0 ** (torch.rand(shape, generator=draw) * 10 - 8)
