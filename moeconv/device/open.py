"""GPUs made ready: torch sees them, their memory is taken, and a small weight comes out right."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from moeconv.codecs.base import Window
from moeconv.decoding import Array, decode_window
from moeconv.device.choose import OTHERWISE, vram_of
from moeconv.device.driver import Card
from moeconv.device.gpu import GpuDecoder
from moeconv.errors import MoeconvError, Refused
from moeconv.kernels.cpu.cache import cache_directory
from moeconv.kernels.gpu.base import LEAST_TRITON, TRITON_VERSION
from moeconv.types import TensorRef, Weight

LEAST_COMPUTE = (8, 0)  # what Triton's kernels are compiled for at least: Ampere


def open_gpus(cards: Sequence[Card], vram_nbytes: int | None, *, halve: bool) -> GpuDecoder:
    """Return a decoder on these cards, tried out; Refused says what does not work.

    halve: readable references run there too, and torch's own allocations take the other half.
    """
    if not torch.cuda.is_available():
        raise Refused(
            f"torch {torch.__version__} cannot use the GPU of this machine",
            hint="install a torch that is built for CUDA, or --device cpu; the bytes are the same",
        )
    if TRITON_VERSION < LEAST_TRITON:
        there, least = (".".join(map(str, one)) for one in (TRITON_VERSION, LEAST_TRITON))
        raise Refused(
            f"Triton {there} does not compile every kernel exactly; {least} is the least",
            hint="a torch that comes with a newer one, or --device cpu; the bytes are the same",
        )
    if torch.cuda.device_count() <= max(card.number for card in cards):
        names = ", ".join(f"cuda:{card.number}" for card in cards)
        raise Refused(
            f"torch sees {torch.cuda.device_count()} GPUs, and {names} is wanted", hint=OTHERWISE
        )
    keep_compiled()
    try:
        return _opened(cards, vram_nbytes, halve=halve)
    except RuntimeError as error:  # a GPU that is lost, taken by another, or without memory
        said = str(error).strip() or type(error).__name__
        raise Refused(f"the GPU cannot be used: {said.splitlines()[0]}", hint=OTHERWISE) from error


def _opened(cards: Sequence[Card], vram_nbytes: int | None, *, halve: bool) -> GpuDecoder:
    sizes = []
    for card in cards:
        found = torch.cuda.get_device_capability(card.number)
        if found < LEAST_COMPUTE:
            raise Refused(
                f"cuda:{card.number} {card.name} has compute capability {found[0]}.{found[1]}; "
                f"8.0 is the least",
                hint=OTHERWISE,
            )
        free, _ = torch.cuda.mem_get_info(card.number)
        sizes.append(vram_of(card, free, vram_nbytes))
    nbytes = min(sizes) // 2 if halve else min(sizes)
    devices = [torch.device("cuda", card.number) for card in cards]
    try_out(devices)
    return GpuDecoder(devices, nbytes)


def keep_compiled() -> None:
    """Let Triton keep what it compiles beside the CPU's kernels, unless its variables say where.

    Its default is the home directory, which batch jobs may not be able to write.
    """
    directory = cache_directory()
    if directory is not None and not {"TRITON_CACHE_DIR", "TRITON_HOME"} & os.environ.keys():
        os.environ["TRITON_CACHE_DIR"] = str(directory.parent / "triton")


def try_out(devices: Sequence[torch.device]) -> None:
    """Decode a small weight on every device and compare it with the CPU's; Refused if that fails.

    So a driver, compiler or torch that does not fit is found before anything is written.
    """
    weight, window, parts = _sample()
    wanted = np.empty((window.rows, window.cols), np.uint16)
    counts = decode_window(weight, parts, window, "BF16", wanted)
    for device in devices:
        found = np.zeros_like(wanted)
        decoder = GpuDecoder([device], 1 << 20)
        try:
            there = decoder.decode(weight, parts, window, "BF16", found)
        except MoeconvError as error:
            raise Refused(error.what, hint=OTHERWISE) from error
        except (OSError, AssertionError) as error:  # Triton's, of a compiler or a driver it misses
            raise Refused(f"Triton cannot use {device}: {error}", hint=OTHERWISE) from error
        finally:
            decoder.close()
        if there != counts or not np.array_equal(found, wanted):
            raise Refused(
                f"{device} decodes a small weight to other bits than the CPU", hint=OTHERWISE
            )


def _sample() -> tuple[Weight, Window, Mapping[str, Array]]:
    """Return every byte of MXFP4 codes under every scale: [256 rows, 512 cols]."""
    codes = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    scales = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 16, axis=1)
    parts: Mapping[str, Array] = {"blocks": codes, "scales": scales}
    refs = {
        part: TensorRef(part, "U8", array.shape, "", 0, array.nbytes)
        for part, array in parts.items()
    }
    weight = Weight(
        name="a small weight",
        codec="mxfp4",
        rows=256,
        cols=512,
        slots=None,
        parts=refs,
        transposed=False,
        params={"codes": "blocks", "scales": "scales"},
        stack="",
        layer=None,
        expert=None,
        projections=(),
        shape=(256, 512),
        form_transposed=False,
        is_expert=False,
    )
    return weight, Window(0, 256, 0, 512), parts
