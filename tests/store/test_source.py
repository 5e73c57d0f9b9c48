"""Sources: which files count, what is refused and with which names, what the fingerprint sees."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moeconv.errors import BadSource, UsageError
from moeconv.store import reader, source
from moeconv.store.safetensors import build_header
from moeconv.store.source import Source, open_source
from tests.store.checkpoints import (
    CONFIG,
    FIRST,
    INDEX,
    SECOND,
    put,
    weights,
    write_index,
    write_model,
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """Return a directory that holds a config alone."""
    root = tmp_path / "bare"
    root.mkdir()
    put(root / "config.json", CONFIG)
    return root


def test_whole_model(root: Path) -> None:
    found = open_source(root)
    assert isinstance(found, Source)
    assert (found.root, found.kind, found.config) == (root, "safetensors", CONFIG)
    assert {name: ref.file for name, ref in found.tensors.items()} == {
        "a": FIRST,
        "b": FIRST,
        "c": SECOND,
    }
    assert found.files == {FIRST: root / FIRST, SECOND: root / SECOND}
    assert found.sizes == {name: (root / name).stat().st_size for name in (FIRST, SECOND)}
    assert (found.auxiliary, found.extra_configs, found.notes) == ((), {}, ())
    assert len(found.fingerprint) == 32


def test_ways_to_name_it(root: Path) -> None:
    assert open_source(root / INDEX) == open_source(root)
    one = open_source(root / FIRST)
    assert list(one.tensors) == ["a", "b"]
    assert list(one.files) == [FIRST]
    assert one.notes == (f"one file of several: {FIRST!r}",)


def test_hub_cache_snapshot(root: Path, tmp_path: Path) -> None:
    plain = open_source(root)
    blobs = tmp_path / "blobs"
    root.rename(blobs)
    snapshot = tmp_path / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for number, blob in enumerate(sorted(blobs.iterdir())):
        target = blob.rename(blobs / f"{number:064x}")
        (snapshot / blob.name).symlink_to(Path("../../blobs") / target.name)
    linked = open_source(snapshot)
    assert linked.tensors == plain.tensors
    assert linked.fingerprint == plain.fingerprint
    assert list(open_source(snapshot / SECOND).tensors) == ["c"]
    with pytest.raises(BadSource, match="snapshots/"):
        open_source(tmp_path)


def test_sharded_set_without_index(root: Path) -> None:
    (root / INDEX).unlink()
    assert set(open_source(root).tensors) == {"a", "b", "c"}


@pytest.mark.parametrize(
    "name", ["model.safetensors", "weights.safetensors", "m-1-of-1.safetensors"]
)
def test_one_file_without_index(bare: Path, name: str) -> None:
    weights(bare / name, ["a"])
    assert list(open_source(bare).files) == [name]


def test_only_another_index_decides(root: Path) -> None:
    (root / INDEX).rename(root / "consolidated.safetensors.index.json")
    assert set(open_source(root).tensors) == {"a", "b", "c"}
    weights(root / "other.safetensors", ["x"])
    write_index(root, {"x": "other.safetensors"}, name=INDEX)
    found = open_source(root)  # model.safetensors.index.json is preferred
    assert set(found.tensors) == {"x"}
    assert found.notes == (f"not part of the model: {FIRST!r}, {SECOND!r}",)


def test_strays_never_count(root: Path) -> None:
    for folder in ("original", "metal"):
        (root / folder).mkdir()
        weights(root / folder / "model.safetensors", ["x"])
    (root / "folder.safetensors").mkdir()
    weights(root / ".hidden.safetensors", ["x"])
    before = open_source(root)
    weights(root / "consolidated.safetensors", ["a"])
    assert set(before.tensors) == {"a", "b", "c"}
    assert before.notes == ()
    assert open_source(root).tensors == before.tensors
    (root / INDEX).unlink()
    found = open_source(root)
    assert found.tensors == before.tensors
    assert found.notes == ("not part of the model: 'consolidated.safetensors'",)


def test_main_file_beside_others(bare: Path) -> None:
    weights(bare / "model.safetensors", ["a"])
    weights(bare / "adapter.safetensors", ["x"])
    found = open_source(bare)
    assert set(found.tensors) == {"a"}
    assert found.notes == ("not part of the model: 'adapter.safetensors'",)


@pytest.mark.parametrize("number", [1, 2])
def test_native_mistral(tmp_path: Path, number: int) -> None:
    for shard in range(1, number + 1):
        end = f"-{shard:05}-of-{number:05}" if number > 1 else ""
        weights(tmp_path / f"consolidated{end}.safetensors", [f"layers.{shard}.w"])
    put(tmp_path / "params.json", {"dim": 8})
    put(tmp_path / "tekken.json", {})
    found = open_source(tmp_path)
    assert len(found.tensors) == number
    assert (found.config, found.extra_configs) == ({}, {"params.json": {"dim": 8}})
    assert found.auxiliary == ("tekken.json",)
    assert "params.json stands for config.json" in found.notes[0]


def test_auxiliary_files(root: Path) -> None:
    copied = [
        *("LICENSE", "README.md", "chat_template.jinja", "generation_config.json"),
        *("merges.txt", "modeling_x.py", "spiece.model", "tokenizer.json", "vocab.tiktoken"),
    ]
    for name in copied:
        put(root / name, "{}")
    for name in (
        *(".gitattributes", "hf_quant_config.json", "quantize_config.json", "params.json"),
        *("pytorch_model.bin", "old.pt", "pytorch_model.bin.index.json", "flax_model.msgpack"),
        *("x.gguf", "moeconv.json", "y.safetensors.index.json"),
    ):
        put(root / name, "{}")
    (root / "figures").mkdir()
    (root / "notes.txt").symlink_to("gone")
    os.mkfifo(root / "pipe")
    (root / "linked.txt").symlink_to("merges.txt")
    with open(root / "huge.dat", "wb") as huge:
        huge.truncate((256 << 20) + 1)
    found = open_source(root)
    assert found.auxiliary == tuple(sorted([*copied, "linked.txt"]))
    assert found.notes == ("left out of a copy: 'huge.dat', 'notes.txt', 'pipe'",)
    assert sorted(found.extra_configs) == sorted(
        ["generation_config.json", "hf_quant_config.json", "params.json", "quantize_config.json"]
    )


def test_config_given(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    put(other, {"model_type": "other"})
    found = open_source(root, config=other)
    assert found.config == {"model_type": "other"}
    assert found.notes == ("config.json is not used: another config was given",)
    put(root / "README.md", "")
    (root / "config.json").unlink()
    assert open_source(root, config=other).auxiliary == ("README.md",)
    alone = open_source(root / FIRST, config=other)  # a download among strangers
    assert (alone.auxiliary, alone.config) == ((), {"model_type": "other"})
    with pytest.raises(UsageError, match=r"gone\.json"):
        open_source(root, config=tmp_path / "gone.json")


def test_config_that_real_models_have(root: Path) -> None:
    put(root / "config.json", '{"limit": [0.0, Infinity], "a": 1, "a": 1}')
    assert open_source(root).config == {"limit": [0.0, float("inf")], "a": 1}


@pytest.mark.parametrize("total", [13, "12", None, 12.5, {}])
def test_total_size_is_a_note(root: Path, total: object) -> None:
    write_index(root, {"a": FIRST, "b": FIRST, "c": SECOND}, total_size=total)
    assert len(open_source(root).notes) == (total is not None)
    put(root / INDEX, {"weight_map": {"a": FIRST, "b": FIRST, "c": SECOND}})
    assert open_source(root).notes == ()


def test_fingerprint(root: Path, tmp_path: Path) -> None:
    before = open_source(root).fingerprint
    copy = tmp_path / "elsewhere"
    shutil.copytree(root, copy)
    put(copy / "README.md", "text")
    assert open_source(copy).fingerprint == before
    seen = {before}
    changes: tuple[Callable[[], object], ...] = (
        lambda: put(copy / "config.json", {**CONFIG, "x": 1}),
        lambda: put(copy / "quantize_config.json", {"bits": 4}),
        lambda: (copy / SECOND).write_bytes(
            build_header([("c", "I8", (4,), 4)], {"format": "pt"}, 8) + bytes(4)
        ),
        lambda: (copy / SECOND).write_bytes(build_header([("c", "I8", (4,), 4)], {}) + bytes(4)),
        lambda: (copy / INDEX).unlink() or (copy / FIRST).unlink(),
        lambda: (copy / SECOND).rename(copy / "model.safetensors"),
    )
    for number, change in enumerate(changes):
        change()
        if number == 4:
            continue  # half a set is no source
        seen.add(open_source(copy).fingerprint)
    assert len(seen) == len(changes)


@pytest.mark.parametrize("name", ["gone", "gone/model.safetensors", "config.json/x", "a\0b"])
def test_source_that_is_not_there(root: Path, name: str) -> None:
    with pytest.raises(UsageError, match="there is no"):
        open_source(root / name)


@pytest.mark.parametrize(
    ("name", "words"),
    [("x.bin", "pickles"), ("x.txt", "unknown kind"), ("pipe", "pipe"), ("loop", "cannot be read")],
)
def test_source_of_another_kind(root: Path, name: str, words: str) -> None:
    put(root / "x.bin", "")
    put(root / "x.txt", "")
    os.mkfifo(root / "pipe")
    (root / "loop").symlink_to("loop")
    with pytest.raises(BadSource, match=words):
        open_source(root / name)


@pytest.mark.parametrize("place", [(source.os, "scandir"), (reader.os, "open")])
def test_source_that_may_not_be_read(
    root: Path, monkeypatch: pytest.MonkeyPatch, place: tuple[object, str]
) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(*place, denied)
    with pytest.raises(BadSource, match=r"may not be read|Permission denied"):
        open_source(root)


@pytest.mark.parametrize("name", ["x.gguf", ""])
def test_gguf_without_its_module(bare: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    put(bare / "x.gguf", "GGUF")
    monkeypatch.setattr(source.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(BadSource, match="GGUF sources are not supported"):
        open_source(bare / name)


@pytest.mark.parametrize("name", ["x.gguf", ""])
def test_gguf_is_handed_on(bare: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    put(bare / "x.gguf", "GGUF")
    calls: list[tuple[Path, Path | None]] = []

    class Module:
        @staticmethod
        def open_gguf(path: Path, *, config: Path | None) -> None:
            calls.append((path, config))

    monkeypatch.setattr(source.importlib.util, "find_spec", lambda _: Module)
    monkeypatch.setattr(source.importlib, "import_module", lambda _: Module)
    open_source(bare / name, config=Path("c.json"))
    assert calls == [(bare / name, Path("c.json"))]


def test_files_of_real_tools(fixtures: Path) -> None:
    roots = sorted({path.parent for path in fixtures.glob("checkpoints/*/*.safetensors")})
    assert len(roots) >= 5
    for root in roots:
        found = open_source(root)
        assert found.notes == ()
        assert found.config["model_type"]
        assert found.tensors
