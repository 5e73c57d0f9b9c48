"""Interrupted, killed and repeated runs end with the same bytes as one that was left alone."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import moeconv.api as api
from moeconv.convert import Result
from moeconv.errors import Interrupted, IOFailed, Locked, Refused, Stopped, VerifyFailed
from moeconv.execute import Signal
from moeconv.plan import Plan
from moeconv.process import process
from moeconv.resources import Resources
from moeconv.store import system
from moeconv.store.lock import DirectoryLock
from tests.checkpoints import Size, files_of, quick_directory, read_all, write_checkpoint

ROOT = Path(__file__).parents[1]
CRASHES = Path(__file__).parent / "crashes.py"
MODEL = ("config.json", "model.safetensors.index.json", "moeconv.json")
SIZE = Size(layers=2, hidden=64, intermediate=96)


def plan_of(src: Path, **options: Any) -> Plan:
    return api.plan(src, **({"layout": "vllm", "tp": 2} | options))


def convert(plan: Plan, dst: Path, jobs: int = 2, **options: Any) -> Result:
    return api.convert(plan, dst, resources=Resources(jobs=jobs, **options))


def stop_after(plan: Plan, dst: Path, tasks: int, error: Any = Interrupted) -> None:
    """Convert with one worker that is asked to stop while it does its n-th task; 0: before any."""
    stop = Signal()
    done = 0

    def watched(*arguments: Any) -> Any:
        nonlocal done
        done += 1
        if done == tasks:
            stop.stop(error)
        return process(*arguments)

    if tasks == 0:
        stop.stop(error)
    with patch("moeconv.execute.process", watched), pytest.raises(error):
        api.convert(plan, dst, resources=Resources(jobs=1), signal=stop)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a checkpoint with a file beside its weights."""
    root = write_checkpoint(tmp_path / "src", "gptoss-mxfp4", SIZE).root
    (root / "tokenizer.json").write_text("{}")
    return root


@pytest.fixture
def whole(source: Path, tmp_path: Path) -> dict[str, bytes]:
    """Return the files of an uninterrupted run."""
    convert(plan_of(source), tmp_path / "whole")
    return files_of(tmp_path / "whole")


def crash(src: Path, work: Path, layout: str, step: int) -> dict[str, Any]:
    command = [sys.executable, str(CRASHES), str(src), str(work), layout, str(step)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("layout", ["hf", "vllm"])
def test_killed_at_any_call_the_rerun_gives_the_same_bytes(layout: str, source: Path) -> None:
    with quick_directory() as work:
        found = crash(source, work, layout, 9)
    assert found["wrong"] == []
    assert found["kills"] >= 15


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["hf", "vllm"])
def test_killed_at_every_call(layout: str, source: Path, tmp_path: Path) -> None:
    found = crash(source, tmp_path / "work", layout, 1)
    assert found["wrong"] == []
    assert found["kills"] >= 130


