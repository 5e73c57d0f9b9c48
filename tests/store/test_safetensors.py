"""Headers: every fault is a BadHeader that names file and tensor; the bytes written are exact."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import xxhash

from moeconv.errors import BadHeader, IOFailed, Refused
from moeconv.store import reader
from moeconv.store.safetensors import MAX_HEADER_NBYTES, build_header, read_header
from moeconv.types import TensorRef

OK = {"w": {"dtype": "U8", "shape": [2, 3], "data_offsets": [0, 6]}}


def file_bytes(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(**changes: object) -> dict[str, object]:
    return {"w": {**OK["w"], **changes}}


def two(first: list[int], second: list[int]) -> dict[str, object]:
    def one(offsets: list[int]) -> dict[str, object]:
        return {"dtype": "U8", "shape": [offsets[1] - offsets[0]], "data_offsets": offsets}

    return {"a": one(first), "w": one(second)}


DEEP = b'{"w":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
GOOD_TEXT = json.dumps(OK).encode()

# label -> content of the file, words of the message
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated"),
    "seven bytes": (b"\x02\0\0\0\0\0\0", "truncated"),
    "no header": (b"\x40\0\0\0\0\0\0\0", "expected 72 bytes or more, found 8"),
    "header cut": (file_bytes(GOOD_TEXT[:-9], length=len(GOOD_TEXT)), "download it again"),
    "length zero": (bytes(8), "does not start with '{'"),
    "length above the limit": (
        (MAX_HEADER_NBYTES + 1).to_bytes(8, "little") + b"{}",
        "header length is 100000001",
    ),
    "length of all ones": (b"\xff" * 8 + b"{}", "header length is"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
    "web page": (b"<!DOCTYPE html><html><title>Login</title></html>", "web page"),
    "pickle": (b"PK\x03\x04\0\0\x08\x08\0\0\0\0" + bytes(90), "zip archive or a PyTorch pickle"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(90), "GGUF"),
    "space first": (file_bytes(b" " + GOOD_TEXT, bytes(6)), "does not start with '{'"),
    "byte order mark": (file_bytes(b"\xef\xbb\xbf{}"), "does not start with '{'"),
    "array": (file_bytes(b"[]"), "does not start with '{'"),
    "string": (file_bytes(b'"w"'), "does not start with '{'"),
    "not utf-8": (file_bytes(b'{"\xff":1}'), "not UTF-8"),
    "not json": (file_bytes(b"{w:1}"), "not valid JSON"),
    "json cut": (file_bytes(GOOD_TEXT[:-1], bytes(6)), "not valid JSON"),
    "two values": (file_bytes(b"{}{}"), "not valid JSON"),
    "NUL padding": (file_bytes(b"{}\0\0"), "not valid JSON"),
    "raw newline in name": (file_bytes(GOOD_TEXT.replace(b"w", b"\n"), bytes(6)), "not valid JSON"),
    "nested deeply": (file_bytes(DEEP), "nested too deeply"),
    "huge integer": (
        file_bytes(GOOD_TEXT.replace(b"[2,", b"[" + b"9" * 5000 + b","), bytes(6)),
        "not valid JSON",
    ),
    "name twice, the same": (
        file_bytes(GOOD_TEXT[:-1] + b"," + GOOD_TEXT[1:], bytes(6)),
        "the key 'w' twice",
    ),
    "dtype twice": (
        file_bytes(GOOD_TEXT.replace(b'"dtype"', b'"dtype":"I8","dtype"'), bytes(6)),
        "the key 'dtype' twice",
    ),
    "metadata key twice": (
        file_bytes(b'{"__metadata__":{"a":"1","a":"1"}}'),
        "the key 'a' twice",
    ),
    "metadata twice": (file_bytes(b'{"__metadata__":{},"__metadata__":{}}'), "twice"),
    "NaN": (file_bytes(b'{"w":NaN}'), "NaN"),
    "Infinity in a shape": (
        file_bytes(GOOD_TEXT.replace(b"2,", b"Infinity,"), bytes(6)),
        "Infinity",
    ),
    "metadata null": (file_bytes({"__metadata__": None}), "__metadata__"),
    "metadata list": (file_bytes({"__metadata__": []}), "__metadata__"),
    "metadata number": (file_bytes({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata nested": (file_bytes({"__metadata__": {"a": {"b": "c"}}}), "__metadata__"),
    "metadata half pair": (file_bytes(b'{"__metadata__":{"a":"\\ud800"}}'), "not Unicode"),
    "entry null": (file_bytes({"w": None}), "'w'"),
    "entry list": (file_bytes({"w": []}), "'w'"),
    "entry string": (file_bytes({"w": "U8"}), "'w'"),
    "entry empty": (file_bytes({"w": {}}), "'w'"),
    "entry without offsets": (file_bytes({"w": {"dtype": "U8", "shape": []}}), "'w'"),
    "entry without shape": (file_bytes({"w": {"dtype": "U8", "data_offsets": [0, 1]}}), "'w'"),
    "entry with more": (file_bytes(entry(scale=1), bytes(6)), "other fields"),
    "dtype unknown": (file_bytes(entry(dtype="F7"), bytes(6)), "'F7' is unknown"),
    "dtype lower case": (file_bytes(entry(dtype="u8"), bytes(6)), "'u8' is unknown"),
    "dtype number": (file_bytes(entry(dtype=8), bytes(6)), "8 is unknown"),
    "dtype list": (file_bytes(entry(dtype=["U8"]), bytes(6)), "is unknown"),
    "shape null": (file_bytes(entry(shape=None), bytes(6)), "the shape None"),
    "shape number": (file_bytes(entry(shape=6), bytes(6)), "the shape 6"),
    "shape negative": (file_bytes(entry(shape=[-2, -3]), bytes(6)), "the shape [-2, -3]"),
    "shape bool": (file_bytes(entry(shape=[True, 6]), bytes(6)), "the shape [True, 6]"),
    "shape float": (file_bytes(entry(shape=[2.0, 3]), bytes(6)), "the shape [2.0, 3]"),
    "shape string": (file_bytes(entry(shape=["2", 3]), bytes(6)), "the shape ['2', 3]"),
    "shape of 2**63": (file_bytes(entry(shape=[2**63, 0]), bytes(6)), "the shape"),
    "shape wraps to 6": (file_bytes(entry(shape=[2**62, 2**62, 16, 6]), bytes(6)), "takes"),
    "shape of many extents": (file_bytes(entry(shape=[2**62] * 50_000), bytes(6)), "takes"),
    "shape too small": (file_bytes(entry(shape=[5]), bytes(6)), "takes 5 bytes"),
    "shape too large": (file_bytes(entry(shape=[7]), bytes(6)), "data_offsets hold 6"),
    "shape of zero": (file_bytes(entry(shape=[0, 9]), bytes(6)), "takes 0 bytes"),
    "half a byte": (
        file_bytes(entry(dtype="F4", shape=[1], data_offsets=[0, 1]), bytes(1)),
        "takes 4 bits",
    ),
    "offsets null": (file_bytes(entry(data_offsets=None), bytes(6)), "data_offsets None"),
    "offsets one": (file_bytes(entry(data_offsets=[6]), bytes(6)), "data_offsets [6]"),
    "offsets three": (file_bytes(entry(data_offsets=[0, 6, 6]), bytes(6)), "data_offsets"),
    "offsets float": (file_bytes(entry(data_offsets=[0, 6.0]), bytes(6)), "data_offsets [0, 6.0]"),
    "offsets bool": (file_bytes(entry(data_offsets=[False, 6]), bytes(6)), "data_offsets [False"),
    "offsets negative": (file_bytes(entry(data_offsets=[-6, 0]), bytes(6)), "data_offsets [-6"),
    "offsets reversed": (file_bytes(entry(data_offsets=[6, 0]), bytes(6)), "end before they begin"),
    "offsets beyond the file": (file_bytes(OK, bytes(5)), "truncated"),
    "data missing": (
        file_bytes(OK),
        f"expected {len(GOOD_TEXT) + 14} bytes or more, found {len(GOOD_TEXT) + 8}",
    ),
    "hole at the start": (file_bytes(entry(data_offsets=[1, 7]), bytes(7)), "a hole"),
    "hole between": (file_bytes(two([0, 6], [7, 13]), bytes(13)), "a hole"),
    "overlap": (file_bytes(two([0, 6], [5, 11]), bytes(11)), "overlaps"),
    "the same bytes twice": (file_bytes(two([0, 6], [0, 6]), bytes(6)), "overlaps"),
    "rest": (file_bytes(OK, bytes(7)), "1 bytes follow"),
    "rest without tensors": (file_bytes({}, bytes(1)), "1 bytes follow"),
    "name empty": (file_bytes({"": OK["w"]}, bytes(6)), "name is empty"),
    "name with NUL": (file_bytes({"a\0w": OK["w"]}, bytes(6)), "control characters"),
    "name with escape": (file_bytes({"a\x1b[2Jw": OK["w"]}, bytes(6)), "control characters"),
    "name with half pair": (
        file_bytes(GOOD_TEXT.replace(b'"w"', b'"\\udc00"'), bytes(6)),
        "control characters",
    ),
}
NAMES_THE_TENSOR = ("shape", "offsets", "dtype", "entry", "hole", "overlap")


@pytest.mark.parametrize("label", BROKEN)
def test_broken_file_is_a_bad_header(label: str, tmp_path: Path) -> None:
    content, words = BROKEN[label]
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(BadHeader) as caught:
        read_header(path, "part-1.safetensors")
    text = str(caught.value)
    assert words in text
    assert "part-1.safetensors" in caught.value.where
    assert caught.value.hint
    if label.startswith(NAMES_THE_TENSOR) and "truncated" not in words and "twice" not in words:
        assert "'w'" in text or "Infinity" in text
    assert len(text) < 1500
    text.encode()


def test_bytes_of_a_fault_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x"
    content = file_bytes(two([0, 6], [7, 13]), bytes(13))
    path.write_bytes(content)
    start = len(content) - 13
    with pytest.raises(BadHeader) as caught:
        read_header(path, "x")
    assert caught.value.where == f"x, tensor 'w', bytes [{start + 7}, {start + 13})"


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_not_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "loop").symlink_to("loop")
    words = {"fifo": "pipe", "directory": "directory", "dangling": "missing", "loop": "itself"}
    for name, word in words.items():
        with pytest.raises(BadHeader, match=word):
            read_header(tmp_path / name, name)


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.write_bytes(file_bytes(OK, bytes(6)))

    def denied(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(reader.os, "open", denied)
    with pytest.raises(BadHeader, match="may not be read"):
        read_header(path, "x")


def test_failing_disk_is_not_a_bad_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.write_bytes(file_bytes(OK, bytes(6)))

    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(reader.os, "preadv", broken)
    before = open_files()
    with pytest.raises(IOFailed, match="Input/output error"):
        read_header(path, "x")
    assert open_files() == before


def test_header_says_what_the_file_holds(tmp_path: Path) -> None:
    header = {
        "late": {"dtype": "F4", "shape": [2, 3], "data_offsets": [6, 9]},
        "__metadata__": {"format": "pt", "note": "line\nline"},
        "w": OK["w"],
        "none": {"dtype": "F32", "shape": [0, 5], "data_offsets": [6, 6]},
        "scalar": {"dtype": "F64", "shape": [], "data_offsets": [9, 17]},
    }
    content = file_bytes(json.dumps(header).encode() + b"   ", bytes(17))
    path = tmp_path / "x"
    path.write_bytes(content)
    start = len(content) - 17
    found = read_header(path, "y")
    assert found.tensors == (
        TensorRef("w", "U8", (2, 3), "y", start, 6),
        TensorRef("none", "F32", (0, 5), "y", start + 6, 0),
        TensorRef("late", "F4", (2, 3), "y", start + 6, 3),
        TensorRef("scalar", "F64", (), "y", start + 9, 8),
    )
    assert found.metadata == {"format": "pt", "note": "line\nline"}
    assert found.header_nbytes == start
    assert found.file_nbytes == len(content)
    assert found.digest == xxhash.xxh3_128_hexdigest(content[:start])


def test_file_without_tensors(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(file_bytes({}))
    assert read_header(tmp_path / "x", "x").tensors == ()


def test_header_bytes_are_exact() -> None:
    rows = [("b", "U8", (2,), 2), ("é", "F32", (), 4)]
    text = (
        '{"__metadata__":{"z":"1","a":"2"},"b":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},'
        '"é":{"dtype":"F32","shape":[],"data_offsets":[2,6]}}'
    ).encode()
    built = build_header(rows, {"z": "1", "a": "2"}, 256)
    assert built == (248).to_bytes(8, "little") + text.ljust(248)
    assert build_header([], {}, 8) == file_bytes(b"{}      ")
    full = build_header([], {"k": "v" * (4096 - 8 - len('{"__metadata__":{"k":""}}'))})
    assert len(full) == 4096  # nothing to pad
    assert full.endswith(b"}")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([("a", "U8", (2,), 3)], "does not take 3 bytes"),
        ([("a", "F4", (3,), 2)], "does not take 2 bytes"),
        ([("a", "U8", (2,), 2), ("a", "U8", (2,), 2)], "used twice"),
        ([("", "U8", (2,), 2)], "empty"),
        ([("a\n", "U8", (2,), 2)], "unprintable"),
        ([("__metadata__", "U8", (2,), 2)], "reserved"),
    ],
)
def test_what_no_header_can_describe(
    rows: list[tuple[str, str, tuple[int, ...], int]], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        build_header(rows, {})


def test_header_above_the_limit_is_refused() -> None:
    with pytest.raises(Refused, match="header of"):
        build_header([], {"k": "v" * MAX_HEADER_NBYTES})
