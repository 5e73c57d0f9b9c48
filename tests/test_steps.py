"""Tasks in pieces: the same bytes however little memory and however many workers, in its bound."""

from __future__ import annotations

import threading
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import moeconv.api as api
from moeconv.errors import Refused
from moeconv.execute import check_memory
from moeconv.plan import Plan
from moeconv.resources import Resources, check_floor, choose_limits, memory_for
from moeconv.steps import floor_nbytes, piece_nbytes, pieces
from moeconv.store import direct
from moeconv.store.buffers import Buffer, BufferPool, Bytes
from moeconv.tasks import build_tasks
from moeconv.work import Work, whole_piece
from tests.checkpoints import Size, files_of, quick_directory, write_checkpoint
from tests.test_main_job import all_pairs

SIZE = Size(hidden=160, intermediate=96, experts=2, vocab=100)
CASES: list[tuple[str, dict[str, Any]]] = [
    ("gptoss-mxfp4", {}),  # transposed and interleaved: columns are cut
    ("gptoss-mxfp4", {"dtype": "fp32"}),
    ("gptoss-mxfp4", {"layout": "vllm", "tp": 2}),
    ("gptoss-mxfp4", {"layout": "vllm", "dp": 3, "uneven": "pad", "pad_intermediate": 48}),
    ("gptoss-bf16", {}),
    ("gptoss-bf16", {"dtype": "fp16"}),
    ("gptoss-bf16", {"layout": "vllm", "tp": 2, "pad_hidden": 96}),
    ("qwen3moe", {"layout": "vllm", "tp": 4, "pad_intermediate": 64, "pad_hidden": 100}),
    ("mixtral", {"layout": "vllm", "tp": 2, "ep": True, "redundant_experts": 2}),
    ("mixtral", {"dtype": "fp16", "dense_dtype": "fp32"}),
]


@pytest.fixture(autouse=True)
def fine_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the pool lend single pages, so that small weights already come in pieces."""

    def pages(nbytes: int) -> int:
        return -(-nbytes // 4096) * 4096

    for room in ("moeconv.store.buffers", "moeconv.steps"):
        monkeypatch.setattr(import_module(room), "size_class", pages)


class Tracked(BufferPool):
    """A pool that knows the most that was lent and idle at one time."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes)
        self.lent = self.most = self.most_lent = 0
        self.guard = threading.Lock()

    def take(self, nbytes: int, phase: int = 0) -> Buffer:
        with self.guard:
            buffer = super().take(nbytes, phase)
            assert buffer._memory is not None
            self.lent += buffer._memory.size
            self.most_lent = max(self.most_lent, self.lent)
            self.most = max(self.most, self.lent + self.idle_nbytes)
            return buffer

    def _keep(self, memory: Bytes) -> None:
        with self.guard:
            self.lent -= memory.size
            super()._keep(memory)