def test_killed_at_random_moments(source: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    code = (
        "import sys, moeconv.api as api\n"
        "plan = api.plan(sys.argv[1], layout='vllm', tp=2)\n"
        "print('ready', flush=True)\n"
        "api.convert(plan, sys.argv[2])\n"
    )
    out = tmp_path / "out"
    moments = random.Random(7)
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(source), str(out)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(moments.uniform(0, 0.25))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        if (out / "config.json").exists():
            assert {path.name for path in out.glob("*.safetensors")} <= set(whole)
    convert(plan_of(source), out)
    assert files_of(out) == whole


@pytest.mark.parametrize(("error", "code"), [(Interrupted, 130), (Stopped, 75)])
@pytest.mark.parametrize("tasks", [1, 5, 11])
def test_stopped_runs_continue(
    tasks: int, error: type[Interrupted], code: int, source: Path, whole: Any, tmp_path: Path
) -> None:
    plan, out = plan_of(source), tmp_path / "out"
    stop_after(plan, out, tasks, error)
    assert error("").exit_code == code
    assert not any((out / name).exists() for name in MODEL)
    assert not list(out.glob("*.safetensors"))
    result = convert(plan, out)
    assert 0 < result.nbytes < plan.nbytes  # what was done is not done again
    assert files_of(out) == whole


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def garble(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


DAMAGE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "torn journal": (".moeconv/journal", cut),
    "garbled journal": (".moeconv/journal", garble),
    "empty journal": (".moeconv/journal", lambda path: path.write_bytes(b"")),
    "no journal": (".moeconv/journal", Path.unlink),
    "a partial file removed": ("model-rank-0-part-0.safetensors.partial", Path.unlink),
    "another removed": ("model-rank-1-part-0.safetensors.partial", Path.unlink),
    "a partial file cut": ("model-rank-1-part-0.safetensors.partial", shorten),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_between_runs(damage: str, source: Path, whole: Any, tmp_path: Path) -> None:
    plan, out = plan_of(source), tmp_path / "out"
    stop_after(plan, out, 8)
    name, act = DAMAGE[damage]
    act(out / name)
    stop_after(plan, out, 2)  # a second, short run must not believe what is gone
    convert(plan, out)
    assert files_of(out) == whole


@pytest.mark.parametrize("damage", [cut, garble, Path.unlink])
def test_damage_in_the_middle_of_commit(
    damage: Callable[[Path], None],
    source: Path,
    whole: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan, out = plan_of(source), tmp_path / "out"
    rename = system.rename

    def failing(src: Path, dst: Path) -> None:
        if Path(dst).name == "config.json":
            raise OSError(5, "Input/output error")
        rename(src, dst)

    with monkeypatch.context() as broken:
        broken.setattr(system, "rename", failing)
        with pytest.raises(IOFailed):
            convert(plan, out)
    assert (out / "model-rank-0-part-0.safetensors").exists()
    assert not (out / "config.json").exists()
    damage(out / ".moeconv" / "journal")
    stop_after(plan, out, 0)
    assert not any((out / name).exists() for name in MODEL)
    convert(plan, out)
    assert files_of(out) == whole


def test_a_changed_source_is_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_after(plan_of(source), out, 3)
    before = files_of(out / ".moeconv")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "bos_token_id": 7}))
    with pytest.raises(Refused, match="another source") as caught:
        convert(plan_of(source), out)
    assert caught.value.exit_code == 3
    assert files_of(out / ".moeconv") == before
    with pytest.raises(Refused, match="another source"):
        api.plan(source, out, layout="vllm", tp=2)
    convert(plan_of(source), out, overwrite=True)
    assert json.loads((out / "config.json").read_text())["bos_token_id"] == 7


@pytest.mark.parametrize("state", ["unfinished", "finished"])
def test_another_plan_is_refused_and_named(state: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if state == "finished":
        convert(plan_of(source), out)
    else:
        stop_after(plan_of(source), out, 3)
    with pytest.raises(
        Refused, match=rf"{state} output of another .*--dtype bf16 there, fp16 now"
    ) as got:
        convert(plan_of(source, dtype="fp16", nonfinite="keep"), out)
    assert "--overwrite" in str(got.value)
    convert(plan_of(source, dtype="fp32"), out, overwrite=True)
    assert {str(tensor.dtype) for tensor in read_all(out, "*rank-0*").values()} == {"torch.float32"}
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "moeconv.json",
        "tokenizer.json",
        *(f"model-rank-{rank}-part-0.safetensors" for rank in (0, 1)),
    }


