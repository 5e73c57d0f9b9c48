"""Independent packers and decoders of integer formats, element by element on Python integers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from moeconv.codecs import CODECS
from moeconv.codecs.base import Codec, QuantScheme, Window, block_of, grow, part_slice
from moeconv.codecs.bits import PEEK
from moeconv.types import Params, TensorRef, Weight

FIXTURES = Path(__file__).parents[1] / "fixtures"
DTYPES = {
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}
Tensors = Mapping[str, torch.Tensor]


def stream_words(values: list[int], bits: int) -> list[int]:
    """Return the 32-bit words of a dense little-endian stream, by one long Python integer."""
    stream = sum(value << index * bits for index, value in enumerate(values))
    count = -(-len(values) * bits // 32)
    return [stream >> 32 * index & 0xFFFFFFFF for index in range(count)]


def padded_words(values: list[int], bits: int) -> list[int]:
    """Return the words that hold 32 // bits values each."""
    per_word = 32 // bits
    starts = range(0, len(values), per_word)
    return [stream_words(values[at : at + per_word], bits)[0] for at in starts]


def pack_rows(codes: np.ndarray, bits: int, pack: Any = stream_words) -> torch.Tensor:
    """Return int32 words [A, W] of codes [A, B]; every row is a stream of its own."""
    words = [pack([int(code) for code in row], bits) for row in codes]
    return torch.from_numpy(np.array(words, dtype=np.uint32).view(np.int32).copy())


def field(column: np.ndarray, index: int, bits: int) -> int:
    """Return field `index` of a dense stream of int32 words."""
    stream = int.from_bytes(np.ascontiguousarray(column, dtype="<i4").tobytes(), "little")
    return stream >> index * bits & (1 << bits) - 1


def gptq_weight(tensors: Tensors, bits: int, offset: int) -> np.ndarray:
    """Return float32 [N, K] by GPTQModel's formula: scales[g_idx] * (q - zeros[g_idx])."""
    qweight, qzeros = tensors["qweight"].numpy(), tensors["qzeros"].numpy()
    scales = tensors["scales"].float().numpy()
    g_idx = tensors["g_idx"].numpy()
    rows = qweight.shape[1]
    weight = np.empty((rows, len(g_idx)), dtype=np.float32)
    for n in range(rows):
        for k, group in enumerate(g_idx):
            zero = field(qzeros[group], n, bits) + offset
            code = field(qweight[:, n], k, bits)
            weight[n, k] = np.float32(code - zero) * scales[group, n]
    return weight


def refs(tensors: Tensors, base: str = "m") -> dict[str, TensorRef]:
    """Return headers of tensors by part."""
    return {
        part: TensorRef(
            f"{base}.{part}", DTYPES[tensor.dtype], tuple(tensor.shape), "f.safetensors", 0, 0
        )
        for part, tensor in tensors.items()
    }


def parameters(name: str, tensors: Tensors, scheme: QuantScheme) -> Params:
    """Return the parameters that a codec finds, its payloads read; only one codec may answer."""
    found = refs(tensors)
    answers = {codec.name: codec.detect(found, scheme) for codec in CODECS.values()}
    claims = {other: params for other, params in answers.items() if params is not None}
    assert set(claims) == {name}
    payloads = {part: tensors[part].numpy() for part in PEEK.get(name, ()) if part in tensors}
    codec: Any = CODECS[name]
    return codec.settle(found, claims[name], payloads) if name in PEEK else claims[name]


def weight_of(codec: Codec, tensors: Tensors, params: Params) -> Weight:
    found = refs(tensors)
    *_, rows, cols = shape = codec.shape(found, params)
    return Weight(
        "m",
        codec.name,
        rows,
        cols,
        None,
        found,
        False,
        params,
        "main",
        0,
        0,
        (),
        shape,
        False,
        True,
    )


def decode(name: str, tensors: Tensors, params: Params, window: Window | None = None) -> Any:
    """Return float32 of a window (or all), handing the codec only what part_slice says."""
    codec = CODECS[name]
    weight = weight_of(codec, tensors, params)
    window = window or Window(0, weight.rows, 0, weight.cols)
    parts = {}
    for part, tile in codec.tiles(params).items():
        at = part_slice(tile, window, weight)
        stored = tensors[part].reshape(at.extent)
        parts[part] = stored[at.major.start : at.major.stop, at.minor.start : at.minor.stop]
    return codec.decode(parts, window, params)


def assert_windows(name: str, tensors: Tensors, params: Params, seed: int = 0) -> None:
    """Assert that random windows, grown to blocks, are crops of the whole weight."""
    codec = CODECS[name]
    whole = decode(name, tensors, params)
    rows, cols = whole.shape
    block = block_of(list(codec.tiles(params).values()), rows, cols)
    draw = np.random.default_rng(seed)
    for _ in range(12):
        row, col = int(draw.integers(rows)), int(draw.integers(cols))
        stops = int(draw.integers(row, rows)) + 1, int(draw.integers(col, cols)) + 1
        window = grow(Window(row, stops[0], col, stops[1]), block, rows, cols)
        crop = whole[window.row_start : window.row_stop, window.col_start : window.col_stop]
        assert torch.equal(decode(name, tensors, params, window), crop), window


def fixture(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """Return the checkpoint, the oracle's weights and the quantization_config of a fixture."""
    folder = FIXTURES / "checkpoints" / name
    config = json.loads((folder / "config.json").read_text())
    oracle = load_file(FIXTURES / "oracles" / name / "dequantized.safetensors")
    return load_file(folder / "model.safetensors"), oracle, config["quantization_config"]


def assert_fixture(codec: str, name: str, scheme: QuantScheme) -> None:
    """Assert that every expert weight equals the oracle bit for bit, after one rounding."""
    stored, oracle, _ = fixture(name)
    experts = [key for key in oracle if key.startswith("layers.") and key.endswith(".weight")]
    assert experts
    for key in experts:
        _, layer, _, expert, projection, _ = key.split(".")
        base = f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj."
        parts = {k.removeprefix(base): v for k, v in stored.items() if k.startswith(base)}
        params = parameters(codec, parts, scheme)
        weight = decode(codec, parts, params).to(oracle[key].dtype)
        assert torch.equal(weight.view(torch.int16), oracle[key].view(torch.int16)), key
        assert_windows(codec, parts, params)