def works(plan: Plan) -> list[Work]:
    tasks = build_tasks(plan.weights, plan.files)
    return [
        Work(task, tuple(plan.weights[m.weight] for m in task.members), plan.files)
        for task in tasks
    ]


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_any_memory_and_any_workers_give_one_digest(
    kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pools: list[Tracked] = []

    def tracked(max_bytes: int) -> Tracked:
        pools.append(Tracked(max_bytes))
        return pools[-1]

    monkeypatch.setattr(import_module("moeconv.decoding"), "BufferPool", tracked)
    with quick_directory() as directory:
        source = write_checkpoint(directory / "src", kind, SIZE).root
        plan = api.plan(source, **options)
        floor = check_memory(build_tasks(plan.weights, plan.files), plan.weights, plan.files)
        assert max(len(pieces(work, floor)) for work in works(plan)) > 3
        api.convert(plan, directory / "whole", resources=Resources(jobs=2))
        expected = files_of(directory / "whole")
        least = memory_for(floor)
        runs = [(1, least), (7, least * 3 // 2), (2, least * 4), (7, least * 9)]
        for number, (jobs, memory) in enumerate(runs):
            out = directory / f"out{number}"
            api.convert(plan, out, resources=Resources(memory, jobs))
            assert files_of(out) == expected, (jobs, memory)
            assert pools[-1].most > 0
            assert pools[-1].most <= memory, (jobs, memory)
            assert pools[-1].lent == 0


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_pieces_fit_and_cover_every_region_in_order(kind: str, options: dict[str, Any]) -> None:
    with quick_directory() as directory:
        plan = api.plan(write_checkpoint(directory / "src", kind, SIZE).root, **options)
    for work in works(plan):
        floor = floor_nbytes(work)
        for limit in (floor, floor * 3 // 2, floor * 4, 1 << 40):
            cut = pieces(work, limit)
            assert all(piece_nbytes(work, piece) <= limit for piece in cut)
            ends = [region.offset for region in work.task.regions]
            for piece in cut:
                for index, region in piece.regions:
                    assert region.offset == ends[index]
                    ends[index] += region.nbytes
            assert ends == [region.offset + region.nbytes for region in work.task.regions]
        assert len(pieces(work, 1 << 40)) == 1


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gptoss-mxfp4", {}),
        ("gptoss-mxfp4", {"dtype": "fp32"}),
        ("gptoss-bf16", {"layout": "vllm", "tp": 2}),
        ("gptoss-bf16", {"dtype": "fp16"}),
    ],
)
def test_pieces_across_stored_lines_read_them_once(kind: str, options: dict[str, Any]) -> None:
    with quick_directory() as directory:
        source = write_checkpoint(directory / "src", kind, SIZE).root
        plan = api.plan(source, **options)
        largest = max(piece_nbytes(work, whole_piece(work)) for work in works(plan))
        limit = largest * 5 // 6
        assert max(len(pieces(work, limit)) for work in works(plan)) > 1
        whole = api.convert(plan, directory / "whole", resources=Resources(jobs=1))
        memory = Resources(memory_for(limit), 1)
        assert api.convert(plan, directory / "out", resources=memory).read_nbytes == (
            whole.read_nbytes
        )
        assert files_of(directory / "out") == files_of(directory / "whole")


@pytest.mark.parametrize("options", [{}, {"layout": "vllm", "tp": 2}])
@pytest.mark.parametrize("kind", ["gptoss-mxfp4", "gptoss-bf16"])
def test_bounce_buffers_are_counted(
    kind: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk what does not lie as its pages do is read and written by way of the same pool."""
    pools: list[Tracked] = []
    monkeypatch.setattr(
        import_module("moeconv.decoding"),
        "BufferPool",
        lambda nbytes: (pools.append(Tracked(nbytes)), pools[-1])[1],
    )
    monkeypatch.setattr(direct, "is_cached", lambda *_: False)
    size = SIZE._replace(hidden=544, intermediate=736)
    plan = api.plan(write_checkpoint(tmp_path / "src", kind, size).root, **options)
    largest = max(
        piece_nbytes(work, piece) for work in works(plan) for piece in pieces(work, 1 << 40)
    )
    api.convert(plan, tmp_path / "out", resources=Resources(memory_for(largest), 1))
    assert 0 < pools[-1].most_lent <= largest


def test_too_little_memory_is_refused_with_the_floor(tmp_path: Path) -> None:
    plan = api.plan(write_checkpoint(tmp_path / "src", "gptoss-mxfp4", SIZE).root)
    floor = check_memory(build_tasks(plan.weights, plan.files), plan.weights, plan.files)
    with pytest.raises(Refused, match="too small") as caught:
        api.convert(plan, tmp_path / "out", resources=Resources(memory_nbytes=floor // 2, jobs=4))
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()
    mebibytes = int(caught.value.hint.split("--memory ")[1].split("MiB")[0])
    enough = Resources(memory_nbytes=mebibytes << 20, jobs=4)
    check_floor(choose_limits(enough), floor)
    assert api.convert(plan, tmp_path / "out", resources=enough).state == "converted"


def test_ranks_in_pieces_count_nan_as_one_run_does(tmp_path: Path) -> None:
    """A rank needs nothing of some pieces; what they hold is counted all the same."""
    all_pairs(tmp_path / "src")
    options: dict[str, Any] = {"layout": "vllm", "dp": 2, "uneven": "pad"}
    plan = api.plan(tmp_path / "src", **options)
    floor = check_memory(build_tasks(plan.weights, plan.files), plan.weights, plan.files)
    api.convert(plan, tmp_path / "whole")
    for rank in (1, 0):  # the last one's half has no NaN
        ranks = api.plan(tmp_path / "src", **options, ranks=(rank,))
        api.convert(ranks, tmp_path / "out", resources=Resources(memory_for(floor), 1))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
