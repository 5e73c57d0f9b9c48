"""Is every kind of damage found, and nothing else? Without the source."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from moeconv import reread
from moeconv.destination import examine
from moeconv.errors import IOFailed, UsageError, VerifyFailed
from moeconv.execute import Progress
from moeconv.finished import RecordedFile, Segment
from moeconv.store import system
from moeconv.store.buffers import aligned
from moeconv.verify import Effort, Report, verify
from tests.outputs import convert, flip, rewrite_manifest

ROOT = Path(__file__).parents[1]
ONE = Effort(jobs=1)
INDEX = "model.safetensors.index.json"
OUTPUTS = {
    "hf": ("checkpoints/qwen3moe-nvfp4-ct", {"max_file_size": 60_000}),
    "tp2": ("vllm/gpt_oss/hf", {"layout": "vllm", "tp": 2}),
    "tp2ep": ("checkpoints/gptoss-mxfp4", {"layout": "vllm", "tp": 2, "ep": True}),
    "dp2": ("vllm/mixtral/hf", {"layout": "vllm", "dp": 2}),
    "part": ("checkpoints/mixtral-mxfp8-ct", {"experts_only": True}),
}


@pytest.fixture(scope="session")
def outputs(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return finished outputs by name; nobody changes them."""
    root = tmp_path_factory.mktemp("outputs")
    return {
        name: convert(fixtures / source, root / name, **options)
        for name, (source, options) in OUTPUTS.items()
    }


@pytest.fixture
def hf(outputs: dict[str, Path], tmp_path: Path) -> Path:
    """Return an hf output of several files, to be damaged."""
    return Path(shutil.copytree(outputs["hf"], tmp_path / "hf"))


