"""Pages that two tasks share, on every rank: many tasks at once give the bytes that one gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import moeconv.api as api
from moeconv.resources import Resources
from moeconv.store import system, writer
from moeconv.store.buffers import PAGE_NBYTES
from moeconv.tasks import build_tasks
from tests.checkpoints import Size, files_of, write_checkpoint
from tests.store.faults import is_direct

SIZE = Size(layers=1, hidden=96, intermediate=416, experts=12, heads=8, kv_heads=8)


def shared_pages(plan: Any) -> int:
    """Return how many pages hold bytes of two tasks."""
    owners: dict[tuple[int, int], set[int]] = {}
    for task in build_tasks(plan.weights, plan.files):
        for region in task.regions:
            for byte in (region.offset, region.offset + region.nbytes - 1):
                owners.setdefault((region.file, byte // PAGE_NBYTES), set()).add(task.number)
    return sum(len(tasks) > 1 for tasks in owners.values())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layout": "vllm", "tp": 1},
        {"layout": "vllm", "tp": 2},
        {"layout": "vllm", "tp": 4},
        {"layout": "vllm", "tp": 8},
        {"layout": "vllm", "tp": 4, "ep": True},
    ],
    ids=str,
)
def test_tasks_that_share_pages(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With whole pages past the page cache from the first one on, and without any."""
    source = write_checkpoint(tmp_path / "in", "gptoss-mxfp4", SIZE).root
    plan = api.plan(source, **options)
    assert shared_pages(plan) > 10
    direct: list[int] = []
    real = system.pwrite

    def counted(fd: int, data: Any, offset: int) -> int:
        if is_direct(fd):
            direct.append(offset)
        return real(fd, data, offset)

    monkeypatch.setattr(system, "pwrite", counted)
    monkeypatch.setattr(writer, "DIRECT_MIN_NBYTES", PAGE_NBYTES)
    api.convert(plan, tmp_path / "many", resources=Resources(jobs=8))
    if not direct:
        pytest.skip("this file system has nothing that goes past the page cache")
    monkeypatch.setattr(system, "DIRECT_FLAG", 0)
    api.convert(plan, tmp_path / "one", resources=Resources(jobs=1))
    assert files_of(tmp_path / "many") == files_of(tmp_path / "one")
