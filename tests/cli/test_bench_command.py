"""`moeconv bench` measures and keeps figures, from which plan estimates; nothing else stays."""

from __future__ import annotations

import io
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moeconv.cli import bench
from moeconv.cli.estimate_report import rough
from moeconv.codecs.amx import FORMS
from moeconv.device.driver import Card
from moeconv.device.gpu import GpuDecoder
from moeconv.errors import Refused
from moeconv.estimate import READ
from moeconv.kernels.cpu import KERNELS
from moeconv.measure import disk, kernels, machine
from moeconv.measure.cases import Tile
from moeconv.measure.figures import Device, Rates
from moeconv.store import space
from tests.cli.runs import ROOT, Cli

TINY = machine.Effort(
    kernels.Effort(Tile(128, 512), tiles=2, passes=1, repeats=1, threads=2),
    disk.Effort(nbytes=1 << 20, seconds=5.0, repeats=1, threads=3),
    starts=1,
)
VLLM = ("--layout", "vllm", "--tp", "2")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "choose_effort", lambda threads, jobs: TINY)
    cache_holds(monkeypatch, 0.25)


def cache_holds(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Let so much of a source be in the page cache, which changes from one command to the next."""
    monkeypatch.setattr("moeconv.cli.estimate_report.cached_share", lambda _: share)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes seconds whatever the effort."""
    monkeypatch.setattr(machine, "start_seconds", lambda *_: 5.0)


def test_bench_measures_and_plan_estimates(
    checkpoint: Path, tmp_path: Path, figures: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    dst = tmp_path / "dst"
    before = cli("plan", checkpoint, dst, *VLLM)
    assert f"none yet: moeconv bench {checkpoint} --dst {dst}" in before.out
    assert cli("plan", checkpoint, dst, "--json").json["estimate"] is None

    found = cli("bench", checkpoint, "--dst", dst, *VLLM, "--json").json
    assert list(tmp_path.iterdir()) == []
    (kept,) = figures.iterdir()
    assert found["kept"] == str(kept)
    assert found["directory"] == str(tmp_path)
    codecs = {key.partition(" ")[0] for key in found["figures"]["rates"]}
    computed = set(KERNELS) - {"raw", "repeated"}  # which are moved more than computed
    assert codecs == {*computed, *FORMS, "memory", "copy", "transpose", "digest"}
    assert found["figures"]["start_seconds"] > 0.05
    assert found["figures"]["threads"] == 2

    planned = cli("plan", checkpoint, dst, *VLLM, "--json").json
    assert planned["estimate"] == found["estimate"]
    assert planned["estimate"]["limit"] == "start"
    assert cli("plan", checkpoint, dst, "--json").json["estimate"] != found["estimate"]
    said = f"{planned['estimate']['duration']}: {planned['estimate']['reason']}"
    assert said in cli("plan", checkpoint, dst, *VLLM).out

    cache_holds(monkeypatch, 1.0)
    bounds = cli("plan", checkpoint, dst, *VLLM, "--json").json["estimate"]["bounds"]
    assert [one["nbytes"] for one in bounds if one["name"] == READ] == [0]


def test_bench_tells_people(
    checkpoint: Path, tmp_path: Path, quick: None, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = cli("bench", checkpoint)
    assert ran.code == 0
    assert ran.err.splitlines() == [
        "measuring the disk",
        "measuring start-up",
        "measuring memory",
        "measuring kernels",
    ]
    lines = ran.out.splitlines()
    assert any(line.startswith(f"write {tmp_path}") for line in lines)
    assert any(line.startswith(f"read {checkpoint}") for line in lines)
    (mxfp4,) = (line.split() for line in lines if line.startswith("MXFP4 "))
    assert len(mxfp4) == 6 and mxfp4[4].endswith("%")
    assert re.fullmatch(
        r"estimate: about [0-9.]+ s: starting and ending take most of it", lines[-1]
    )
    quiet = cli("bench", "-q")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")


def test_without_a_source_the_disk_is_read_where_it_was_written(
    tmp_path: Path, quick: None, cli: Cli
) -> None:
    found = cli("bench", "--dst", tmp_path, "--json").json
    assert found["estimate"] is None and found["source"] is None
    (one,) = found["figures"]["disks"].values()
    assert one["write"] and one["read"]
    assert list(tmp_path.iterdir()) == []


def test_a_finished_output_takes_no_time(
    checkpoint: Path, tmp_path: Path, quick: None, cli: Cli
) -> None:
    dst = tmp_path / "dst"
    cli("bench", checkpoint, "--dst", dst, "-q")
    cli("convert", checkpoint, dst, *VLLM, "--ranks", "0", "-q")
    assert "for all of it: " in cli("plan", checkpoint, dst, *VLLM).out
    cli("convert", checkpoint, dst, *VLLM, "-q")
    assert "estimate" not in cli("plan", checkpoint, dst, *VLLM).out


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("--tp", "2"), 2, "SRC"),
        (("--config", "config.json"), 2, "SRC"),
        (("NOWHERE",), 2, "NOWHERE"),
        (("--device", "tpu"), 2, "--device"),
        (("--device", "cuda:7"), 3, "cuda:7"),
        (("--dst", "/proc"), 3, "/proc"),
    ],
)
def test_what_cannot_be_measured(
    words: tuple[str, ...], code: int, text: str, quick: None, figures: Path, cli: Cli
) -> None:
    ran = cli("bench", *words)
    assert ran.code == code
    assert text in ran.err
    assert not list(figures.iterdir())


