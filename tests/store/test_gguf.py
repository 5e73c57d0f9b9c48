"""GGUF sources: single files, split models, directories, configs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest

from moeconv.errors import BadHeader, BadSource, MoeconvError
from moeconv.store.gguf import open_gguf
from moeconv.store.reader import Reader
from moeconv.store.source import open_source

Q4_K_M = "gguf-qwen3moe-q4_k_m"


@pytest.fixture
def model(fixtures: Path) -> Path:
    return fixtures / "checkpoints" / Q4_K_M / "model.gguf"


def write_part(path: Path, tensors: dict[str, np.ndarray], **metadata: int) -> None:
    """Write one file of a split model; metadata keys with __ for a dot."""
    writer = gguf.GGUFWriter(path, "qwen3moe")
    for key, value in metadata.items():
        writer.add_uint16(key.replace("__", "."), value)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_split(root: Path, count: int, **changes: int) -> list[Path]:
    """Write a split model of one tensor per file; `changes` replace metadata of the last file."""
    paths = [root / f"m-{index + 1:05d}-of-{count:05d}.gguf" for index in range(count)]
    for index, path in enumerate(paths):
        metadata = {"split__no": index, "split__count": count, "split__tensors__count": count}
        if index == count - 1:
            metadata.update(changes)
        write_part(path, {f"t{index}.weight": np.full(4, index, np.float32)}, **metadata)
    return paths


def test_a_file_opens_with_a_config_from_its_metadata(model: Path) -> None:
    source = open_source(model)
    assert source.kind == "gguf"
    assert source.config["model_type"] == "qwen3_moe"
    assert source.extra_configs["gguf"]["qwen3moe.expert_count"] == 4
    assert len(source.tensors) == 27
    assert source.sizes == {"model.gguf": model.stat().st_size}
    assert any("tokenizer" in note for note in source.notes)
    assert source.auxiliary == ()


def test_the_bytes_of_a_tensor_are_where_the_source_says(model: Path) -> None:
    source = open_source(model)
    expected = {tensor.name: tensor.data for tensor in gguf.GGUFReader(model).tensors}
    with Reader(source.files) as reader:
        for name, ref in source.tensors.items():
            found = np.empty(ref.nbytes, np.uint8)
            reader.read_into(ref.file, ref.offset, found)
            assert found.tobytes() == expected[name].tobytes()


def test_a_given_config_is_used(model: Path, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"model_type": "given"}')
    source = open_source(model, config=tmp_path / "other.json")
    assert source.config == {"model_type": "given"}
    assert source.fingerprint != open_source(model).fingerprint


def test_a_config_beside_the_file_is_used(model: Path, tmp_path: Path) -> None:
    shutil.copy(model, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "beside"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    source = open_source(tmp_path / "model.gguf")
    assert source.config == {"model_type": "beside"}
    assert source.auxiliary == ("tokenizer.json",)
    assert not any("tokenizer" in note for note in source.notes)


def test_a_damaged_config_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(BadSource):
        open_source(model, config=tmp_path / "bad.json")


@pytest.mark.parametrize("given", [0, 1, 2, None], ids=["first", "second", "third", "directory"])
def test_a_split_model_is_found_from_any_file(tmp_path: Path, given: int | None) -> None:
    paths = write_split(tmp_path, 3)
    (tmp_path / "config.json").write_text("{}")
    source = open_source(tmp_path if given is None else paths[given])
    assert list(source.files) == [path.name for path in paths]
    assert {name: ref.file for name, ref in source.tensors.items()} == {
        f"t{index}.weight": path.name for index, path in enumerate(paths)
    }


def test_a_first_file_without_tensors_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    both = {"split__count": 2, "split__tensors__count": 1}
    write_part(tmp_path / "m-00001-of-00002.gguf", {}, split__no=0, **both)
    tensors = {"a.weight": np.zeros(4, np.float32)}
    write_part(tmp_path / "m-00002-of-00002.gguf", tensors, split__no=1, **both)
    assert list(open_source(tmp_path).tensors) == ["a.weight"]


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_missing_file_of_a_split_model_is_named(tmp_path: Path, lost: int) -> None:
    paths = write_split(tmp_path, 3)
    paths[lost].unlink()
    for given in (tmp_path, paths[(lost + 1) % 3]):
        with pytest.raises(BadSource, match=paths[lost].name):
            open_source(given)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"split__no": 0}, r"split.no is 0, .* should be 1"),
        ({"split__count": 3}, r"split.count is 3, .* should be 2"),
        ({"split__tensors__count": 9}, r"split.tensors.count is 9, .* should be 2"),
    ],
)
def test_files_that_contradict_their_names_are_refused(
    tmp_path: Path, changes: dict[str, int], said: str
) -> None:
    write_split(tmp_path, 2, **changes)
    with pytest.raises(BadSource, match=said):
        open_source(tmp_path)


def test_a_part_under_another_name_is_refused(tmp_path: Path) -> None:
    paths = write_split(tmp_path, 2)
    lone = paths[1].rename(tmp_path / "renamed.gguf")
    with pytest.raises(BadSource, match="one of 2 files of a split model"):
        open_source(lone)


def test_a_model_put_together_again_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    tensors = {"a.weight": np.zeros(4, np.float32)}
    write_part(tmp_path / "merged.gguf", tensors, split__no=0, split__count=0)
    assert list(open_source(tmp_path / "merged.gguf").tensors) == ["a.weight"]


def test_files_without_split_metadata_are_refused(tmp_path: Path) -> None:
    for index in (1, 2):
        tensors = {f"t{index}.weight": np.zeros(4, np.float32)}
        write_part(tmp_path / f"m-0000{index}-of-00002.gguf", tensors)
    with pytest.raises(BadSource, match=r"split.count is None"):
        open_source(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for index in (0, 1):
        write_part(
            tmp_path / f"m-0000{index + 1}-of-00002.gguf",
            {"a.weight": np.zeros(4, np.float32)},
            split__no=index,
            split__count=2,
        )
    with pytest.raises(BadSource, match=r"a.weight is in two files"):
        open_source(tmp_path)


def test_parts_of_different_architectures_are_refused(tmp_path: Path) -> None:
    write_split(tmp_path, 2)
    path = tmp_path / "m-00002-of-00002.gguf"
    path.write_bytes(path.read_bytes().replace(b"qwen3moe", b"qwen2moe"))
    with pytest.raises(BadSource, match="different architectures"):
        open_source(tmp_path)


def test_several_models_in_a_directory_are_named(model: Path, tmp_path: Path) -> None:
    shutil.copy(model, tmp_path / "model-Q8_0.gguf")
    write_split(tmp_path, 2)
    with pytest.raises(BadSource, match=r"several models") as caught:
        open_source(tmp_path)
    assert "model-Q8_0.gguf" in caught.value.what
    assert "m-*-of-00002.gguf" in caught.value.what


def test_projectors_beside_the_model_are_left_out_with_a_note(model: Path, tmp_path: Path) -> None:
    shutil.copy(model, tmp_path)
    (tmp_path / "mmproj-F16.gguf").write_bytes(b"")
    (tmp_path / "imatrix.gguf").write_bytes(b"")
    source = open_source(tmp_path)
    assert list(source.files) == ["model.gguf"]
    assert any("mmproj-F16.gguf" in note and "imatrix.gguf" in note for note in source.notes)


def test_a_projector_alone_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "vision.gguf", "clip")
    writer.add_tensor("v.weight", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(BadSource, match="no model"):
        open_source(tmp_path / "vision.gguf")
    (tmp_path / "vision.gguf").rename(tmp_path / "mmproj.gguf")
    with pytest.raises(BadSource, match="no model"):
        open_source(tmp_path)


def test_no_tensors_is_refused(tmp_path: Path) -> None:
    write_part(tmp_path / "model.gguf", {})
    with pytest.raises(BadSource, match="no tensors"):
        open_source(tmp_path)


def test_an_unknown_architecture_has_an_empty_config_and_a_note(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "future")
    writer.add_tensor("a.weight", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = open_gguf(tmp_path / "model.gguf")
    assert source.config == {}
    assert any("future" in note and "--config" in note for note in source.notes)


def test_the_fingerprint_is_of_the_content(model: Path, tmp_path: Path) -> None:
    shutil.copy(model, tmp_path)
    assert open_gguf(tmp_path).fingerprint == open_gguf(model).fingerprint
    other = tmp_path / "other"
    other.mkdir()
    data = model.read_bytes().replace(b"Qwen3Moe", b"Qwen3moE", 1)
    (other / "model.gguf").write_bytes(data)
    assert open_gguf(other).fingerprint != open_gguf(model).fingerprint


def test_a_damaged_file_is_a_bad_header(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(BadHeader, match="not a GGUF file"):
        open_source(tmp_path)


@pytest.mark.parametrize("given", [Path("missing.gguf"), Path("missing")])
def test_a_missing_source_is_an_error(given: Path, tmp_path: Path) -> None:
    with pytest.raises(MoeconvError):
        open_source(tmp_path / given)


def test_metadata_can_be_written_as_json(model: Path) -> None:
    assert json.loads(json.dumps(open_source(model).extra_configs))
