"""Figures as JSON values, which key a weight's rates have, and where figures are kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moeconv.measure import stored
from moeconv.measure.figures import (
    Device,
    Disk,
    Figures,
    Rates,
    as_json,
    find_rates,
    from_json,
    rate_key,
)
from moeconv.types import Params

DISK = Disk(Rates("write", 1.0, 2.0), Rates("read", 3.0, 4.0), 4, True)
FIGURES = Figures(
    threads=2,
    start_seconds=0.75,
    rates={
        "gptq 4": Rates("GPTQ INT4", 3.0, 6.0, 9.0, 9.5),
        "gptq 8": Rates("GPTQ INT8", 2.0, 4.0),
        "ggml Q4_K": Rates("ggml Q4_K", 5.0, 6.0),
    },
    disks={"a": DISK, "b": Disk(write=DISK.write)},
    devices={"GPU": Device(2.0, 50.0, 51.0, 4000.0, {"mxfp4": Rates("MXFP4", 9.0, 9.0, 10.0)})},
)


def test_figures_come_back_from_json() -> None:
    assert from_json(json.loads(json.dumps(as_json(FIGURES)))) == FIGURES


def damaged(change: Callable[[Any], object]) -> Any:
    value = json.loads(json.dumps(as_json(FIGURES)))
    change(value)
    return value


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.pop("rates"),
        lambda value: value.update(format=0),
        lambda value: value.update(threads=0),
        lambda value: value.update(threads=True),
        lambda value: value.update(start_seconds=-1),
        lambda value: value.update(start_seconds=float("inf")),
        lambda value: value.update(disks=[]),
        lambda value: value["disks"]["a"].update(write=7),
        lambda value: value["rates"]["gptq 4"].update(one=0),
        lambda value: value["rates"]["gptq 4"].update(all="fast"),
        lambda value: value["rates"]["gptq 4"].pop("roof"),
        lambda value: value["devices"]["GPU"].update(up=0),
    ],
)
def test_what_is_no_figures_is_none(change: Callable[[Any], object]) -> None:
    assert from_json(damaged(change)) is None


@pytest.mark.parametrize("value", [None, [], "figures", {}])
def test_other_json_is_no_figures(value: Any) -> None:
    assert from_json(value) is None


@pytest.mark.parametrize(
    ("codec", "params", "key"),
    [
        ("mxfp4", {"codes": "blocks"}, "mxfp4"),
        ("float", {"dtype": "F16"}, "float F16"),
        ("ggml", {"type": "Q4_K"}, "ggml Q4_K"),
        ("gptq", {"bits": 4, "act_order": False}, "gptq 4"),
        ("gptq", {"bits": 4, "act_order": True}, "gptq 4 act-order"),
        ("packed-int", {"bits": 8}, "packed-int 8"),
        ("repeated", {"dtype": "F32", "rows": 2, "cols": 2}, "copy"),
    ],
)
def test_keys_of_rates(codec: str, params: Params, key: str) -> None:
    assert rate_key(codec, params) == key


@pytest.mark.parametrize(
    ("key", "title"),
    [
        ("gptq 4", "GPTQ INT4"),
        ("gptq 4 act-order", "GPTQ INT8"),  # the slower of its kind
        ("ggml Q4_K", "ggml Q4_K"),
        ("ggml IQ2_XS", ""),  # has no kernel, whatever the others do
        ("nf4", ""),
    ],
)
def test_a_variant_that_was_not_measured_takes_the_slowest_other(key: str, title: str) -> None:
    found = find_rates(FIGURES.rates, key)
    assert (found.title if found else "") == title


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a cache directory of its own."""
    monkeypatch.setattr(stored, "cache_directory", lambda: tmp_path / "numba-1")
    return tmp_path


def test_figures_are_kept(kept: Path) -> None:
    assert stored.load_figures() is None
    path = stored.save_figures(FIGURES)
    assert path is not None and path.parent == kept
    assert stored.load_figures() == FIGURES


def test_figures_of_other_disks_and_directions_stay(kept: Path) -> None:
    stored.save_figures(replace(FIGURES, disks={"a": DISK, "b": DISK}))
    new = {
        "a": Disk(read=Rates("read", 5.0, 6.0), threads=2),
        "b": Disk(Rates("write", 7.0, 8.0), None, 8, False),
        "c": DISK,
    }
    stored.save_figures(replace(FIGURES, start_seconds=1.0, disks=new))
    found = stored.load_figures()
    assert found is not None and found.start_seconds == 1.0
    assert found.disks == {
        "a": Disk(DISK.write, Rates("read", 5.0, 6.0), 4, True),
        "b": new["b"]._replace(read=DISK.read),
        "c": DISK,
    }


def test_another_machine_has_other_figures(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored.save_figures(FIGURES)
    for name, value in (("cpu_count", lambda: 3), ("version_key", lambda: "other kernels")):
        with monkeypatch.context() as patch:
            patch.setattr(stored, name, value)
            assert stored.load_figures() is None


@pytest.mark.parametrize("data", [b"", b"\x80\x04", b"[1]", b'{"format": 1}', b"{"])
def test_a_damaged_file_is_none(kept: Path, data: bytes) -> None:
    path = stored.save_figures(FIGURES)
    assert path is not None
    path.write_bytes(data)
    assert stored.load_figures() is None
    assert stored.save_figures(FIGURES) == path and stored.load_figures() == FIGURES


def test_nothing_is_kept_where_nothing_can_be(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "cache_directory", lambda: None)
    assert stored.save_figures(FIGURES) is None and stored.load_figures() is None
    monkeypatch.setattr(stored, "cache_directory", lambda: Path("/proc/nowhere/numba-1"))
    assert stored.save_figures(FIGURES) is None and stored.load_figures() is None
