"""The order in which an output becomes a model."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

import moeconv
from moeconv.demo import make_checkpoint
from moeconv.errors import UsageError
from moeconv.journal import Journal
from moeconv.store.writer import OutputFile


def test_config_is_the_last_file_to_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path / "src")
    room = import_module("moeconv.commit")
    written = room.write_small_file
    names: list[str] = []

    def note(path: Path, data: bytes) -> None:
        names.append(path.name)
        written(path, data)

    monkeypatch.setattr(room, "write_small_file", note)
    moeconv.convert(moeconv.plan(tmp_path / "src", tmp_path / "out"))
    assert names == ["moeconv.json", "model.safetensors.index.json", "config.json"]


def test_what_the_journal_says_is_durable_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path / "src")
    calls: list[str] = []
    sync, append = OutputFile.sync, Journal.append

    def note_sync(self: OutputFile) -> None:
        calls.append("sync")
        sync(self)

    def note_append(self: Journal, entries: list[object]) -> None:
        if entries:
            calls.append("append")
        append(self, entries)  # type: ignore[arg-type]

    monkeypatch.setattr(OutputFile, "sync", note_sync)
    monkeypatch.setattr(Journal, "append", note_append)
    moeconv.convert(moeconv.plan(tmp_path / "src", tmp_path / "out"))
    assert calls[:2] == ["sync", "append"]


def test_a_plan_knows_where_to(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "src")
    plan = moeconv.plan(tmp_path / "src")
    with pytest.raises(UsageError, match="no DST"):
        moeconv.convert(plan)
    there = moeconv.plan(tmp_path / "src", tmp_path / "out")
    assert there.digest == plan.digest
    assert moeconv.convert(there).state == "converted"
