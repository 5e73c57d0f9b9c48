"""What a directory holds, and what may be done with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import moeconv.api as api
from moeconv.destination import (
    Found,
    check_finished,
    decide,
    examine,
    facts_of,
    finish,
    hide,
    remove_output,
)
from moeconv.digest import bytes_digest, json_digest
from moeconv.errors import Refused, VerifyFailed
from moeconv.ownership import INDEX
from tests.checkpoints import write_checkpoint

PLAN = {"format": 1, "plan": "p", "source": "s", "options": {}, "files": ["a.safetensors"]}


def signed(facts: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest with the digest that it should have."""
    return {**facts, "digest": json_digest(facts)}


UNSIGNED = {
    "moeconv": "0.1.0",
    **PLAN,
    "files": [{"name": "a.safetensors", "nbytes": 3}],
    "auxiliary": ["tokenizer.json"],
    "configs": ["params.json"],
    "beside": {"params.json": bytes_digest(b"abc")},
}
MANIFEST = signed(UNSIGNED)


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
    ("damaged", {".moeconv/journal": ""}),
    ("damaged", {".moeconv/plan.json": "[]"}),
    ("damaged", {".moeconv/plan.json": {**PLAN, "files": ["../x"]}, "moeconv.json": MANIFEST}),
    ("damaged", {".moeconv/plan.json": {**PLAN, "files": [5]}}),
    ("damaged", {"moeconv.json": {**MANIFEST, "plan": "another"}}),
    ("finished", {"moeconv.json": {**MANIFEST, "format": 99}}),  # refused by its version later
    ("foreign", {"moeconv.json": {"plan": 1, "files": 3}}),
    ("foreign", {"moeconv.json": {"files": [5], "auxiliary": [7]}}),
    ("foreign", {"moeconv.json": signed({**UNSIGNED, "files": []})}),
    ("foreign", {"moeconv.json": signed({**UNSIGNED, "files": [{"name": "..", "nbytes": 1}]})}),
    ("foreign", {"moeconv.json": signed({**UNSIGNED, "auxiliary": ["../outside"]})}),
    ("foreign", {"moeconv.json": signed({**UNSIGNED, "configs": "params.json"})}),
    ("foreign", {"moeconv.json": signed({**UNSIGNED, "beside": {"/etc/x": "0"}})}),
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
    put(tmp_path, "moeconv.json", MANIFEST)
    remove_output(examine(tmp_path), tmp_path)
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {"notes.txt", "keep/x", ".moeconv/plan.json"}
    assert examine(tmp_path).state == "unfinished"
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
    put(tmp_path, "params.json", "abc")
    found = Found("finished", MANIFEST)
    if good:
        check_finished(found, tmp_path)
        (tmp_path / "a.safetensors").unlink()
    with pytest.raises(VerifyFailed, match="the manifest says 3"):
        check_finished(found, tmp_path)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"")])
def test_check_finished_looks_beside_the_weights(damage: Any, tmp_path: Path) -> None:
    put(tmp_path, "a.safetensors", "abc")
    put(tmp_path, "params.json", "abc")
    damage(tmp_path / "params.json")
    with pytest.raises(VerifyFailed, match=r"params\.json is (missing|empty)") as caught:
        check_finished(Found("finished", MANIFEST), tmp_path)
    assert "--overwrite" in caught.value.hint


WHOLE: dict[str, Any] = {
    "layout": "hf",
    "layers": None,
    "experts_only": False,
    "include": [],
    "exclude": [],
}
STRANGERS: list[tuple[str, dict[str, Any], bool]] = [
    ("b.safetensors", WHOLE, True),
    ("B.SAFETENSORS", WHOLE, True),
    ("pytorch_model.bin", WHOLE, True),
    ("x.pt", WHOLE, True),
    ("x.gguf", WHOLE, True),
    ("pytorch_model.bin.index.json", WHOLE, True),
    ("README.md", WHOLE, False),
    (".hidden", WHOLE, False),
    ("b.safetensors.partial", WHOLE, False),  # no loader reads it
    ("a.safetensors", WHOLE, False),
    ("tokenizer.json", WHOLE, False),
    ("old/b.safetensors", WHOLE, False),
    ("old/b.safetensors", {**WHOLE, "layout": "ktransformers"}, True),
    ("config.json", {**WHOLE, "experts_only": True}, True),
]


