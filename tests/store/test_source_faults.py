"""Broken sources: each fault a typed error that names the file or tensor."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from moeconv.errors import BadHeader, BadSource, MoeconvError
from moeconv.store.source import open_source
from tests.store.checkpoints import FIRST, INDEX, SECOND, put, weights, write_index, write_model


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def one_file(name: str, *tensors: str) -> Callable[[Path], None]:
    return lambda root: weights(root / name, tensors)


def index(weight_map: object, name: str = INDEX) -> Callable[[Path], None]:
    return lambda root: write_index(root, weight_map, name)


def text(name: str, value: object) -> Callable[[Path], None]:
    return lambda root: put(root / name, value)


def gone(*names: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for name in names:
            (root / name).unlink()

    return change


def instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / name).unlink()
        make(root / name)

    return change


def both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for one in changes:
            one(root)

    return change


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
DEEP = '{"a":' * 100 + "1" + "}" * 100
DEEPER = "[" * 100_000 + "]" * 100_000
NO_INDEX = gone(INDEX)
MAP = {"a": FIRST, "b": FIRST, "c": SECOND}

# label -> what happens to the good model, the error, words of its text
BROKEN: dict[str, tuple[Callable[[Path], None], type[MoeconvError], tuple[str, ...]]] = {
    "shard missing": (gone(SECOND), BadSource, (SECOND, "1 of 2", INDEX)),
    "shard a dangling link": (
        instead(SECOND, lambda path: path.symlink_to("gone")),
        BadSource,
        (SECOND, "symbolic link"),
    ),
    "shard a directory": (instead(SECOND, Path.mkdir), BadSource, (SECOND,)),
    "shard a pipe": (instead(SECOND, os.mkfifo), BadSource, (SECOND, "pipe")),
    "shard a git lfs pointer": (text(SECOND, LFS), BadHeader, (SECOND, "git lfs pull")),
    "shard cut": (text(SECOND, "\x01"), BadHeader, (SECOND, "truncated")),
    "tensor missing": (one_file(FIRST, "a"), BadSource, ("'b'", FIRST)),
    "tensors missing": (
        index({**MAP, **{f"x{i}": FIRST for i in range(9)}}),
        BadSource,
        ("'x0'", "'x4'", "4 more", FIRST),
    ),
    "tensor too many": (one_file(SECOND, "c", "d"), BadSource, ("'d'", SECOND)),
    "tensor twice": (one_file(SECOND, "c", "a"), BadSource, ("'a'", FIRST, SECOND)),
    "tensor twice, no index": (
        both(NO_INDEX, one_file(SECOND, "c", "a")),
        BadSource,
        ("'a'", FIRST, SECOND),
    ),
    "tensor elsewhere": (index({**MAP, "a": SECOND}), BadSource, ("'a'", SECOND)),
    "no tensors": (
        both(NO_INDEX, one_file(FIRST), one_file(SECOND)),
        BadSource,
        ("no tensors", FIRST),
    ),
    "index empty": (text(INDEX, ""), BadSource, (INDEX, "not valid JSON")),
    "index array": (text(INDEX, []), BadSource, (INDEX, "not an object")),
    "index without map": (text(INDEX, {}), BadSource, (INDEX, "weight_map")),
    "index map empty": (index({}), BadSource, (INDEX, "weight_map")),
    "index map list": (index([FIRST]), BadSource, (INDEX, "weight_map")),
    "index map number": (index({"a": 1}), BadSource, (INDEX, "'a'", "not a string")),
    "index deep": (text(INDEX, DEEPER), BadSource, (INDEX, "nested too deeply")),
    "index key twice": (
        text(INDEX, '{"weight_map":{"a":"x.safetensors","a":"x.safetensors"}}'),
        BadSource,
        (INDEX, "'a' twice"),
    ),
    "index map twice": (
        text(INDEX, '{"weight_map":{},"weight_map":{}}'),
        BadSource,
        (INDEX, "'weight_map' twice"),
    ),
    "index a pipe": (instead(INDEX, os.mkfifo), BadSource, (INDEX, "pipe")),
    "index a directory": (instead(INDEX, Path.mkdir), BadSource, (INDEX, "directory")),
    "index dangling": (
        instead(INDEX, lambda path: path.symlink_to("gone")),
        BadSource,
        (INDEX, "symbolic link"),
    ),
    "name absolute": (
        index({**MAP, "a": "/etc/x.safetensors"}),
        BadSource,
        ("/etc/x.safetensors", "leads out", "'a'"),
    ),
    "name upwards": (
        index({**MAP, "a": "../model/" + FIRST}),
        BadSource,
        ("../model/", "leads out", "'a'"),
    ),
    "name in a folder": (index({**MAP, "a": "x/y.safetensors"}), BadSource, ("leads out",)),
    "name with backslash": (index({**MAP, "a": "x\\y.safetensors"}), BadSource, ("leads out",)),
    "name of dots": (index({**MAP, "a": ".."}), BadSource, ("leads out",)),
    "name empty": (index({**MAP, "a": ""}), BadSource, ("leads out",)),
    "name with NUL": (index({**MAP, "a": "x\0.safetensors"}), BadSource, ("control",)),
    "name with escape": (index({**MAP, "a": "\x1b[1m.safetensors"}), BadSource, ("control",)),
    "name of a pickle": (index({**MAP, "a": "x.bin"}), BadSource, ("x.bin", "does not end in")),
    "two indexes": (
        both(
            NO_INDEX, index(MAP, "a.safetensors.index.json"), index(MAP, "b.safetensors.index.json")
        ),
        BadSource,
        ("a.safetensors.index.json", "b.safetensors.index.json"),
    ),
    "set incomplete": (
        both(NO_INDEX, gone(FIRST)),
        BadSource,
        ("model-*-of-00002: 1 of 2 files, without 1",),
    ),
    "set with a number twice": (
        both(NO_INDEX, one_file("model-1-of-00002.safetensors", "x")),
        BadSource,
        ("3 of 2 files",),
    ),
    "set of a billion": (
        both(NO_INDEX, gone(FIRST, SECOND), one_file("m-1-of-999999999.safetensors", "a")),
        BadSource,
        ("1 of 999999999 files, without 2, 3, 4, 5, 6",),
    ),
    "two whole models": (
        both(NO_INDEX, one_file("model.safetensors", "a")),
        BadSource,
        ("model.safetensors", FIRST, "no index"),
    ),
    "ranks": (
        both(
            NO_INDEX,
            gone(FIRST, SECOND),
            one_file("model-rank-0-part-0.safetensors", "a"),
            one_file("model-rank-1-part-0.safetensors", "a"),
        ),
        BadSource,
        ("model-rank-0-part-0.safetensors", "model-rank-1-part-0.safetensors"),
    ),
    "incomplete beside another": (
        both(NO_INDEX, gone(SECOND), one_file("consolidated.safetensors", "a")),
        BadSource,
        ("consolidated.safetensors", FIRST, "without 2"),
    ),
    "file name with escape": (
        both(NO_INDEX, gone(FIRST, SECOND), one_file("a\x1b[1m.safetensors", "a")),
        BadSource,
        ("control characters", "\\x1b"),
    ),
    "pickles only": (
        both(gone(INDEX, FIRST, SECOND), text("pytorch_model.bin", "x")),
        BadSource,
        ("pickle", "safe_serialization"),
    ),
    "nothing": (gone(INDEX, FIRST, SECOND), BadSource, ("no .safetensors file",)),
    "config missing": (gone("config.json"), BadSource, ("config.json", "--config FILE")),
    "config missing, params for others": (
        both(gone("config.json"), text("params.json", {})),
        BadSource,
        ("config.json", "--config FILE"),
    ),
    "config array": (text("config.json", []), BadSource, ("config.json", "not an object")),
    "config number": (text("config.json", "1"), BadSource, ("config.json", "not an object")),
    "config empty": (text("config.json", ""), BadSource, ("config.json", "not valid JSON")),
    "config not utf-8": (
        lambda root: (root / "config.json").write_bytes(b'{"a": "\xff"}') and None,
        BadSource,
        ("config.json", "not UTF-8"),
    ),
    "config deep": (text("config.json", DEEP), BadSource, ("config.json", "levels deep")),
    "config deeper": (text("config.json", DEEPER), BadSource, ("config.json", "nested")),
    "config large": (text("config.json", " " * 10_000_001), BadSource, ("config.json", "10000001")),
    "config says two things": (
        text("config.json", '{"a": {"b": 1, "b": 2}}'),
        BadSource,
        ("config.json", "'b' twice"),
    ),
    "config a pipe": (instead("config.json", os.mkfifo), BadSource, ("config.json", "pipe")),
    "config a directory": (instead("config.json", Path.mkdir), BadSource, ("config.json",)),
    "config dangling": (
        instead("config.json", lambda path: path.symlink_to("gone")),
        BadSource,
        ("config.json", "symbolic link"),
    ),
    "quantization config broken": (
        text("hf_quant_config.json", "{"),
        BadSource,
        ("hf_quant_config.json",),
    ),
}


@pytest.mark.parametrize("label", BROKEN)
def test_broken_source(label: str, root: Path) -> None:
    change, error, words = BROKEN[label]
    change(root)
    with pytest.raises(error) as caught:
        open_source(root)
    message = str(caught.value)
    assert [word for word in words if word not in message] == []
    assert caught.value.where
    assert len(message) < 2500
    message.encode()