@pytest.fixture(scope="module")
def again(outputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a copy that every example damages and mends."""
    yield Path(shutil.copytree(outputs["hf"], tmp_path_factory.mktemp("again") / "hf"))


def texts(report: Report) -> list[str]:
    return [f"{problem.what} | {problem.where}" for problem in report.problems]


@pytest.mark.parametrize("name", OUTPUTS)
def test_good_outputs_are_good(name: str, outputs: dict[str, Path]) -> None:
    report = verify(outputs[name], effort=ONE)
    assert report.ok and not report.notes and report.more_problems == 0
    files = sorted(outputs[name].glob("*.safetensors"))
    assert report.files == len(files)
    assert report.reread.nbytes == sum(path.stat().st_size for path in files)
    assert report.sample is None and report.rederived.elements == 0
    report.require_ok()


@pytest.mark.parametrize("name", OUTPUTS)
def test_good_outputs_are_right(name: str, outputs: dict[str, Path], fixtures: Path) -> None:
    report = verify(outputs[name], fixtures / OUTPUTS[name][0], effort=ONE)
    assert texts(report) == []
    data = sum(
        path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little")
        for path in outputs[name].glob("*.safetensors")
    )
    assert report.rederived.nbytes == data
    assert report.rederived.tensors == report.tensors


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 7), st.integers(0, 9))
def test_every_flipped_bit_is_found(again: Path, position: int, bit: int, which: int) -> None:
    names = sorted(path.name for path in again.iterdir())
    path = again / names[which % len(names)]
    whole = path.read_bytes()
    flip(path, position, bit)
    try:
        try:
            found = texts(verify(again, effort=ONE))
        except VerifyFailed as error:
            assert path.name == "moeconv.json"
            found = [str(error)]
    finally:
        path.write_bytes(whole)
    assert found
    assert path.name in " ".join(found)


def test_every_bit_of_a_small_file_and_of_its_manifest_counts(
    outputs: dict[str, Path], tmp_path: Path
) -> None:
    dst = Path(shutil.copytree(outputs["part"], tmp_path / "part"))
    manifest = dst / "moeconv.json"
    whole = manifest.read_bytes()
    for position in range(0, len(whole), 23):
        flip(manifest, position, position % 7)
        with pytest.raises(VerifyFailed):
            verify(dst, effort=ONE)
        manifest.write_bytes(whole)


def test_damage_names_file_range_and_tensors(hf: Path) -> None:
    name = sorted(path.name for path in hf.glob("*.safetensors"))[0]
    header = json.loads((hf / name).read_bytes()[8:4096])
    header.pop("__metadata__")
    tensor, entry = max(header.items(), key=lambda item: item[1]["data_offsets"][0])
    position = 4096 + entry["data_offsets"][0]
    flip(hf / name, position)
    (problem,) = verify(hf, effort=ONE).problems
    assert f"'{tensor}'" in problem.what
    begin, end = problem.where.removeprefix(f"{name}, bytes [").removesuffix(")").split(", ")
    assert int(begin) <= position < int(end)


def test_many_damaged_segments_are_counted(outputs: dict[str, Path], tmp_path: Path) -> None:
    dst = Path(shutil.copytree(outputs["dp2"], tmp_path / "dp2"))
    for path in dst.glob("*.safetensors"):
        data = np.frombuffer(path.read_bytes(), np.uint8).copy()
        data[4096:] ^= 255
        path.write_bytes(data.tobytes())
    report = verify(dst, effort=ONE)
    assert len(report.problems) == 50
    assert len(report.problems) + report.more_problems == report.reread.segments - 2


def swap_tensor_names(dst: Path) -> None:
    """Swap two entries of equal shape in a header: every byte of data stays as it is."""
    path = sorted(dst.glob("*.safetensors"))[0]
    data = path.read_bytes()
    assert b"gate_proj" in data[:4096] and b"up_proj" in data[:4096]
    text = data[8:4096].replace(b"gate_proj", b"GATE").replace(b"up_proj", b"gate_proj")
    path.write_bytes(data[:8] + text.replace(b"GATE", b"up_proj").ljust(4088) + data[4096:])


def lengthen(dst: Path) -> None:
    with sorted(dst.glob("*.safetensors"))[0].open("ab") as file:
        file.write(b"\0")


def truncate(dst: Path) -> None:
    path = sorted(dst.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-1])


def forget_a_tensor_in_the_index(dst: Path) -> None:
    index = json.loads((dst / INDEX).read_bytes())
    index["weight_map"].popitem()
    (dst / INDEX).write_text(json.dumps(index))


def add_a_model(dst: Path) -> None:
    save_file({"a": np.zeros(1, np.float32)}, dst / "model.safetensors")


FAULTS = {
    "a file is missing": (
        lambda dst: sorted(dst.glob("*.safetensors"))[0].unlink(),
        "the file is missing | model-00001",
    ),
    "a file is longer": (lengthen, "bytes; the manifest says"),
    "a file is shorter": (truncate, "truncated"),
    "a file is empty": (
        lambda dst: sorted(dst.glob("*.safetensors"))[1].write_bytes(b""),
        "the file has 0 bytes; the manifest says",
    ),
    "names are swapped": (swap_tensor_names, "damaged: the header | model-00001"),
    "the index is missing": (lambda dst: (dst / INDEX).unlink(), f"the file is missing | {INDEX}"),
    "the index is short": (forget_a_tensor_in_the_index, "does not list exactly the tensors"),
    "the config is missing": (
        lambda dst: (dst / "config.json").unlink(),
        "the file is missing | config.json",
    ),
    "the config is another": (
        lambda dst: (dst / "config.json").write_text("{}"),
        "the file is not the one that was written | config.json",
    ),
    "a second model": (add_a_model, "did not write this file; loaders read every .safetensors"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault: str, hf: Path) -> None:
    damage, expected = FAULTS[fault]
    damage(hf)
    report = verify(hf, effort=ONE)
    assert not report.ok
    assert any(expected in text for text in texts(report)), texts(report)
    with pytest.raises(VerifyFailed):
        report.require_ok()


def test_a_config_beside_a_partial_output_is_a_problem(
    outputs: dict[str, Path], tmp_path: Path
) -> None:
    dst = Path(shutil.copytree(outputs["part"], tmp_path / "part"))
    (dst / "config.json").write_text("{}")
    assert "take the output for that model | config.json" in texts(verify(dst, effort=ONE))[0]


def test_files_that_no_loader_reads_are_notes(hf: Path) -> None:
    (hf / "README.txt").write_text("mine")
    (hf / "old").mkdir()
    save_file({"a": np.zeros(1, np.float32)}, hf / "old" / "model.safetensors")
    report = verify(hf, effort=ONE)
    assert report.ok
    assert ["README.txt" in note for note in report.notes] == [True, False]
    assert "sub-directory: old" in report.notes[1]


def test_an_unfinished_output_is_refused(hf: Path) -> None:
    (hf / ".moeconv").mkdir()
    facts = {"format": 1, "plan": "p", "source": "s", "options": {}, "files": ["a"]}
    (hf / ".moeconv" / "plan.json").write_text(json.dumps(facts))
    with pytest.raises(VerifyFailed, match="unfinished") as caught:
        verify(hf)
    assert caught.value.exit_code == 5 and "continues" in caught.value.hint
    (hf / ".moeconv" / "plan.json").write_text("{}")
    with pytest.raises(VerifyFailed, match="record is damaged") as caught:
        verify(hf)
    assert "remove the directory" in caught.value.hint


def test_a_damaged_manifest_is_to_be_removed_as_convert_says_too(hf: Path) -> None:
    text = (hf / "moeconv.json").read_text()
    (hf / "moeconv.json").write_text(text.replace('"plan": "', '"plan": "0'))
    with pytest.raises(VerifyFailed, match="damaged") as caught:
        verify(hf)
    assert "overwrite" not in caught.value.hint and "remove the directory" in caught.value.hint
    assert examine(hf).state == "damaged"


@pytest.mark.parametrize("name", ["model-00001-of-00001.safetensors", "x.gguf"])
def test_others_weights_are_to_be_removed(name: str, hf: Path) -> None:
    (hf / name).write_bytes(b"")
    with pytest.raises(VerifyFailed, match="did not write this file") as caught:
        verify(hf, effort=ONE).require_ok()
    assert caught.value.hint.startswith("remove it")


def test_a_file_that_may_not_be_read_is_no_damage(
    hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, wanted = os.open, sorted(hf.glob("*.safetensors"))[1]

    def forbidding(path: Any, *arguments: Any, **named: Any) -> int:
        if Path(path) == wanted:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **named)

    monkeypatch.setattr(os, "open", forbidding)
    with pytest.raises(IOFailed, match="Permission denied") as caught:
        verify(hf, effort=ONE)
    assert caught.value.exit_code == 74 and wanted.name in caught.value.where


def test_what_is_no_output_is_refused(tmp_path: Path, fixtures: Path) -> None:
    with pytest.raises(UsageError, match="no directory"):
        verify(tmp_path / "nothing")
    with pytest.raises(VerifyFailed, match=r"no moeconv\.json"):
        verify(fixtures / "checkpoints/gptoss-mxfp4")


HOSTILE = {
    "a file outside": {"files": [["../x", 0, 0]]},
    "an absolute name": {"files": [["/etc/passwd", 0, 0]]},
    "no file": {"files": []},
    "a hole": {"files": [["x", 10, [[0, 4, "0" * 32], [5, 5, "0" * 32]]]]},
    "an end": {"files": [["x", 10, [[0, 4, "0" * 32]]]]},
    "a digest": {"files": [["x", 4, [[0, 4, "zz"]]]]},
    "a bool": {"files": [["x", 1, [[False, True, "0" * 32]]]]},
    "no options": {"options": None},
    "a config outside": {"beside": {"../config.json": "0" * 32}},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_manifests(name: str, hf: Path) -> None:
    change = dict(HOSTILE[name])
    if "files" in change:
        change["files"] = [
            {"name": file, "rank": 0, "nbytes": nbytes, "tensors": 1, "segments": segments or []}
            for file, nbytes, segments in change["files"]
        ]
    rewrite_manifest(hf, **change)
    with pytest.raises(VerifyFailed, match="the manifest"):
        verify(hf)


def test_another_format_version_is_named(hf: Path) -> None:
    rewrite_manifest(hf, format=99)
    with pytest.raises(VerifyFailed, match="format version 99") as caught:
        verify(hf)
    assert "moeconv 0.1.0" in caught.value.hint


def test_progress_ends_at_the_whole(outputs: dict[str, Path], fixtures: Path) -> None:
    heard: list[Progress] = []
    verify(
        outputs["tp2"], fixtures / OUTPUTS["tp2"][0], effort=Effort(jobs=2, progress=heard.append)
    )
    assert heard[-1].done_nbytes == heard[-1].total_nbytes > 0
    assert heard[-1].done_tasks == heard[-1].total_tasks == len(heard)
    assert [one.done_nbytes for one in heard] == sorted(one.done_nbytes for one in heard)


def test_memory_does_not_grow_with_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(reread, "aligned", lambda nbytes: taken.append(nbytes) or aligned(nbytes))
    nbytes = 96 << 20
    with (tmp_path / "x").open("wb") as file:
        file.truncate(nbytes)
    one = RecordedFile("x", 0, None, nbytes, 1, (Segment(0, nbytes, "0" * 32),))
    tracemalloc.start()
    try:
        (unit,) = reread.units_of(one, nbytes)
        assert reread.damaged_segments(tmp_path, unit) == one.segments
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        assert taken == [8 << 20]
    finally:
        tracemalloc.stop()


def test_reading_again_needs_neither_torch_nor_kernels(outputs: dict[str, Path]) -> None:
    code = (
        "import sys; from moeconv.verify import verify; "
        "assert verify(sys.argv[1]).ok; sys.exit('torch' in sys.modules or 'numba' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(outputs["hf"])], check=True, cwd=ROOT)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("cuts", [(0, 5), (0, 4096, 8192), (0, 1, 4095, 4097, 9_000_001)])
def test_segments_of_any_cut_are_digested(
    direct: bool, cuts: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not direct:
        monkeypatch.setattr(system, "DIRECT_FLAG", 0)
    data = np.random.default_rng(3).integers(0, 256, cuts[-1], np.uint8).tobytes()
    (tmp_path / "x").write_bytes(data)
    segments = tuple(
        Segment(begin, end - begin, xxhash.xxh3_128_hexdigest(data[begin:end]))
        for begin, end in itertools.pairwise(cuts)
    )
    file = RecordedFile("x", 0, None, len(data), 1, segments)
    (unit,) = reread.units_of(file, len(data))
    assert reread.damaged_segments(tmp_path, unit) == ()
    flip(tmp_path / "x", cuts[-2])
    assert reread.damaged_segments(tmp_path, unit) == segments[-1:]
