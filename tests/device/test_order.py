"""What is asked of CUDA and in which order, told to one that only writes it down; no GPU needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from subprocess import CalledProcessError
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from triton import TritonError

from moeconv.device import open as opening
from moeconv.device.driver import Card
from moeconv.device.gpu import GpuDecoder, _Lane
from moeconv.device.open import _sample, open_gpus, try_out
from moeconv.device.pinned import pinned_pages
from moeconv.device.speed import Effort, _Clock
from moeconv.errors import IOFailed, Refused

CPU, SECOND = torch.device("cpu"), torch.device("cuda", 1)
CARDS = (Card(1, "H200", 140 << 30),)


class Cuda:
    """What torch.cuda is asked for, by name and device; registering returns `code`."""

    def __init__(self, patch: pytest.MonkeyPatch, code: int = 0) -> None:
        self.said: list[str] = []
        self.code = code
        patch.setattr(torch.cuda, "device", self.device)
        patch.setattr(torch.cuda, "cudart", lambda: self)
        patch.setattr(torch.cuda, "stream", self.stream)
        patch.setattr(torch.cuda, "synchronize", lambda: self.said.append("wait"))
        patch.setattr(torch.cuda, "Event", lambda enable_timing: self)

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        self.said.append(f"on {device}")
        yield
        self.said.append(f"off {device}")

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.said.append("stream")
        yield
        self.said.append("no stream")

    def cudaHostRegister(self, start: int, nbytes: int, flags: int) -> int:
        self.said.append("lock")
        return self.code

    def cudaHostUnregister(self, start: int) -> int:
        self.said.append("unlock")
        return 0

    def record(self) -> None:
        self.said.append("record")

    def synchronize(self) -> None:
        self.said.append("wait for it")

    def elapsed_time(self, end: object) -> float:
        return 4.0


def test_pages_are_locked_on_a_device_that_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """The current device of a new thread is the first, which may not be ours to wake."""
    cuda = Cuda(monkeypatch)
    memory = pinned_pages(10, SECOND)
    view = memory[3:5]
    del memory
    assert cuda.said == ["on cuda:1", "lock", "off cuda:1"]
    del view
    assert cuda.said[3:] == ["on cuda:1", "unlock", "off cuda:1"]


def test_an_error_of_locking_is_not_left_to_the_next_launch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CUDA keeps it for the thread; the next launch would take it for its own."""
    cuda = Cuda(monkeypatch, code=2)

    def launch(*_: Any, device: torch.device) -> None:
        cuda.said.append(f"launch on {device}")
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "zeros", launch)
    memory = pinned_pages(10, SECOND)
    memory[:] = 1
    del memory
    assert cuda.said == ["on cuda:1", "lock", "launch on cuda:1", "off cuda:1"]


def test_a_stream_is_entered_on_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch)
    lane = _Lane(CPU)
    lane.stream = SimpleNamespace(device=SECOND)
    with lane.use():
        cuda.said.append("work")
    assert cuda.said == ["on cuda:1", "stream", "work", "no stream", "off cuda:1"]


def test_runs_are_timed_by_the_device_while_it_has_enough_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = Cuda(monkeypatch)
    effort = Effort(nbytes=1, launches=2, repeats=1)
    clock = _Clock(SECOND, effort, lambda: cuda.said.append("busy"))
    assert clock.rate(lambda: cuda.said.append("run"), 10**6) == 0.5  # 2 MB in 4 ms
    order = ["run", "wait", "busy", "record", "run", "run", "record", "wait for it"]
    assert cuda.said == order


@pytest.mark.parametrize(
    "error",
    [RuntimeError(""), TritonError("out of resource"), CalledProcessError(1, "gcc")],
    ids=repr,
)
def test_what_torch_triton_and_the_compiler_raise_is_an_io_error(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("moeconv.device.gpu._by_kernel", fail)
    weight, window, parts = _sample()
    decoder = GpuDecoder([CPU], 1 << 20)
    with pytest.raises(IOFailed, match=r"'a small weight': ."):
        decoder.decode(weight, parts, window, "BF16", np.empty((256, 512), np.uint16))
    with pytest.raises(Refused, match="a small weight"):
        try_out([CPU])


@pytest.mark.parametrize("error", [AssertionError("libcuda.so"), FileNotFoundError("ldconfig")])
def test_a_system_that_triton_cannot_use_is_refused(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("moeconv.device.gpu._by_kernel", fail)
    with pytest.raises(Refused, match=r"Triton cannot use cpu: (libcuda|ldconfig)"):
        try_out([CPU])


def test_closing_after_a_device_failed_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    decoder = GpuDecoder([CPU], 1 << 10)
    decoder._pinned = True
    monkeypatch.setattr(torch.cuda, "empty_cache", fail)
    decoder.close()


@pytest.fixture
def usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10 << 30, 10 << 30))
    monkeypatch.setattr(opening, "keep_compiled", lambda: None)
    monkeypatch.setattr(opening, "try_out", lambda _: None)


@pytest.mark.usefixtures("usable")
def test_memory_that_is_not_to_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB.\nMore.")

    monkeypatch.setattr(opening, "GpuDecoder", full)
    with pytest.raises(Refused, match=r"cannot be used: CUDA out of memory\. .* GiB\.\n  do: "):
        open_gpus(CARDS, None, halve=False)


@pytest.mark.usefixtures("usable")
def test_a_card_that_torch_does_not_see_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "GpuDecoder", lambda devices, nbytes: (devices, nbytes))
    assert open_gpus(CARDS, None, halve=True) == ([SECOND], 2 << 30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(Refused, match="torch sees 1 GPUs, and cuda:1 is wanted"):
        open_gpus(CARDS, None, halve=True)


@pytest.mark.usefixtures("usable")
def test_the_fullest_card_says_how_much_each_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    cards, free = (Card(0, "H200", 140 << 30), *CARDS), (8 << 30, 2 << 30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (free[number], 140 << 30))
    monkeypatch.setattr(opening, "GpuDecoder", lambda devices, nbytes: nbytes)
    assert open_gpus(cards, None, halve=False) == 1 << 30
    assert open_gpus(cards, None, halve=True) == 1 << 29


@pytest.mark.usefixtures("usable")
def test_a_triton_that_flushes_subnormal_numbers_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(opening, "TRITON_VERSION", (3, 5))
    with pytest.raises(Refused, match=r"Triton 3\.5 does not .* 3\.6 is the least"):
        open_gpus(CARDS, None, halve=False)
