"""ggml's block types on a GPU, against gguf-py's decoders rounded once by torch."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from moeconv.codecs import CODECS
from moeconv.codecs.base import Window
from moeconv.device.ways import CPU, KERNEL, way_of
from moeconv.errors import ShapeMismatch
from moeconv.kernels.cpu.ggml import BLOCK_TYPES as ON_CPU
from moeconv.kernels.gpu.ggml import BLOCK_TYPES
from tests.codecs.float_oracles import weight_of
from tests.kernels.ggml_blocks import HALVES, half, params_of, some_blocks, tamed
from tests.kernels.gpu_oracle import check, check_numbers, run
from tests.kernels.oracle import headers

KINDS = tuple(BLOCK_TYPES)
DTYPES = ("BF16", "F16", "F32")


def compare(kind: str, rows: np.ndarray, dtypes: tuple[str, ...] = DTYPES) -> None:
    check_numbers("ggml", {"weight": torch.from_numpy(rows)}, params_of(kind), dtypes=dtypes)


def test_the_sizes_are_gguf_pys() -> None:
    found = {kind: (block.cols, block.nbytes) for kind, block in BLOCK_TYPES.items()}
    assert found == {
        kind: tuple(gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]) for kind in KINDS
    }


@pytest.mark.parametrize("kind", [*KINDS, "IQ2_XS", "TQ2_0"])
def test_types_without_a_kernel_are_left_to_the_cpu(kind: str) -> None:
    """A GPU has kernels for the types that the CPU has, which is what is asked without Triton."""
    tensors = {"weight": torch.from_numpy(some_blocks(kind, 2, 1))}
    weight = weight_of(CODECS["ggml"], params_of(kind), headers(tensors))
    assert way_of(weight) == (KERNEL if kind in KINDS else CPU)
    assert set(KINDS) == set(ON_CPU)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (33, 3)])
def test_random_bytes(kind: str, rows: int, blocks: int) -> None:
    tensors = {"weight": torch.from_numpy(some_blocks(kind, rows, blocks, seed=rows))}
    check("ggml", tensors, params_of(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_count(kind: str) -> None:
    """The usual tile, which is rounded without a look at NaN."""
    tensors = {"weight": torch.from_numpy(tamed(kind, some_blocks(kind, 9, 3)))}
    check("ggml", tensors, params_of(kind))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if HALVES[kind]])
def test_kinds_of_halves(kind: str) -> None:
    """Every sign and exponent with five mantissas; two halves of a block in any combination."""
    tops = np.arange(64, dtype=np.uint16) << 10
    halves = (tops[:, None] | np.array([0, 1, 0x1FF, 0x200, 0x3FF], np.uint16)).ravel()
    blocks = some_blocks(kind, len(halves), 1)
    random = np.random.default_rng(1)
    for index, at in enumerate(HALVES[kind]):
        chosen = random.permutation(halves) if index else halves
        blocks[:, at : at + 2] = chosen.view(np.uint8).reshape(-1, 2)
    compare(kind, blocks.reshape(40, -1))


@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_of_the_block_takes_every_value(kind: str) -> None:
    first, last = some_blocks(kind, 1, 1), np.arange(256, dtype=np.uint8)
    blocks = (np.repeat(first, 256, 0) + last[:, None] * 37).astype(np.uint8)
    for at in HALVES[kind]:
        blocks[:, at : at + 2] = np.frombuffer(half(0.37), np.uint8)
    compare(kind, blocks.reshape(64, -1), ("F32",))


def test_every_scale_byte_and_code_of_mxfp4() -> None:
    blocks = np.zeros((256, 17), np.uint8)
    blocks[:, 0] = np.arange(256)
    blocks[:, 1:] = np.arange(16, dtype=np.uint8) * 17
    compare("MXFP4", blocks.reshape(32, -1))


@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K"])
def test_a_window_of_a_weight(kind: str) -> None:
    cols = int(params_of(kind)["block_cols"])
    tensors = {"weight": torch.from_numpy(some_blocks(kind, 12, 5))}
    check("ggml", tensors, params_of(kind), window=Window(3, 11, cols, 4 * cols))


def test_wrong_shapes_are_refused() -> None:
    parts = {"weight": torch.zeros(4, 33, dtype=torch.uint8)}
    with pytest.raises(ShapeMismatch, match="weight"):
        run("ggml", parts, params_of("Q8_0"), "BF16", (4, 32))
