"""Headers of GGUF files: gguf-py's reader as the oracle, hostile files, fuzzed files."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeconv.errors import BadHeader, MoeconvError
from moeconv.store.gguf_header import MAX_NAME_NBYTES, read_header
from moeconv.store.gguf_values import ArrayLength
from moeconv.types import DTYPE_BITS, tensor_nbytes
from tests.store.gguf_files import (
    ARRAY,
    BOOL,
    F32,
    Q4_K,
    Q8_0,
    STRING,
    UINT32,
    Gguf,
    Info,
    array,
    number,
    pair,
    text,
    write_model,
)

MODELS = sorted((Path(__file__).parents[1] / "fixtures" / "checkpoints").glob("gguf-*/model.gguf"))


def assert_same_as_oracle(path: Path) -> None:
    """Compare every tensor and every kept metadata value with gguf-py's GGUFReader."""
    header = read_header(path, "model.gguf")
    oracle = gguf.GGUFReader(path)
    assert len(header.tensors) == len(oracle.tensors)
    for ref, tensor in zip(header.tensors, oracle.tensors, strict=True):
        kind = tensor.tensor_type.name
        plain = kind in DTYPE_BITS
        assert (ref.name, ref.offset, ref.nbytes) == (
            tensor.name,
            tensor.data_offset,
            tensor.n_bytes,
        )
        assert ref.dtype == (kind if plain else f"GGML:{kind}")
        shape = tuple(int(extent) for extent in reversed(tensor.shape))
        byte_shape = gguf.quants.quant_shape_to_byte_shape(shape, tensor.tensor_type)
        assert ref.shape == (shape if plain else byte_shape)
        assert tensor_nbytes(ref.dtype, ref.shape) == ref.nbytes
        assert ref.file == "model.gguf"
    fields = {key: field for key, field in oracle.fields.items() if not key.startswith("GGUF.")}
    assert set(header.metadata) == set(fields)
    for key, field in fields.items():
        assert header.metadata[key] == field.contents()


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.parent.name)
def test_fixtures_read_as_gguf_py_reads_them(path: Path) -> None:
    assert_same_as_oracle(path)


def test_every_tensor_type_reads_as_gguf_py_reads_it(tmp_path: Path) -> None:
    write_model(tmp_path / "model.gguf", flag=True, size=2.5, names=["a", "b"], counts=[1, 2, 3])
    assert_same_as_oracle(tmp_path / "model.gguf")


def test_no_model_is_missing_from_the_fixtures() -> None:
    assert len(MODELS) == 11


def write(folder: Path, file: Gguf) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(file.packed())
    return path


def test_a_valid_file_is_valid(tmp_path: Path) -> None:
    header = read_header(write(tmp_path, Gguf()), "model.gguf")
    (ref,) = header.tensors
    assert (ref.name, ref.dtype, ref.shape, ref.nbytes) == ("a.weight", "F32", (4, 8), 128)
    assert header.metadata == {"general.architecture": "qwen3moe"}


def test_version_2_is_read(tmp_path: Path) -> None:
    assert read_header(write(tmp_path, Gguf(version=struct.pack("<I", 2))), "x").tensors


def test_another_alignment_moves_the_data(tmp_path: Path) -> None:
    file = Gguf(pairs=[number("general.alignment", 256)], alignment=256)
    assert read_header(write(tmp_path, file), "x").tensors[0].offset == 256


def test_tensors_may_lie_in_another_order(tmp_path: Path) -> None:
    infos = [Info("b", offset=128), Info("a", offset=0)]
    header = read_header(write(tmp_path, Gguf(infos=infos, data_nbytes=256)), "x")
    assert [ref.name for ref in header.tensors] == ["b", "a"]


def test_a_long_array_is_kept_as_its_length(tmp_path: Path) -> None:
    tokens = pair("tokens", ARRAY, array(STRING, 300, text("x") * 300))
    scores = pair("scores", ARRAY, array(6, 5000, bytes(20000)))
    few = pair("few", ARRAY, array(UINT32, 2, struct.pack("<II", 7, 9)))
    nested = pair("nested", ARRAY, array(ARRAY, 1, array(BOOL, 2, b"\0\1")))
    header = read_header(write(tmp_path, Gguf(pairs=[tokens, scores, few, nested])), "x")
    assert header.metadata["tokens"] == ArrayLength("STRING", 300)
    assert header.metadata["scores"] == ArrayLength("FLOAT32", 5000)
    assert header.metadata["few"] == [7, 9]
    assert header.metadata["nested"] == [[False, True]]
    assert len(header.tensors) == 1