@pytest.mark.parametrize("state", ["finished", "unfinished"])
@pytest.mark.parametrize(("name", "options", "strange"), STRANGERS)
def test_strangers(
    name: str, options: dict[str, Any], strange: bool, state: str, tmp_path: Path
) -> None:
    put(tmp_path, name, "abc")
    if state == "finished":
        put(tmp_path, "moeconv.json", signed({**UNSIGNED, "options": options}))
    else:
        put(
            tmp_path,
            ".moeconv/plan.json",
            {**PLAN, "options": options, "auxiliary": ["tokenizer.json"]},
        )
    found = examine(tmp_path)
    assert found.state == state
    assert found.strangers == ((name.replace("/b.safetensors", "/"),) if strange else ())


@pytest.mark.parametrize(("name", "layout"), [("config.json", "vllm"), (INDEX, "hf")])
def test_the_last_files_of_a_begun_model_are_its_own(
    name: str, layout: str, tmp_path: Path
) -> None:
    put(tmp_path, name, "{}")
    put(tmp_path, ".moeconv/plan.json", {**PLAN, "options": {**WHOLE, "layout": layout}})
    assert examine(tmp_path).strangers == ()
    assert examine(tmp_path).state == "unfinished"


DIFFERENCES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"tp": 2}, {"tp": 4}, "--tp 2 there, 4 now"),
    ({"tp": 2, "ep": True}, {"tp": 2}, "--ep there, not now"),
    ({"tp": 2}, {"tp": 2, "ep": True}, "no --ep there, given now"),
    ({"include": ("*",)}, {}, "--include '*' there, not now"),
    ({}, {"layers": (0,)}, "no --layers there, 0 now"),
    ({}, {"max_file_size": 4096}, "no --max-file-size there, 4096 now"),
]


@pytest.mark.parametrize(("there", "now", "words"), DIFFERENCES)
def test_differences_are_told_as_the_command_line_writes_them(
    there: dict[str, Any], now: dict[str, Any], words: str, tmp_path: Path
) -> None:
    source = write_checkpoint(tmp_path / "src", "gptoss-mxfp4").root
    found, wanted = (api.plan(source, layout="vllm", **options) for options in (there, now))
    with pytest.raises(Refused) as caught:
        decide(Found("finished", facts_of(found)), wanted, tmp_path / "out", overwrite=False)
    assert caught.value.what.endswith(f"another conversion: {words}")


DEFAULTS: list[tuple[dict[str, Any], dict[str, Any], bool]] = [
    ({}, {"max_file_size": 5 * 10**9}, True),
    ({}, {"dense_dtype": "bf16"}, True),
    ({"dtype": "fp32"}, {"dtype": "fp32", "dense_dtype": "fp32"}, True),
    ({"dtype": "fp32"}, {"dtype": "fp32", "dense_dtype": "bf16"}, False),
    ({"layout": "vllm"}, {"layout": "vllm", "uneven": "refuse"}, True),
    ({"layout": "vllm"}, {"layout": "vllm", "max_file_size": 5 * 10**9}, False),
    ({"layout": "vllm"}, {"layout": "vllm", "uneven": "pad"}, False),
    (
        {"layout": "vllm", "experts_only": True},
        {"layout": "vllm", "experts_only": True, "uneven": "pad"},
        True,
    ),
]


@pytest.mark.parametrize(("plain", "given", "same"), DEFAULTS)
def test_a_default_that_is_given_is_the_same_conversion(
    plain: dict[str, Any], given: dict[str, Any], same: bool, tmp_path: Path
) -> None:
    source = write_checkpoint(tmp_path / "src", "gptoss-mxfp4").root
    one, other = (facts_of(api.plan(source, **options)) for options in (plain, given))
    assert (one == other) is same
