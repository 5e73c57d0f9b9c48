"""Every low-level call of a conversion fails once: a typed error, then a rerun that completes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import moeconv.api as api
from moeconv.errors import IOFailed, MoeconvError
from moeconv.plan import Plan
from moeconv.resources import Resources
from moeconv.store import system
from moeconv.store.lock import LOCK_NAME, DirectoryLock
from tests.checkpoints import Size, files_of, quick_directory, write_checkpoint

WRITING = ("open_file", "pwrite", "truncate", "sync_file", "sync_data", "rename", "fallocate")
ADVICE = ("drop_pages", "start_writeback", "await_writeback")
MODEL = ("config.json", "model.safetensors.index.json")


class Faulty:
    """Counts the calls of all of these functions together; the n-th answers with `fault`."""

    def __init__(self, patch: pytest.MonkeyPatch, names: tuple[str, ...], position: int) -> None:
        self.calls = 0
        self.position = position
        self.hit = ""
        for name in names:
            patch.setattr(system, name, self.wrapped(name, getattr(system, name)))

    def wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls += 1
            if self.calls == self.position:
                self.hit = name
                return self.fault(real, *arguments)
            return real(*arguments)

        return call

    def fault(self, real: Callable[..., Any], *arguments: Any) -> Any:
        code = errno.ENOSPC if self.position % 2 else errno.EIO
        raise OSError(code, os.strerror(code))


class Short(Faulty):
    """The n-th write writes a part only, and says so, as a disk that is nearly full does."""

    def fault(self, real: Callable[..., Any], *arguments: Any) -> Any:
        fd, data, offset = arguments
        return real(fd, bytes(data)[: max(len(data) // 3, 1)], offset)


class Case:
    """One checkpoint in memory, its plan, and the files of an undisturbed run."""

    def __init__(self, directory: Path, layout: str) -> None:
        size = Size(hidden=32, intermediate=32, experts=2)
        source = write_checkpoint(directory / "src", "gptoss-mxfp4", size).root
        (source / "tokenizer.json").write_text("{}")
        options: dict[str, Any] = {"tp": 2} if layout == "vllm" else {"max_file_size": 20_000}
        self.plan: Plan = api.plan(source, layout=layout, **options)
        self.out = directory / "out"
        self.convert(directory / "whole")
        self.whole = files_of(directory / "whole")

    def convert(self, out: Path | None = None) -> None:
        api.convert(self.plan, out or self.out, resources=Resources(jobs=1))

    def check_unfinished(self) -> None:
        """config.json comes last: only making its name durable may fail after it."""
        if (self.out / "config.json").exists():
            found = {path.name: path.read_bytes() for path in self.out.iterdir() if path.is_file()}
            assert found == self.whole

    def recover(self) -> None:
        """Run again, compare, and clear the way for the next fault."""
        self.convert()
        assert files_of(self.out) == self.whole
        for path in self.out.iterdir():
            path.unlink()
        self.out.rmdir()


@pytest.fixture(params=["hf", "vllm"])
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    with quick_directory() as directory:
        yield Case(directory, request.param)


def positions(step: int) -> Iterator[int]:
    """Yield 1, 1 + step, ... for ever."""
    position = 1
    while True:
        yield position
        position += step


def break_each(case: Case, patch: pytest.MonkeyPatch, step: int) -> dict[str, int]:
    """Fail every `step`-th call in turn; return how often each function was hit."""
    hits: dict[str, int] = {}
    for position in positions(step):
        with patch.context() as broken:
            faulty = Faulty(broken, WRITING, position)
            try:
                case.convert()
            except MoeconvError as error:
                assert isinstance(error, IOFailed), error
                assert error.exit_code == 74
                assert error.where
                assert "same command" in error.hint
                assert faulty.hit
                case.check_unfinished()
        if not faulty.hit:
            return hits
        hits[faulty.hit] = hits.get(faulty.hit, 0) + 1
        case.recover()
    raise AssertionError


def test_every_third_call_fails_once(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    hits = break_each(case, monkeypatch, 3)
    assert {"open_file", "pwrite", "sync_file", "rename"} <= set(hits)
    assert sum(hits.values()) >= 30


@pytest.mark.slow
def test_every_call_fails_once(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    hits = break_each(case, monkeypatch, 1)
    assert set(hits) == {*WRITING} - {"truncate"} or set(hits) == set(WRITING)
    assert sum(hits.values()) >= 100


def test_short_writes_are_continued(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    done = 0
    for position in positions(2):
        with monkeypatch.context() as broken:
            faulty = Short(broken, ("pwrite",), position)
            case.convert()
        assert files_of(case.out) == case.whole
        case.recover()
        if not faulty.hit:
            break
        done += 1
    assert done >= 8


@pytest.mark.parametrize("name", ADVICE)
def test_advice_that_fails_is_not_an_error(
    name: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_arguments: Any) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    with monkeypatch.context() as broken:
        broken.setattr(system, name, failing)
        case.convert()
    case.recover()


def test_a_file_system_without_fallocate(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_arguments: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    with monkeypatch.context() as broken:
        broken.setattr(system, "fallocate", unsupported)
        case.convert()
    case.recover()


READS = [errno.EIO, errno.ESTALE]


@pytest.mark.parametrize("code", READS)
def test_every_read_fails_once(code: int, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    for position in positions(5):
        calls = 0

        def reading(*arguments: Any, last: int = position) -> int:
            nonlocal calls
            calls += 1
            if calls == last:
                raise OSError(code, os.strerror(code))
            return real(*arguments)

        with monkeypatch.context() as broken:
            broken.setattr(os, "preadv", reading)
            try:
                case.convert()
            except IOFailed as error:
                assert error.exit_code == 74
                assert "model.safetensors, bytes [" in error.where
        if calls < position:
            break
        case.recover()
    assert position > 10


@pytest.mark.parametrize("name", ["unlink", "iterdir", "stat", "mkdir"])
def test_other_calls_that_fail_are_typed(
    name: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(Path, name)

    def failing(path: Path, *arguments: Any, **options: Any) -> Any:
        if ".moeconv" in str(path) or path == case.out:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path, *arguments, **options)

    with monkeypatch.context() as broken:
        broken.setattr(Path, name, failing)
        try:
            case.convert()
        except MoeconvError as error:
            assert error.exit_code in (3, 74)
    case.recover()


def test_removed_files_that_stay_while_they_are_open(
    tmp_path: Path, fixtures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS and FUSE: the name of a file that is still open becomes a hidden one."""
    unlink, release = os.unlink, DirectoryLock._release

    def hide(path: Any, *, dir_fd: int | None = None) -> None:
        if Path(path).name != LOCK_NAME:
            unlink(path, dir_fd=dir_fd)
            return
        hidden = Path(path).with_name(".nfs0001")
        os.rename(path, hidden, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)

    def closed(lock: DirectoryLock) -> None:
        release(lock)
        lock.path.with_name(".nfs0001").unlink(missing_ok=True)

    monkeypatch.setattr(os, "unlink", hide)
    monkeypatch.setattr(DirectoryLock, "_release", closed)
    plan = api.plan(fixtures / "checkpoints/mixtral-bf16")
    for state in ("converted", "finished"):
        assert api.convert(plan, tmp_path / "out").state == state
        assert not (tmp_path / "out/.moeconv").exists()