def nested_arrays(depth: int) -> bytes:
    value = array(UINT32, 0)
    for _ in range(depth - 1):
        value = array(ARRAY, 1, value)
    return pair("deep", ARRAY, value)


def test_the_digest_is_of_the_header_alone(tmp_path: Path) -> None:
    before = read_header(write(tmp_path, Gguf()), "x")
    path = tmp_path / "model.gguf"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert read_header(path, "x").digest == before.digest
    data[before.header_nbytes - 20] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadHeader):
        read_header(path, "x")


# What is wrong -> the file, and a piece of what the error must say.
HOSTILE: dict[str, tuple[Gguf, str]] = {
    "empty magic": (Gguf(magic=b""), "not a GGUF file"),
    "other magic": (Gguf(magic=b"GGML"), "not a GGUF file"),
    "version 0": (Gguf(version=struct.pack("<I", 0)), "version 0"),
    "version 1": (Gguf(version=struct.pack("<I", 1)), "version 1"),
    "version 4": (Gguf(version=struct.pack("<I", 4)), "version 4"),
    "big-endian": (Gguf(version=struct.pack(">I", 3)), "big-endian"),
    "more tensors than bytes": (Gguf(info_count=2**60), "do not fit"),
    "more keys than bytes": (Gguf(pair_count=2**60), "do not fit"),
    "counts that overflow": (Gguf(pair_count=2**64 - 1, info_count=2**64 - 1), "do not fit"),
    "a tensor too many": (Gguf(info_count=2), "a tensor name"),
    "a key too many": (Gguf(pair_count=2), "a string of"),
    "no data": (Gguf(data_nbytes=0), "the file has"),
    "data a byte short": (Gguf(data_nbytes=127), "the file has"),
    "data a block long": (Gguf(data_nbytes=160), "follow the last tensor"),
    "a hole": (Gguf(infos=[Info(offset=32)], data_nbytes=160), "a hole of 32"),
    "an overlap": (
        Gguf(infos=[Info("a"), Info("b", offset=64)], data_nbytes=192),
        "overlaps",
    ),
    "the same bytes": (Gguf(infos=[Info("a"), Info("b")]), "overlaps"),
    "an offset beyond": (Gguf(infos=[Info(offset=2**63)]), "hole"),
    "an offset that is not aligned": (Gguf(infos=[Info(offset=8)], data_nbytes=136), "not aligned"),
    "a name twice": (Gguf(infos=[Info(), Info(offset=128)], data_nbytes=256), "twice"),
    "an empty name": (Gguf(infos=[Info("")]), "is empty"),
    "a name with NUL": (Gguf(infos=[Info("a\0b")]), "control characters"),
    "a name that is not UTF-8": (Gguf(infos=[Info(b"\xff\xfe")]), "not UTF-8"),
    "a long name": (Gguf(infos=[Info("x" * (MAX_NAME_NBYTES + 1))]), "a string of"),
    "no dimensions": (Gguf(infos=[Info(extents=())]), "0 dimensions"),
    "five dimensions": (Gguf(infos=[Info(extents=(8, 4, 1, 1, 1))]), "5 dimensions"),
    "a dimension of zero": (Gguf(infos=[Info(extents=(8, 0))], data_nbytes=0), "dimensions [8, 0]"),
    "dimensions that overflow": (Gguf(infos=[Info(extents=(2**32, 2**32))]), "dimensions"),
    "a large tensor": (Gguf(infos=[Info(extents=(2**40,))]), "the file has"),
    "an unknown tensor type": (Gguf(infos=[Info(type_id=99)]), "unknown tensor type 99"),
    "a tensor type that ggml dropped": (Gguf(infos=[Info(type_id=4)]), "unknown tensor type 4"),
    "half a block of Q8_0": (Gguf(infos=[Info(extents=(48,), type_id=Q8_0)]), "blocks of 32"),
    "half a block of Q4_K": (Gguf(infos=[Info(extents=(128, 2), type_id=Q4_K)]), "blocks of 256"),
    "a key twice": (Gguf(pairs=[number("a", 1), number("a", 2)]), "key a twice"),
    "an empty key": (Gguf(pairs=[number("", 1)]), "is empty"),
    "a key that is not UTF-8": (Gguf(pairs=[pair(b"\xc3", UINT32, bytes(4))]), "not UTF-8"),
    "a long key": (Gguf(pairs=[number("k" * 70000, 1)]), "a string of 70000"),
    "a key longer than the file": (
        Gguf(pairs=[struct.pack("<Q", 2**62) + bytes(16)]),
        "a string of",
    ),
    "a string longer than the file": (
        Gguf(pairs=[pair("s", STRING, struct.pack("<Q", 2**62))]),
        "a string of",
    ),
    "an unknown value type": (Gguf(pairs=[pair("v", 13, bytes(8))]), "unknown value type 13"),
    "a bool of 2": (Gguf(pairs=[pair("b", BOOL, b"\2")]), "2 is not a BOOL"),
    "an array longer than the file": (Gguf(pairs=[pair("a", ARRAY, array(F32, 2**62))]), "not fit"),
    "strings more than the file": (Gguf(pairs=[pair("a", ARRAY, array(STRING, 2**60))]), "not fit"),
    "arrays more than the file": (Gguf(pairs=[pair("a", ARRAY, array(ARRAY, 2**60))]), "not fit"),
    "an array of an unknown type": (
        Gguf(pairs=[pair("a", ARRAY, array(77, 1, bytes(8)))]),
        "unknown value type 77",
    ),
    "arrays nested deep": (Gguf(pairs=[nested_arrays(5)]), "nested"),
    "arrays nested very deep": (Gguf(pairs=[nested_arrays(20000)]), "nested"),
    "alignment 0": (Gguf(pairs=[number("general.alignment", 0)]), "power of two"),
    "alignment 48": (Gguf(pairs=[number("general.alignment", 48)]), "power of two"),
    "alignment as text": (
        Gguf(pairs=[pair("general.alignment", STRING, text("32"))]),
        "not a UINT32",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_header_is_refused(tmp_path: Path, kind: str) -> None:
    file, said = HOSTILE[kind]
    with pytest.raises(BadHeader) as caught:
        read_header(write(tmp_path, file), "model.gguf")
    assert said in caught.value.what
    assert caught.value.where.startswith("model.gguf, byte ")
    assert caught.value.hint


def test_nesting_up_to_the_limit_is_read(tmp_path: Path) -> None:
    assert read_header(write(tmp_path, Gguf(pairs=[nested_arrays(4)])), "x").tensors


@pytest.mark.parametrize("nbytes", [0, 1, 4, 8, 20, 24, 30, 60, 90, 120])
def test_a_file_cut_off_is_refused(tmp_path: Path, nbytes: int) -> None:
    path = write(tmp_path, Gguf())
    path.write_bytes(path.read_bytes()[:nbytes])
    with pytest.raises(BadHeader):
        read_header(path, "model.gguf")


VALID = Gguf(
    pairs=[
        pair("general.architecture", STRING, text("gpt-oss")),
        number("gpt-oss.block_count", 2),
        pair("tokens", ARRAY, array(STRING, 2, text("ab") + text("c"))),
        pair("flags", ARRAY, array(BOOL, 3, b"\0\1\0")),
    ],
    infos=[Info("a"), Info("b", (32, 4), Q8_0, 128), Info("c", (256,), Q4_K, 288)],
    data_nbytes=432,
).packed()


@settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    changes=st.lists(
        st.tuples(st.integers(0, len(VALID) - 1), st.binary(min_size=1, max_size=8)), max_size=4
    ),
    cut=st.integers(0, len(VALID)) | st.just(len(VALID)),
)
def test_a_mutated_file_is_read_or_refused(
    tmp_path: Path, changes: list[tuple[int, bytes]], cut: int
) -> None:
    data = bytearray(VALID)
    for at, replacement in changes:
        data[at : at + len(replacement)] = replacement
    path = tmp_path / "model.gguf"
    path.write_bytes(data[:cut])
    try:
        header = read_header(path, "model.gguf")
    except MoeconvError:
        return
    ends = [(ref.offset, ref.offset + ref.nbytes) for ref in header.tensors]
    assert all(0 < start < end <= len(data) for start, end in ends)
    for ref in header.tensors:
        assert ref.nbytes * 8 == math.prod(ref.shape) * DTYPE_BITS.get(ref.dtype, 8)
