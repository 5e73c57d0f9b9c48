"""A small checkpoint, and the command line run in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from moeconv.demo import DemoSizes, make_checkpoint
from tests.cli.runs import Cli

SMALL = DemoSizes(
    layers=2,
    experts=4,
    hidden=64,
    intermediate=64,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vocab=128,
)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small MXFP4 checkpoint in gpt-oss's form; 2 layers of 4 experts."""
    directory = tmp_path_factory.mktemp("checkpoint") / "tiny-oss"
    make_checkpoint(directory, SMALL)
    return directory


@pytest.fixture(autouse=True)
def figures(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the cache directory, empty, in which commands of this process keep their figures."""
    directory = tmp_path_factory.mktemp("figures")
    monkeypatch.setattr("moeconv.measure.stored.cache_directory", lambda: directory / "numba-1")
    return directory


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Return what runs a command in this process."""
    return Cli(capsys)
