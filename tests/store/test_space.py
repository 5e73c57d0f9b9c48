from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from moeconv.errors import Refused
from moeconv.store import space

HUMAN = (
    (0, "0 B"),
    (999, "999 B"),
    (1000, "1.0 KB"),
    (1_550_000, "1.6 MB"),
    (999_949_999, "999.9 MB"),
    (999_960_000, "1.0 GB"),
    (1_370_000_000_000, "1.4 TB"),
    (5 * 10**18, "5000.0 PB"),
)


@pytest.mark.parametrize(("nbytes", "expected"), HUMAN)
def test_human(nbytes: int, expected: str) -> None:
    assert space.human(nbytes) == expected


def test_free_bytes_of_a_place_that_does_not_exist_yet(tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    found = space.free_bytes(tmp_path / "not/yet/there")
    assert abs(found - disk.f_bavail * disk.f_frsize) < 1 << 30  # others write here too


@pytest.mark.parametrize(
    ("needed", "already", "missing"),
    [(100, 0, 0), (101, 0, 1), (101, 1, 0), (5000, 900, 4000), (50, 100, 0)],
)
def test_check_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needed: int, already: int, missing: int
) -> None:
    monkeypatch.setattr(space, "free_bytes", lambda _path: 100)
    if not missing:
        space.check_space(tmp_path, needed, already)
        return
    with pytest.raises(Refused, match="100 B free") as failure:
        space.check_space(tmp_path, needed, already)
    assert f"({missing:,} bytes)" in failure.value.hint
    assert ("reserved already" in failure.value.what) == bool(already)


MEMINFO = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    4000 kB\n"}
V2 = MEMINFO | {"proc/self/cgroup": "0::/jobs/one\n"}
V1 = MEMINFO | {"proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/host/path\n0::/\n"}
LIMITS: tuple[tuple[str, Mapping[str, str], int], ...] = (
    ("no cgroup", MEMINFO, 4_096_000),
    ("v2 without a limit", V2 | {"cg/memory.max": "max\n", "cg/memory.current": "5\n"}, 4_096_000),
    (
        "v2: the tightest of the groups above counts",
        V2
        | {"cg/jobs/one/memory.max": "3000000\n", "cg/jobs/one/memory.current": "1000000\n"}
        | {"cg/jobs/memory.max": "1500000\n", "cg/jobs/memory.current": "1000000\n"},
        500_000,
    ),
    (
        "v2: idle file pages are free",
        V2
        | {"cg/jobs/one/memory.max": "3000000\n", "cg/jobs/one/memory.current": "2900000\n"}
        | {"cg/jobs/one/memory.stat": "anon 7\ninactive_file 800000\nactive_file 5\n"},
        900_000,
    ),
    (
        "v2: above the limit",
        V2 | {"cg/jobs/one/memory.max": "10\n", "cg/jobs/one/memory.current": "20\n"},
        0,
    ),
    (
        "v1 in a container that sees only its own top",
        V1
        | {"cg/memory/memory.limit_in_bytes": "2000000\n"}
        | {"cg/memory/memory.usage_in_bytes": "1999999\n"}
        | {"cg/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 10\n"},
        11,
    ),
    (
        "v1 unlimited",
        V1
        | {"cg/memory/memory.limit_in_bytes": "9223372036854771712\n"}
        | {"cg/memory/memory.usage_in_bytes": "5\n"},
        4_096_000,
    ),
    ("garbled", V2 | {"cg/jobs/one/memory.max": "", "proc/self/cgroup": "nonsense\n"}, 4_096_000),
)


def system_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(space, "PROC", tmp_path / "proc")
    monkeypatch.setattr(space, "CGROUP", tmp_path / "cg")


@pytest.mark.parametrize(("files", "expected"), [row[1:] for row in LIMITS], ids=lambda row: "")
def test_memory_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: Mapping[str, str], expected: int
) -> None:
    system_of(tmp_path, monkeypatch, files)
    assert space.memory_limit() == expected


CPUS: tuple[tuple[Mapping[str, str], int], ...] = (
    ({}, 8),
    (V2 | {"cg/jobs/one/cpu.max": "max 100000\n"}, 8),
    (V2 | {"cg/jobs/one/cpu.max": "250000 100000\n"}, 3),
    (V2 | {"cg/jobs/one/cpu.max": "max 100000\n", "cg/jobs/cpu.max": "50000 100000\n"}, 1),
    (V2 | {"cg/jobs/one/cpu.max": "9900000 100000\n"}, 8),
    (
        V1
        | {"cg/cpu,cpuacct/x/cpu.cfs_quota_us": "200000\n"}
        | {"cg/cpu,cpuacct/x/cpu.cfs_period_us": "100000\n"},
        2,
    ),
    (V1 | {"cg/cpu/cpu.cfs_quota_us": "-1\n", "cg/cpu/cpu.cfs_period_us": "100000\n"}, 8),
)


@pytest.mark.parametrize(("files", "expected"), CPUS)
def test_cpu_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: Mapping[str, str], expected: int
) -> None:
    system_of(tmp_path, monkeypatch, files)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    assert space.cpu_count() == expected


def test_without_proc_there_is_still_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system_of(tmp_path, monkeypatch, {})
    assert space.memory_limit() > 1 << 20
    assert space.process_peak_rss() > 1 << 20


def test_the_real_machine() -> None:
    assert 0 < space.memory_limit() < 1 << 50
    assert 1 <= space.cpu_count() <= (os.cpu_count() or 1)


GROW = """
from moeconv.store.space import process_peak_rss
before = process_peak_rss()
held = bytearray(b"x") * (64 << 20)
del held
print(process_peak_rss() - before)
"""


def test_peak_rss_remembers_what_was_freed() -> None:
    command = [sys.executable, "-c", GROW]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert 60 << 20 < int(done.stdout) < 90 << 20


@pytest.mark.parametrize(
    ("given", "free", "expected"),
    [
        (None, 10 << 30, 1 << 30),
        (None, 600 << 20, 300 << 20),
        (None, 0, 64 << 20),  # next to nothing is free: the system may find more
        (7, 7, 7),
        (5 << 30, 10 << 30, 5 << 30),
    ],
)
def test_choose_memory(
    monkeypatch: pytest.MonkeyPatch, given: int | None, free: int, expected: int
) -> None:
    monkeypatch.setattr(space, "memory_limit", lambda: free)
    assert space.choose_memory(given, 1 << 30) == expected


def test_more_memory_than_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space, "memory_limit", lambda: 999)
    with pytest.raises(Refused, match=r"--memory 1\.0 KB is more than is free here \(999 B\)"):
        space.choose_memory(1000, 1 << 30)


def test_check_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space.check_writable(tmp_path / "not/yet")
    (tmp_path / "file").touch()
    with pytest.raises(Refused, match="not a directory"):
        space.check_writable(tmp_path / "file/below")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may everywhere
    with pytest.raises(Refused, match="cannot be written to") as caught:
        space.check_writable(tmp_path / "not/yet")
    assert caught.value.where == str(tmp_path)
