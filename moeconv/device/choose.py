"""--device -> where a plan is decoded. Nothing here imports torch before a GPU is to be used."""

from __future__ import annotations

import re
from typing import NamedTuple

from moeconv.decoding import CpuDecoder, Decoder
from moeconv.device.driver import Card, cards
from moeconv.device.ways import REFERENCE, Decoded
from moeconv.errors import Refused, UsageError
from moeconv.store.space import human

DEFAULT_VRAM_NBYTES = 4 << 30
# Below this many bytes of output --device auto leaves GPUs alone: importing torch and opening a GPU
# takes seconds, in which two threads of a CPU decode as much (docs/benchmarks.md).
AUTO_NBYTES = 32 * 10**9
OTHERWISE = "--device auto or cpu; the bytes are the same"


class Wanted(NamedTuple):
    """What --device and --vram say: `cards` are those that may be used; none: the CPU.

    `insist`: the CPU is no answer.
    """

    cards: tuple[Card, ...]
    insist: bool
    vram_nbytes: int | None


class Chosen(NamedTuple):
    """Where a plan is decoded; `note` says why not on a GPU that is there."""

    decoder: Decoder
    names: tuple[str, ...]
    note: str = ""


def wanted_device(device: str, vram_nbytes: int | None = None) -> Wanted:
    """Return what is asked for; UsageError for no device, Refused for one that is not there."""
    parsed = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", device)
    if parsed is None:
        raise UsageError(f"--device {device} is not one of auto, cpu, cuda, cuda:I")
    if device == "cpu":
        if vram_nbytes is not None:
            raise Refused("--vram goes with a GPU, not with --device cpu", hint="leave it out")
        return Wanted((), False, None)
    there = cards()
    if device == "auto":
        return Wanted(there, False, vram_nbytes)
    if not there:
        raise Refused(f"no such device: {device}; no NVIDIA driver shows a GPU", hint=OTHERWISE)
    if parsed[1] is None:
        return Wanted(there, True, vram_nbytes)
    chosen = tuple(card for card in there if card.number == int(parsed[1]))
    if not chosen:
        names = ", ".join(f"cuda:{card.number} ({card.name})" for card in there)
        raise Refused(f"no such device: {device}; there are {names}", hint=OTHERWISE)
    return Wanted(chosen, True, vram_nbytes)


def uses_gpus(wanted: Wanted, decoded: Decoded | None) -> bool:
    """Return whether GPUs decode: with auto, where they have enough to do."""
    if not wanted.cards or decoded is None:
        return False
    return wanted.insist or (bool(decoded.ways) and decoded.nbytes >= AUTO_NBYTES)


def choose_decoder(wanted: Wanted, decoded: Decoded | None) -> Chosen:
    """Return where to decode what a plan decodes; None: it is not known, as there is no GPU.

    Refused where a GPU is insisted on and torch or Triton cannot use it, or --vram is not free.
    """
    if decoded is None or not uses_gpus(wanted, decoded):
        return Chosen(CpuDecoder(), ("cpu",))
    try:
        from moeconv.device.open import open_gpus

        decoder = open_gpus(wanted.cards, wanted.vram_nbytes, halve=REFERENCE in decoded.ways)
    except (Refused, ImportError) as error:
        if wanted.insist:
            raise
        return Chosen(CpuDecoder(), ("cpu",), f"decoded on the CPU: {error}".splitlines()[0])
    return Chosen(decoder, tuple(f"cuda:{card.number} {card.name}" for card in wanted.cards))


def vram_of(card: Card, free_nbytes: int, vram_nbytes: int | None) -> int:
    """Return the bytes of a card to use; Refused for more than is free."""
    if vram_nbytes is None:
        return min(DEFAULT_VRAM_NBYTES, free_nbytes // 2)
    if vram_nbytes > free_nbytes:
        raise Refused(
            f"--vram {human(vram_nbytes)} is more than is free on cuda:{card.number} {card.name} "
            f"({human(free_nbytes)})",
            hint="a smaller --vram; without it 4 GiB, or half of what is free",
        )
    return vram_nbytes
