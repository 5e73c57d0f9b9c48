"""What a directory holds, and what may be done with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moeconv.destination import Found, check_finished, examine, finish, hide, remove_output
from moeconv.errors import Refused, VerifyFailed

PLAN = {"format": 1, "plan": "p", "source": "s", "options": {}, "files": ["a.safetensors"]}
MANIFEST = {**PLAN, "files": [{"name": "a.safetensors", "nbytes": 3}], "configs": ["params.json"]}


def put(root: Path, name: str, data: object) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data))


STATES: list[tuple[str, dict[str, object]]] = [
    ("nothing", {}),
    ("nothing", {".moeconv/lock": ""}),
    ("nothing", {".moeconv/lock": "", ".moeconv/plan.json.partial": "{"}),
    ("unfinished", {".moeconv/plan.json": PLAN}),
    ("unfinished", {".moeconv/plan.json": PLAN, "moeconv.json": MANIFEST}),
    ("unfinished", {".moeconv/plan.json": PLAN, "a.safetensors.partial": ""}),
    ("finished", {"moeconv.json": MANIFEST, "a.safetensors": "abc"}),
    ("finished", {"moeconv.json": MANIFEST, ".moeconv/journal": ""}),  # cut short while tidying up
    ("foreign", {"moeconv.json": "{}"}),
    ("foreign", {"moeconv.json": "[" * 9999}),
    ("foreign", {".moeconv/journal": ""}),
    ("foreign", {".moeconv/plan.json": "[]"}),
    ("foreign", {"x": ""}),
    ("foreign", {".moeconv": "a file"}),
]


@pytest.mark.parametrize(("state", "files"), STATES)
def test_examine(state: str, files: dict[str, object], tmp_path: Path) -> None:
    for name, data in files.items():
        put(tmp_path, name, data)
    assert examine(tmp_path).state == state


def test_what_is_no_directory(tmp_path: Path) -> None:
    assert examine(tmp_path / "new").state == "nothing"
    put(tmp_path, "file", "")
    (tmp_path / "link").symlink_to("gone")
    for name in ("file", "link"):
        with pytest.raises(Refused, match="not a directory"):
            examine(tmp_path / name)


def test_removing_an_output_leaves_the_rest_and_is_unfinished_until_started(tmp_path: Path) -> None:
    for name in ("a.safetensors", "params.json", "config.json", "notes.txt", "keep/x"):
        put(tmp_path, name, "abc")
    put(tmp_path, "moeconv.json", {**MANIFEST, "auxiliary": ["../outside", "tokenizer.json"]})
    put(tmp_path.parent, "outside", "not ours")
    remove_output(examine(tmp_path), tmp_path)
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {"notes.txt", "keep/x", ".moeconv/plan.json"}
    assert examine(tmp_path).state == "unfinished"
    assert (tmp_path.parent / "outside").exists()
    remove_output(examine(tmp_path), tmp_path)  # again, as after a crash


def test_hide_and_finish(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors.index.json", ".moeconv/plan.json", "a"):
        put(tmp_path, name, "{}")
    hide(tmp_path)
    finish(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a"}
    finish(tmp_path)


@pytest.mark.parametrize(("data", "good"), [("abc", True), ("ab", False), ("abcd", False)])
def test_check_finished(data: str, good: bool, tmp_path: Path) -> None:
    put(tmp_path, "a.safetensors", data)
    found = Found("finished", MANIFEST)
    if good:
        check_finished(found, tmp_path)
        (tmp_path / "a.safetensors").unlink()
    with pytest.raises(VerifyFailed, match="the manifest says 3"):
        check_finished(found, tmp_path)
