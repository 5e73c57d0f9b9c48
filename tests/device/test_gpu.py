"""A conversion decoded on GPUs: the same bytes as on the CPU, within the memory it may take.

Without a GPU the devices are the CPU twice over: everything but streams and page-locked memory
runs, the kernels in Triton's interpreter.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
import triton

from moeconv import api
from moeconv.decoding import CpuDecoder
from moeconv.device.choose import Chosen
from moeconv.device.gpu import GpuDecoder, _by_kernel
from moeconv.device.open import _sample, keep_compiled, try_out
from moeconv.device.ways import REFERENCE
from moeconv.errors import BadSource, IOFailed, Refused
from moeconv.resources import Resources
from tests.checkpoints import Size, quick_directory, write_checkpoint
from tests.conftest import FIXTURES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ARENA_NBYTES = 1 << 20
FLOOR_NBYTES = 3 << 18
# One of every codec, and one whose experts are copied.
SOURCES = (
    "deepseekv3-fp8-block128",
    "deepseekv4-mxfp4",
    "gguf-llamacpp-olmoe",
    "gguf-qwen3moe-q4_k_m",
    "glm4moe-fp8-channel",
    "gptoss-bf16",
    "gptoss-mxfp4",
    "kimik2-int4-packed-g32",
    "mixtral-fp8-tensor-modelopt",
    "mixtral-mxfp8-ct",
    "qwen3moe-awq-int4-g32",
    "qwen3moe-gptq-int4-g128",
    "qwen3moe-nvfp4-ct",
    "qwen3moe-nvfp4-modelopt-dev",
)
OPTIONS: tuple[dict[str, Any], ...] = ({}, {"dtype": "fp32"})


class Watched(GpuDecoder):
    """A decoder that tells what it decoded and packed."""

    def __init__(self, devices: list[torch.device], arena_nbytes: int) -> None:
        super().__init__(devices, arena_nbytes)
        self.decoded: set[str] = set()
        self.packed: set[str] = set()

    def decode(self, weight: Any, *arguments: Any) -> Any:
        self.decoded.add(weight.codec)
        return super().decode(weight, *arguments)

    def encode(self, form: str, part: str, *arguments: Any) -> Any:
        self.packed.add(f"{form} {part}")
        return super().encode(form, part, *arguments)


def use(monkeypatch: pytest.MonkeyPatch, decoder: Any) -> None:
    room = import_module("moeconv.convert")
    monkeypatch.setattr(room, "choose_decoder", lambda *_: Chosen(decoder, ("gpu",)))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.mark.parametrize("name", SOURCES)
def test_every_codec_gives_the_same_bytes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = FIXTURES / "checkpoints" / name
    with quick_directory() as directory:
        layer = max(one.layer for one in api.inspect(source).weights if one.is_expert)
        plan = api.plan(source, layers=(layer,))
        api.convert(plan, directory / "cpu", resources=Resources(device="cpu"))
        decoder = Watched([DEVICE, DEVICE], ARENA_NBYTES)
        use(monkeypatch, decoder)
        result = api.convert(plan, directory / "gpu", resources=Resources(jobs=3))
        assert result.devices == ("gpu",)
        assert files_of(directory / "gpu") == files_of(directory / "cpu")
        assert decoder.decoded or name == "gptoss-bf16"


@pytest.mark.parametrize("options", OPTIONS)
def test_every_dtype_gives_the_same_bytes(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with quick_directory() as directory:
        plan = api.plan(FIXTURES / "checkpoints" / "gptoss-mxfp4", layers=(0,), **options)
        api.convert(plan, directory / "cpu", resources=Resources(device="cpu"))
        use(monkeypatch, Watched([DEVICE], ARENA_NBYTES))
        api.convert(plan, directory / "gpu", resources=Resources(jobs=3))
        assert files_of(directory / "gpu") == files_of(directory / "cpu")


def test_a_small_arena_cuts_tasks_into_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task whose window would not fit in the device's memory is done in runs of rows."""
    with quick_directory() as directory:
        source = FIXTURES / "checkpoints" / "gptoss-mxfp4"
        plan = api.plan(source, layout="vllm", tp=2, layers=(0,))
        api.convert(plan, directory / "cpu", resources=Resources(device="cpu"))
        decoder = Watched([DEVICE], FLOOR_NBYTES)
        lent: list[int] = []
        keep = decoder._arenas.lent
        monkeypatch.setattr(decoder._arenas, "lent", lambda n: (lent.append(n), keep(n))[1])
        use(monkeypatch, decoder)
        api.convert(plan, directory / "gpu", resources=Resources(jobs=3))
        assert files_of(directory / "gpu") == files_of(directory / "cpu")
        assert max(lent) <= FLOOR_NBYTES
        with pytest.raises(Refused, match="--vram is too small"):
            use(monkeypatch, Watched([DEVICE], FLOOR_NBYTES // 8))
            api.convert(plan, directory / "no", resources=Resources(jobs=3))
        assert not (directory / "no").exists() or not list((directory / "no").glob("*.partial"))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_reference_on_the_device_rounds_and_counts_alike(
    dtype: str, turned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, window, parts = _sample()
    monkeypatch.setattr("moeconv.device.gpu.way_of", lambda _: REFERENCE)
    bits = {"F32": np.float32}.get(dtype, np.uint16)
    wanted, found = np.empty((256, 512), bits), np.empty((512, 256), bits).T
    counts = CpuDecoder().decode(weight, parts, window, dtype, wanted)
    there = found if turned else np.empty((256, 512), bits)
    decoder = GpuDecoder([DEVICE], ARENA_NBYTES)
    assert decoder.decode(weight, parts, window, dtype, there) == counts
    assert (there.view(f"u{there.itemsize}") == wanted.view(f"u{wanted.itemsize}")).all()
    assert counts.nan and (counts.inf or counts.overflow)


def test_a_device_that_decodes_to_other_bits_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    try_out([DEVICE])

    def off_by_one(weight: Any, parts: Any, window: Any, out: Any) -> None:
        _by_kernel(weight, parts, window, out)
        out.bits[3, 5] += 1

    def counted_twice(weight: Any, parts: Any, window: Any, out: Any) -> None:
        _by_kernel(weight, parts, window, out)
        out.counts.mul_(2)

    for broken in (off_by_one, counted_twice):
        monkeypatch.setattr("moeconv.device.gpu._by_kernel", broken)
        with pytest.raises(Refused, match="other bits than the CPU"):
            try_out([DEVICE])


def test_compiled_kernels_are_kept_in_the_users_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept = tmp_path / "moeconv" / "kernels"
    monkeypatch.setattr("moeconv.device.open.cache_directory", lambda: kept)
    monkeypatch.setenv("TRITON_CACHE_DIR", "so that it is put back")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    keep_compiled()
    assert triton.knobs.cache.dir == str(tmp_path / "moeconv" / "triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
    keep_compiled()
    assert triton.knobs.cache.dir == "elsewhere"


def test_a_device_that_fails_is_an_io_error_that_names_the_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access\nmore lines")

    monkeypatch.setattr("moeconv.device.gpu._by_kernel", fail)
    weight, window, parts = _sample()
    decoder = GpuDecoder([DEVICE], ARENA_NBYTES)
    out = np.empty((256, 512), np.uint16)
    with pytest.raises(IOFailed, match="'a small weight': CUDA error: an illegal"):
        decoder.decode(weight, parts, window, "BF16", out)
    monkeypatch.undo()
    decoder.decode(weight, parts, window, "BF16", out)  # its memory came back


def test_damaged_payloads_are_the_same_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a codec refuses of numbers is refused before a kernel could read beyond its parts."""
    with quick_directory() as directory:
        source = directory / "src"
        copytree(FIXTURES / "checkpoints" / "qwen3moe-gptq-int4-g128", source)
        plan = api.plan(source)
        said = []
        for decoder in (CpuDecoder(), Watched([DEVICE], ARENA_NBYTES)):
            use(monkeypatch, decoder)
            damage(plan, source)
            with pytest.raises(BadSource) as caught:
                api.convert(plan, directory / "out", resources=Resources(jobs=1, overwrite=True))
            said.append(str(caught.value))
        assert said[0] == said[1]


def damage(plan: Any, source: Path) -> None:
    """Give the columns of the first GPTQ weight groups that it does not have."""
    weight = next(one for one in plan.weights if one.codec == "gptq")
    ref = weight.parts["g_idx"]
    with (source / ref.file).open("r+b") as file:
        file.seek(ref.offset)
        file.write(np.full(ref.nbytes // 4, 1 << 20, np.int32).tobytes())


@pytest.mark.parametrize("dtype", ["int4", "int8"])
def test_packed_experts_are_the_same_bytes(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a part of the columns included: down of two NUMA parts."""
    with quick_directory() as directory:
        size = Size(hidden=256, intermediate=256, experts=2)
        source = write_checkpoint(directory / "src", "qwen3moe", size).root
        plan = api.plan(source, layout="ktransformers", dtype=dtype, numa=2)
        api.convert(plan, directory / "cpu", resources=Resources(device="cpu"))
        decoder = Watched([DEVICE], ARENA_NBYTES)
        use(monkeypatch, decoder)
        api.convert(plan, directory / "gpu", resources=Resources(jobs=2))
        assert files_of(directory / "gpu") == files_of(directory / "cpu")
        assert decoder.packed == {f"amx{dtype} weight", f"amx{dtype} scale"}


@pytest.mark.parametrize("part", ["weight", "scale"])
def test_the_first_row_that_cannot_be_packed_is_told(part: str) -> None:
    values = np.full((64, 128), 0x3F80, np.uint16)
    out = np.empty(64 * 128 if part == "weight" else 64 * 4, np.uint8)
    decoder = GpuDecoder([DEVICE], ARENA_NBYTES)
    assert decoder.encode("amxint8", part, values, out) == -1
    values[40, 3], values[7, 100] = 0x7FC0, 0xFF80
    assert decoder.encode("amxint8", part, values, out) == 7
