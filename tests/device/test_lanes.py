"""Windows in flight together: what overlaps, what does not, and what is waited for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from moeconv.device.gpu import GpuDecoder, _Lane
from moeconv.device.open import _sample
from moeconv.device.ways import REFERENCE
from moeconv.errors import IOFailed

CPU = torch.device("cpu")
SHORT, LONG = 0.1, 30.0  # seconds, to wait for who must not come and for who must


class Meeting:
    """What two threads run at once or, if they wait in vain, one after the other."""

    def __init__(self, seconds: float) -> None:
        self.happened = False
        self._barrier = threading.Barrier(2, self._meet)
        self._seconds = seconds

    def _meet(self) -> None:
        self.happened = True

    def __call__(self, *_: Any) -> None:
        try:
            self._barrier.wait(self._seconds)
        except threading.BrokenBarrierError:
            return


def decode_two() -> None:
    """Decode two windows, each in a thread of its own."""
    decoder = GpuDecoder([CPU], 4 << 20)
    weight, window, parts = _sample()

    def run(out: np.ndarray) -> object:
        return decoder.decode(weight, parts, window, "BF16", out)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, np.empty((2, 256, 512), np.uint16)))


def test_windows_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = Meeting(LONG)
    monkeypatch.setattr("moeconv.device.gpu._by_kernel", meeting)
    decode_two()
    assert meeting.happened


def test_references_run_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they allocate is torch's, which the place in the arena does not hold."""
    meeting = Meeting(SHORT)
    monkeypatch.setattr("moeconv.device.gpu._by_reference", meeting)
    monkeypatch.setattr("moeconv.device.gpu.way_of", lambda _: REFERENCE)
    decode_two()
    assert not meeting.happened


def test_kernels_are_launched_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = Meeting(SHORT)
    monkeypatch.setattr("moeconv.device.gpu.kernel_of", lambda *_, **__: meeting)
    decode_two()
    assert not meeting.happened


@pytest.mark.parametrize("way", ["_by_kernel", "_by_reference"])
def test_a_lane_is_waited_for_after_an_error(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory would be lent again while the device still writes to it."""
    waited: list[str] = []
    weight, window, parts = _sample()

    def fail(*_: Any) -> None:
        raise RuntimeError("out of resources")

    wait: Callable[[_Lane], None] = lambda lane: waited.append(way)  # noqa: E731
    monkeypatch.setattr(_Lane, "wait", wait)
    monkeypatch.setattr(f"moeconv.device.gpu.{way}", fail)
    if way == "_by_reference":
        monkeypatch.setattr("moeconv.device.gpu.way_of", lambda _: REFERENCE)
    with pytest.raises(IOFailed, match="out of resources"):
        out = np.empty((256, 512), np.uint16)
        GpuDecoder([CPU], 1 << 20).decode(weight, parts, window, "BF16", out)
    assert waited == [way]