def test_a_full_disk_is_refused(
    tmp_path: Path, quick: None, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(space, "free_bytes", lambda path: 0)
    ran = cli("bench", "--dst", tmp_path, "--json")
    assert ran.code == 3
    assert "not enough disk space" in ran.json["error"]["what"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Card:
    """Pretend that there is a GPU: the CPU, on which Triton's kernels run interpreted."""
    card = Card(0, "Some GPU", 80 << 30)
    monkeypatch.setattr("moeconv.device.choose.cards", lambda: (card,))
    monkeypatch.setattr(
        "moeconv.device.open.open_gpus",
        lambda cards, vram, halve: GpuDecoder([torch.device("cpu")], 1 << 20),
    )
    monkeypatch.setattr("moeconv.measure.start.start_seconds", lambda *_: 4.0)
    found = Device(4.0, 50.0, 51.0, 4000.0, {"mxfp4": Rates("MXFP4", 900.0, 900.0, 1000.0, 1000.0)})
    monkeypatch.setattr("moeconv.device.speed.measure_device", lambda *_: found)
    return card


def test_a_gpu_is_measured_and_estimated(
    checkpoint: Path, tmp_path: Path, gpu: Card, quick: None, cli: Cli
) -> None:
    words = (checkpoint, "--device", "cuda")
    found = cli("bench", *words, "--dst", tmp_path, "--json").json
    assert found["figures"]["devices"][gpu.name]["up"] == 50.0
    names = [bound["name"] for bound in found["estimate"]["bounds"]]
    assert {"to the device", "device", "from the device"} <= set(names)
    assert 4.0 <= found["estimate"]["seconds"] < 5.0  # what starting takes with the GPU
    planned = cli("plan", checkpoint, tmp_path / "dst", "--device", "cuda", "--json").json
    assert planned["estimate"] == found["estimate"]
    text = cli("bench", *words, "--dst", tmp_path).out
    assert "Some GPU: GB/s" in text
    assert any(line.split() == ["MXFP4", "900", "90%"] for line in text.splitlines())


def test_a_gpu_that_cannot_be_used(
    checkpoint: Path,
    tmp_path: Path,
    gpu: Card,
    quick: None,
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise Refused("torch cannot use it")

    monkeypatch.setattr("moeconv.device.open.open_gpus", refuse)
    refused = cli("bench", "--dst", tmp_path, "--device", "cuda")
    assert (refused.code, "torch cannot use it" in refused.err) == (3, True)
    found = cli("bench", "--dst", tmp_path, "--json").json
    assert found["figures"]["devices"] == {}
    assert found["note"] == "Some GPU is not measured: torch cannot use it"
    monkeypatch.setattr("moeconv.device.choose.AUTO_NBYTES", 0)
    dst = tmp_path / "dst"
    assert cli("plan", checkpoint, dst, "--json").json["estimate"]["limit"] == "start"
    assert cli("plan", checkpoint, dst, "--json", "--device", "cuda").json["estimate"] is None


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_leaves_nothing(number: int, code: int, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "moeconv", "bench", "--dst", str(tmp_path)]
    with subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "no figures are kept" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 s"),
        (2.34, "2.3 s"),
        (9.96, "10 s"),
        (59.6, "60 s"),
        (59.9, "1.0 min"),
        (125, "2.1 min"),
        (3599, "1.0 h"),
        (36_000, "10 h"),
    ],
)
def test_durations_have_two_digits(seconds: float, text: str) -> None:
    assert rough(seconds) == text


@pytest.mark.parametrize("terminal", [True, False])
def test_a_full_disk_below_stderr_stops_no_measurement(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        stream = io.TextIOWrapper(full, write_through=True)
        monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
        monkeypatch.setattr(sys, "stderr", stream)
        said = bench.Said(False)
        said("disk", "write")
        said("memory", "")
