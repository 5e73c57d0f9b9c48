"""Property tests: the official library agrees, and no input makes anything but a BadHeader."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeconv.errors import BadHeader
from moeconv.store.safetensors import build_header, read_header

FIXTURES = Path(__file__).parent.parent / "fixtures" / "checkpoints"
OK = {"w": {"dtype": "U8", "shape": [2, 3], "data_offsets": [0, 6]}}


def file_bytes(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def same_as_official(path: Path) -> None:
    found = read_header(path, path.name)
    content = path.read_bytes()
    official = dict(safetensors.deserialize(content))
    assert len(found.tensors) == len(official)
    assert {tensor.name for tensor in found.tensors} == set(official)
    for tensor in found.tensors:
        said = official[tensor.name]
        assert (tensor.dtype, list(tensor.shape)) == (said["dtype"], said["shape"])
        assert content[tensor.offset : tensor.offset + tensor.nbytes] == bytes(said["data"])
    with safetensors.safe_open(path, "np") as opened:
        assert (opened.metadata() or {}) == found.metadata
        sized = {tensor.name for tensor in found.tensors if tensor.nbytes}
        # Tensors of no bytes share their offset: the library puts them in any order.
        order = [name for name in opened.offset_keys() if name in sized]
        assert order == [tensor.name for tensor in found.tensors if tensor.nbytes]


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*/*.safetensors")), ids=str)
def test_files_of_real_tools(path: Path) -> None:
    same_as_official(path)


def test_there_are_files_of_real_tools() -> None:
    assert len(list(FIXTURES.glob("*/*.safetensors"))) >= 5


NUMPY_DTYPES = ("bool", "u1", "i1", "<u2", "<i4", "<f2", "<f4", "<f8", "<u8", "<c8")
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=8).filter(
    lambda name: name != "__metadata__"
)
METADATA = st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3)
QUICK = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@QUICK
@given(
    tensors=st.dictionaries(NAMES, st.tuples(st.sampled_from(NUMPY_DTYPES), SHAPES), max_size=6),
    metadata=METADATA,
)
def test_what_the_official_library_writes(
    tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str], tmp_path: Path
) -> None:
    arrays = {name: np.ones(shape, dtype) for name, (dtype, shape) in tensors.items()}
    path = tmp_path / "x.safetensors"
    # 0.8.0 writes broken JSON for no tensors and {}: hence None.
    safetensors.numpy.save_file(arrays, path, metadata or None)
    same_as_official(path)


@QUICK
@given(
    tensors=st.dictionaries(NAMES, st.tuples(st.sampled_from(("U8", "BF16", "F64")), SHAPES)),
    metadata=METADATA,
    align=st.sampled_from((8, 64, 4096)),
)
def test_what_build_header_writes(
    tensors: dict[str, tuple[str, tuple[int, ...]]],
    metadata: dict[str, str],
    align: int,
    tmp_path: Path,
) -> None:
    nbytes = {"U8": 1, "BF16": 2, "F64": 8}
    rows = [
        (name, dtype, shape, int(np.prod(shape, dtype=int)) * nbytes[dtype])
        for name, (dtype, shape) in tensors.items()
    ]
    header = build_header(rows, metadata, align)
    path = tmp_path / "x.safetensors"
    path.write_bytes(header + np.random.default_rng(0).bytes(sum(row[3] for row in rows)))
    same_as_official(path)
    found = read_header(path, "x")
    assert found.header_nbytes == len(header)
    assert len(header) % align == 0
    assert [(t.name, t.dtype, t.shape, t.nbytes) for t in sorted(found.tensors)] == sorted(rows)
    assert found.metadata == metadata
    assert list(found.metadata) == list(metadata)
    begin = len(header)
    for name, _, _, size in rows:  # the order given is the order on disk
        tensor = next(tensor for tensor in found.tensors if tensor.name == name)
        assert tensor.offset == begin
        begin += size


def outcome(path: Path, content: bytes) -> bool:
    """Return whether our reader accepts `content`; what it accepts, the official one does too."""
    path.write_bytes(content)
    try:
        found = read_header(path, "x")
    except BadHeader as problem:
        str(problem).encode()
        return False
    official = dict(safetensors.deserialize(content))
    assert {tensor.name for tensor in found.tensors} == set(official)
    return True


@QUICK
@given(content=st.binary(max_size=200))
def test_arbitrary_bytes(content: bytes, tmp_path: Path) -> None:
    outcome(tmp_path / "x", content)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(("dtype", "shape", "data_offsets", "__metadata__", "w")), inner
        )
    ),
    max_leaves=8,
)


@QUICK
@given(header=JSON_VALUES, rest=st.integers(0, 9))
def test_arbitrary_json(header: object, rest: int, tmp_path: Path) -> None:
    outcome(tmp_path / "x", file_bytes(header, bytes(rest)))


@settings(QUICK, max_examples=300)
@given(
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4),
    cut=st.none() | st.integers(0, 200),
    field=st.none() | st.tuples(st.sampled_from(("dtype", "shape", "data_offsets")), JSON_VALUES),
)
def test_mutated_headers(
    changes: list[tuple[int, int]],
    cut: int | None,
    field: tuple[str, object] | None,
    tmp_path: Path,
) -> None:
    header = {"w": {**OK["w"], field[0]: field[1]}} if field else OK
    content = bytearray(file_bytes({"__metadata__": {"format": "pt"}, **header}, bytes(6)))
    for place, value in changes:
        content[place % len(content)] = value
    accepted = outcome(tmp_path / "x", bytes(content[:cut]))
    if not changes and field is None and cut is None:
        assert accepted