def test_overwriting_may_be_cut_short_anywhere(
    source: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with quick_directory() as directory:
        overwrite_cut_short(source, whole, directory / "out", monkeypatch)


def overwrite_cut_short(source: Path, whole: Any, out: Path, patch: pytest.MonkeyPatch) -> None:
    plan = plan_of(source)
    other = plan_of(source, layout="hf", tp=1, max_file_size=60_000)
    real = Path.unlink
    for position in range(1, 30):
        convert(other, out, overwrite=True)
        calls = 0

        def dying(path: Path, missing_ok: bool = False, last: int = position) -> None:
            nonlocal calls
            calls += 1
            if calls == last:
                raise OSError(5, "Input/output error", str(path))
            real(path, missing_ok)

        with patch.context() as broken:
            broken.setattr(Path, "unlink", dying)
            try:
                convert(plan, out, overwrite=True)
            except IOFailed as error:
                assert error.exit_code == 74
        if calls < position:
            break
        convert(plan, out, overwrite=True)
        assert files_of(out) == whole
    assert position > 8


def test_a_finished_output_is_left_alone(source: Path, whole: Any, tmp_path: Path) -> None:
    plan, out = plan_of(source), tmp_path / "whole"
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    result = convert(plan, out)
    assert (result.state, result.nbytes, result.read_nbytes) == ("finished", 0, 0)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == times
    shorten(out / "model-rank-1-part-0.safetensors")
    with pytest.raises(VerifyFailed, match="model-rank-1-part-0") as caught:
        convert(plan, out)
    assert caught.value.exit_code == 5
    convert(plan, out, overwrite=True)
    assert files_of(out) == whole


def test_ranks_join_one_output(source: Path, whole: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = convert(plan_of(source, ranks=(1,)), out)
    assert (first.state, first.missing_files) == ("waiting", ("model-rank-0-part-0.safetensors",))
    assert not any((out / name).exists() for name in MODEL)
    assert not (out / "model-rank-0-part-0.safetensors.partial").exists()
    again = convert(plan_of(source, ranks=(1,)), out)
    assert (again.state, again.nbytes) == ("waiting", 0)
    assert convert(plan_of(source, ranks=(0,)), out).state == "converted"
    assert files_of(out) == whole
    assert convert(plan_of(source, ranks=(0,)), out).state == "finished"


def test_locked(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_after(plan_of(source), out, 3)
    with DirectoryLock(out):
        before = files_of(out / ".moeconv")
        with pytest.raises(Locked, match=f"process {os.getpid()}") as caught:
            convert(plan_of(source), out)
        assert caught.value.exit_code == 6
        assert files_of(out / ".moeconv") == before
    with DirectoryLock(tmp_path / "fresh"), pytest.raises(Locked):
        convert(plan_of(source), tmp_path / "fresh")


def test_two_at_once_never_mix(source: Path, whole: Any, tmp_path: Path) -> None:
    code = (
        "import sys, moeconv.api as api, moeconv.errors as errors\n"
        "plan = api.plan(sys.argv[1], layout='vllm', tp=2)\n"
        "sys.stdin.readline()\n"
        "try: api.convert(plan, sys.argv[2])\n"
        "except errors.MoeconvError as error: sys.exit(error.exit_code)\n"
    )
    out = tmp_path / "out"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(source), str(out)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    time.sleep(1)
    for child in children:
        assert child.stdin is not None
        child.stdin.write(b"\n")
        child.stdin.flush()
    codes = sorted(child.wait() for child in children)
    assert codes in ([0, 0], [0, 6])
    assert files_of(out) == whole


FOREIGN = ["notes.txt", "config.json", "model.safetensors", ".hidden", "moeconv.json"]


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_are_never_touched(name: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("{}")
    for overwrite in (False, True):
        with pytest.raises(Refused, match="did not write") as caught:
            convert(plan_of(source), out, overwrite=overwrite)
        assert caught.value.exit_code == 3
    with pytest.raises(Refused):
        api.plan(source, out)
    assert files_of(out) == {name: b"{}"}


@pytest.mark.parametrize("where", ["", "out", "a/b/out"])
def test_an_output_inside_its_source_is_refused(where: str, source: Path, tmp_path: Path) -> None:
    before = sorted(source.rglob("*"))
    link = tmp_path / "link"
    link.symlink_to(source)
    for root in (source, link):
        with pytest.raises(Refused, match="lie in one another"):
            convert(plan_of(source), root / where)
    with pytest.raises(Refused, match="lie in one another"):
        convert(plan_of(source), source.parent)
    assert sorted(source.rglob("*")) == before


def test_an_empty_directory_is_used_and_a_file_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert convert(plan_of(source), tmp_path / "empty").state == "converted"
    assert convert(plan_of(source), tmp_path / "a" / "b" / "c").state == "converted"
    (tmp_path / "file").write_text("x")
    with pytest.raises(Refused, match="not a directory"):
        convert(plan_of(source), tmp_path / "file")


def test_the_same_source_elsewhere_continues(source: Path, whole: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_after(plan_of(source), out, 4)
    moved = source.rename(tmp_path / "moved")
    convert(plan_of(moved), out)
    assert files_of(out) == whole


@pytest.mark.parametrize("state", ["unfinished", "finished"])
def test_others_weights_beside_an_output_are_refused(
    state: str, source: Path, whole: Any, tmp_path: Path
) -> None:
    plan, out = plan_of(source), tmp_path / "out"
    if state == "finished":
        convert(plan, out)
    else:
        stop_after(plan, out, 3)
    (out / "notes.txt").write_text("mine")
    stranger = out / "model-rank-0-part-7.safetensors"
    stranger.write_bytes(whole["model-rank-1-part-0.safetensors"])
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for overwrite in (False, True):
        with pytest.raises(Refused, match=stranger.name) as caught:
            convert(plan, out, overwrite=overwrite)
        assert caught.value.exit_code == 3 and "remove them" in caught.value.hint
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    stranger.unlink()
    convert(plan, out)
    assert files_of(out) == {**whole, "notes.txt": b"mine"}


def test_others_weights_that_come_while_converting_keep_it_unfinished(
    source: Path, whole: Any, tmp_path: Path
) -> None:
    plan, out = plan_of(source), tmp_path / "out"

    def intruding(*arguments: Any) -> Any:
        (out / "x.safetensors").write_bytes(b"")
        return process(*arguments)

    with (
        patch("moeconv.execute.process", intruding),
        pytest.raises(Refused, match=r"x\.safetensors"),
    ):
        convert(plan, out)
    assert not any((out / name).exists() for name in MODEL)
    (out / "x.safetensors").unlink()
    convert(plan, out)
    assert files_of(out) == whole


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_finished_output_without_its_configs_is_not_finished(
    name: str, source: Path, whole: Any, tmp_path: Path
) -> None:
    out = tmp_path / "whole"
    (out / name).unlink()
    with pytest.raises(VerifyFailed, match=f"{name} is missing"):
        convert(plan_of(source), out)
    convert(plan_of(source), out, overwrite=True)
    assert files_of(out) == whole


MANIFESTS = ['{"plan": 1, "files": 3}', '{"plan": "p", "files": [5], "auxiliary": [7]}']


@pytest.mark.parametrize("text", MANIFESTS)
def test_a_manifest_of_another_kind_is_not_ours(text: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "moeconv.json").write_text(text)
    (out / "config.json").write_text("{}")
    before = files_of(out)
    with pytest.raises(Refused, match="did not write"):
        convert(plan_of(source), out, overwrite=True)
    assert files_of(out) == before


@pytest.mark.parametrize("state", ["new", "begun"])
@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_directory_that_may_not_be_written_is_refused(
    code: int, state: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if state == "begun":
        stop_after(plan_of(source), out, 3)

    def forbidding(path: Path, *arguments: Any) -> None:
        raise OSError(code, os.strerror(code), str(path))

    with monkeypatch.context() as forbidden:
        forbidden.setattr(system, "make_directories", forbidding)
        with pytest.raises(Refused, match="cannot be written to") as caught:
            convert(plan_of(source), out)
    assert caught.value.exit_code == 3 and "continues" not in caught.value.hint


def test_a_directory_without_permission_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(Refused, match="cannot be written to"):
        convert(plan_of(source), tmp_path / "out")
