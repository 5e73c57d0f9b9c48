"""Tasks write every output byte exactly once, in the order of the files, whatever their size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import moeconv.api as api
from moeconv.plan import Plan
from moeconv.tasks import Task, build_tasks
from tests.checkpoints import KINDS, Size, quick_directory, read_all, same_bits, write_checkpoint

OPTIONS: list[dict[str, Any]] = [
    {},
    {"layout": "vllm", "tp": 2},
    {"layout": "vllm", "tp": 2, "dp": 2, "ep": True, "placement": "round-robin"},
    {"layout": "vllm", "dp": 3, "uneven": "pad", "pad_intermediate": 24, "pad_hidden": 40},
    {"layout": "vllm", "tp": 4, "experts_only": True},
]
SIZE = Size(layers=2, hidden=64, intermediate=32)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Return a directory in memory: these tests make many outputs, and no disk matters to them."""
    with quick_directory() as directory:
        yield directory


def tasks_of(plan: Plan) -> tuple[Task, ...]:
    return build_tasks(plan.weights, plan.files)


def check_cover(plan: Plan, tasks: tuple[Task, ...]) -> None:
    """Regions cover the bytes after every header once; each lies in its tensor."""
    spans: dict[int, list[tuple[int, int]]] = {index: [] for index in range(len(plan.files))}
    for task in tasks:
        for region in task.regions:
            tensor = plan.files[region.file].tensors[region.tensor]
            assert tensor.offset <= region.offset
            assert region.offset + region.nbytes <= tensor.offset + tensor.nbytes
            spans[region.file].append((region.offset, region.nbytes))
    for index, file in enumerate(plan.files):
        at = len(file.header)
        for offset, nbytes in sorted(spans[index]):
            assert (offset, nbytes > 0) == (at, True), file.name
            at += nbytes
        assert at == file.nbytes


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_once(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    plan = api.plan(write_checkpoint(tmp_path / "src", kind, SIZE).root, **options)
    tasks = tasks_of(plan)
    check_cover(plan, tasks)
    assert [task.number for task in tasks] == list(range(len(tasks)))
    firsts = [(task.regions[0].file, task.regions[0].offset) for task in tasks]
    assert firsts == sorted(firsts)
    for task in tasks:
        places = [(region.file, region.offset) for region in task.regions]
        assert places == sorted(places)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_source_byte_is_read_once(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    """However many ranks receive a piece of it: one slot of a weight is in one task only."""
    plan = api.plan(write_checkpoint(tmp_path / "src", kind, SIZE).root, **options)
    seen = [(member.weight, member.slot) for task in tasks_of(plan) for member in task.members]
    assert len(seen) == len(set(seen))
    result = api.convert(plan, tmp_path / "out")
    parts = {ref.name: ref.nbytes for weight in plan.weights for ref in weight.parts.values()}
    # What lies between two parts may be read along: at most a 32nd of them (store/direct.py).
    assert result.read_nbytes <= sum(parts.values()) * 33 / 32
    if not plan.options.partial:
        assert result.read_nbytes >= sum(parts.values())


@pytest.mark.parametrize("options", OPTIONS[:4])
@pytest.mark.parametrize("kind", KINDS)
def test_large_weights_in_runs_of_rows_give_the_same_tensors(
    kind: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = api.plan(write_checkpoint(tmp_path / "src", kind, SIZE).root, **options)
    api.convert(plan, tmp_path / "whole")
    count = len(tasks_of(plan))
    monkeypatch.setattr("moeconv.tasks.TASK_NBYTES", 4096)
    monkeypatch.setattr("moeconv.tasks.PAGE", 64)
    tasks = tasks_of(plan)
    assert len(tasks) > count
    check_cover(plan, tasks)
    api.convert(plan, tmp_path / "out")
    for rank in range(len({file.rank for file in plan.files})):
        pattern = f"model-rank-{rank}-*" if options else "*.safetensors"
        found, expected = (read_all(tmp_path / name, pattern) for name in ("out", "whole"))
        assert set(found) == set(expected)
        assert all(same_bits(found[name], expected[name]) for name in found)


def test_runs_of_rows_meet_on_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = Size(hidden=96, vocab=5000, intermediate=32)
    plan = api.plan(write_checkpoint(tmp_path / "src", "mixtral", size).root)
    monkeypatch.setattr("moeconv.tasks.TASK_NBYTES", 100_000)
    regions = [
        region
        for task in tasks_of(plan)
        for region in task.regions
        if plan.files[region.file].tensors[region.tensor].draft.name == "lm_head.weight"
    ]
    assert len(regions) > 5
    first = regions[0].offset
    assert {(region.offset - first) % 4096 for region in regions} == {0}
