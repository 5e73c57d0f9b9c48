"""Does deriving once more keep within the memory that is there, and say so where it cannot?"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from moeconv import rederive, rederive_memory
from moeconv.codecs import CODECS
from moeconv.codecs.base import Window
from moeconv.errors import Refused
from moeconv.finished import read_finished
from moeconv.rederive import choose_units
from moeconv.rederive_memory import MARGIN_NBYTES, TORCH_NBYTES, Share, choose_share, least_nbytes
from moeconv.store import space
from moeconv.verify import Effort, recorded_plan, verify
from tests.outputs import convert
from tests.test_rederive import CONVERSIONS, MIXTRAL

ROOT = Path(__file__).parents[1]
GIB = 1 << 30
VERIFY = import_module("moeconv.verify")  # the package has a function of that name


def set_free(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    for module in (space, rederive_memory):
        monkeypatch.setattr(module, "memory_limit", lambda: nbytes)


@pytest.mark.parametrize(
    ("given", "threads", "least", "free", "share"),
    [
        (None, 4, 1 << 20, 100 * GIB, Share(GIB, 4)),
        (None, 4, 1 << 20, 512 << 20, Share(256 << 20, 4)),
        (None, 64, 40 << 20, 512 << 20, Share(256 << 20, 6)),  # a block a thread is the least
        (None, 2, 40 << 20, 80 << 20, Share(48 << 20, 1)),  # where 64 MiB are given otherwise
        (None, 2, 40 << 20, 10 << 20, Share(40 << 20, 1)),
        (3 * GIB, 4, 1 << 20, 100 * GIB, Share(3 * GIB, 4)),
        (3 * GIB, 4, 1 << 20, GIB, Share(GIB - MARGIN_NBYTES, 4)),  # of a conversion, now done
        (1, 4, 1 << 20, GIB, Share(1, 1)),
        (100, 4, 0, GIB, Share(100, 4)),
    ],
)
def test_choose_share(
    given: int | None,
    threads: int,
    least: int,
    free: int,
    share: Share,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_free(monkeypatch, free)
    assert choose_share(given, threads, least) == share


@pytest.fixture
def mixtral(fixtures: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Return a source and a finished output of it."""
    return fixtures / MIXTRAL, convert(fixtures / MIXTRAL, tmp_path / "out")


def least_of(source: Path, dst: Path) -> int:
    plan = recorded_plan(read_finished(dst), source, None)
    return least_nbytes(plan, choose_units(plan, 1.0))


@pytest.mark.parametrize("name", CONVERSIONS)
def test_the_least_is_enough_for_every_block(
    name: str, fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, options = CONVERSIONS[name]
    dst = convert(fixtures / source, tmp_path / "out", **options)
    held: list[int] = []

    def spy(weight: Any, *arguments: Any) -> Window:
        window = window_of(weight, *arguments)
        held.append(window.rows * window.cols * CODECS[weight.codec].reference_nbytes)
        return window

    window_of = rederive.window_of
    monkeypatch.setattr(rederive, "window_of", spy)
    assert verify(dst, fixtures / source, effort=Effort(memory_nbytes=1, jobs=2)).ok
    least = least_of(fixtures / source, dst)
    assert max(held) < least < 40 * max(held)


def test_fewer_threads_where_each_needs_a_block(
    mixtral: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, dst = mixtral
    asked: list[tuple[str, int]] = []

    def spy(work: Any, items: Any, jobs: int) -> Iterator[Any]:
        asked.append((getattr(work, "__name__", ""), jobs))
        yield from in_threads(work, items, jobs)

    in_threads = VERIFY.in_threads
    monkeypatch.setattr(VERIFY, "in_threads", spy)
    effort = Effort(memory_nbytes=least_of(source, dst) * 3, jobs=8)
    assert verify(dst, source, effort=effort).ok
    assert asked[1:] == [("check", 3)]


@pytest.mark.parametrize("loaded", [True, False])
def test_too_little_memory_is_said_before_anything_is_verified(
    loaded: bool, mixtral: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, dst = mixtral
    monkeypatch.setattr(VERIFY, "damaged_segments", None)
    needed = least_of(source, dst) + MARGIN_NBYTES
    if not loaded:
        monkeypatch.delitem(sys.modules, "torch")
        needed += TORCH_NBYTES
    set_free(monkeypatch, needed - 1)
    with pytest.raises(Refused, match="deriving values from the source once more takes") as caught:
        verify(dst, source)
    assert space.human(needed) in caught.value.what
    assert caught.value.where == str(dst)
    assert "the output is finished and stays" in caught.value.hint
    if loaded:
        monkeypatch.undo()
        set_free(monkeypatch, needed)
        assert verify(dst, source).ok


FREED = """
import ctypes, sys, threading
from pathlib import Path
from moeconv.verify import Effort, verify

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

def take(*sizes):
    for size in sizes:
        ctypes.memset(place := libc.malloc(size), 1, size)
        libc.free(place)

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
assert verify(*sys.argv[1:], effort=Effort(memory_nbytes=1 << 20, jobs=1)).ok
before = resident()
thread = threading.Thread(target=take, args=(30 << 20, 20 << 20))
thread.start()
thread.join()
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_a_thread_frees_is_not_kept(mixtral: tuple[Path, Path]) -> None:
    """malloc else keeps the second block, smaller than the first: as many as there are threads."""
    source, dst = mixtral
    command = [sys.executable, "-c", FREED, str(dst), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(done.stdout) < 10 << 20
