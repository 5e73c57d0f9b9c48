"""Plans: files and offsets, parts of a model, and what is refused before anything is written."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moeconv.api as api
from moeconv.errors import BadSource, MoeconvError, Refused, UsageError
from moeconv.resources import Resources
from moeconv.store.safetensors import read_header
from tests.checkpoints import (
    Size,
    files_of,
    quick_directory,
    read_all,
    same_bits,
    save,
    write_checkpoint,
)

PAGE, LARGE = 4096, 1 << 20
BIG = Size(hidden=1024, intermediate=1024, experts=2, vocab=600)
ODD = Size(hidden=1031, intermediate=1024, experts=2, vocab=601)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Return a directory in memory: these tests make many outputs, and no disk matters to them."""
    with quick_directory() as directory:
        yield directory


def convert(src: Path, dst: Path, **options: Any) -> Any:
    return api.convert(api.plan(src, dst, **options), dst, resources=Resources(jobs=2))


@pytest.mark.parametrize("options", [{}, {"layout": "vllm", "tp": 2}, {"max_file_size": 5_000_000}])
@pytest.mark.parametrize(("kind", "size"), [("gptoss-bf16", BIG), ("mixtral", ODD)])
def test_large_tensors_start_on_pages(
    kind: str, size: Size, options: dict[str, Any], tmp_path: Path
) -> None:
    root = write_checkpoint(tmp_path / "src", kind, size).root
    plan = api.plan(root, **options)
    convert(root, tmp_path / "out", **options)
    large = 0
    for path in tmp_path.glob("out/*.safetensors"):
        header = read_header(path, path.name)
        placed = sorted(header.tensors, key=lambda ref: ref.offset)
        kinds = []
        for ref in placed:
            assert ref.offset % {"F32": 4}.get(ref.dtype, 2) == 0
            if ref.nbytes >= LARGE:
                large += 1
                assert ref.offset % PAGE == 0, ref.name
            kinds.append(2 if ref.nbytes < LARGE else int(ref.nbytes % PAGE != 0))
        assert kinds == sorted(kinds)  # whole pages, then an odd one, then the small ones
        assert kinds.count(1) <= 1
    assert large >= 4
    assert plan.notes == ()


def test_too_many_odd_tensors_are_reported_not_scattered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moeconv.arrange.MOST_ODD_FILES", 2)
    root = write_checkpoint(tmp_path / "src", "mixtral", ODD).root
    plan = api.plan(root)
    assert len(plan.files) == 1
    assert any("do not start on a page" in note for note in plan.notes)
    odd = sum(t.nbytes >= LARGE and t.nbytes % PAGE > 0 for t in plan.files[0].tensors)
    assert any(note.startswith(f"{odd - 1} large") for note in plan.notes)


def test_max_file_size(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "src", "qwen3moe", Size(layers=3))
    limit = 30_000
    convert(checkpoint.root, tmp_path / "out", max_file_size=limit)
    paths = sorted(path.name for path in tmp_path.glob("out/*.safetensors"))
    count = len(paths)
    assert count > 3
    assert paths == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for path in tmp_path.glob("out/*.safetensors"):
        tensors = load_file(path)
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        assert nbytes <= limit or len(tensors) == 1
    assert {k: v.shape for k, v in read_all(tmp_path / "out").items()} == {
        name: tensor.shape for name, tensor in checkpoint.form.items()
    }
    vllm = api.plan(checkpoint.root, layout="vllm", tp=2, max_file_size=limit)
    names = [file.name for file in vllm.files if file.rank == 1]
    assert names == [f"model-rank-1-part-{part}.safetensors" for part in range(len(names))]
    assert len(names) > 1


PARTS: list[tuple[dict[str, Any], Callable[[str], bool]]] = [
    ({"layers": (1,)}, lambda name: ".layers.1." in name),
    ({"layers": (0, 2)}, lambda name: ".layers.0." in name or ".layers.2." in name),
    ({"experts_only": True}, lambda name: ".experts." in name),
    (
        {"include": ("*q_proj*", "*norm.weight")},
        lambda name: "q_proj" in name or name.endswith("norm.weight"),
    ),
    ({"exclude": ("*.experts.*",)}, lambda name: ".experts." not in name),
    (
        {"include": ("*.layers.1.*",), "exclude": ("*_proj*",)},
        lambda name: ".1." in name and "_proj" not in name,
    ),
    ({"layers": (0,), "experts_only": True}, lambda n: ".layers.0." in n and ".experts." in n),
]


@pytest.mark.parametrize(("options", "chosen"), PARTS)
def test_partial_outputs(
    options: dict[str, Any], chosen: Callable[[str], bool], tmp_path: Path
) -> None:
    checkpoint = write_checkpoint(tmp_path / "src", "qwen3moe", Size(layers=3))
    (checkpoint.root / "tokenizer.json").write_text("{}")
    result = convert(checkpoint.root, tmp_path / "out", **options)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {name for name in names if not name.endswith(".safetensors")} == {"moeconv.json"}
    tensors = read_all(tmp_path / "out")
    expected = {name: tensor for name, tensor in checkpoint.form.items() if chosen(name)}
    assert set(tensors) == set(expected)
    assert all(same_bits(tensors[name], expected[name]) for name in expected)
    manifest = json.loads((tmp_path / "out" / "moeconv.json").read_text())
    assert manifest["partial"] is True
    states = manifest["accounting"]["source"]
    left = len(checkpoint.form) - len(expected)
    assert (states["copied"]["tensors"], states["not selected"]["tensors"]) == (len(expected), left)
    again = convert(checkpoint.root, tmp_path / "out", **options)
    assert (result.state, again.state) == ("converted", "finished")
    with pytest.raises(Refused):
        convert(checkpoint.root, tmp_path / "out")


def test_partial_vllm_output(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "src", "gptoss-mxfp4", Size(layers=2)).root
    convert(root, tmp_path / "all", layout="vllm", tp=2)
    convert(root, tmp_path / "out", layout="vllm", tp=2, layers=(1,), experts_only=True)
    for rank in (0, 1):
        part, full = (read_all(tmp_path / d, f"*rank-{rank}-*") for d in ("out", "all"))
        assert set(part) == {name for name in full if ".1." in name and "routed" in name}
        assert all(same_bits(part[name], full[name]) for name in part)


SOURCE = "model.safetensors"
EXPERT = "model.layers.0.mlp.experts"


def tensors_of(root: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in load_file(root / SOURCE).items()}


def changed(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Return a function that rewrites a source's tensors."""

    def act(root: Path) -> None:
        tensors = tensors_of(root)
        change(tensors)
        save_file({n: t.contiguous() for n, t in tensors.items()}, root / SOURCE, {"format": "pt"})

    return act


def without(name: str) -> Callable[[Path], None]:
    return changed(lambda tensors: tensors.pop(name))


def replaced(name: str, tensor: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return changed(lambda tensors: tensors.update({name: tensor(tensors[name])}))


def added(name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Callable[[Path], None]:
    return changed(lambda tensors: tensors.update({name: torch.ones(shape, dtype=dtype)}))


def config(**values: Any) -> Callable[[Path], None]:
    """Return a function that sets fields of config.json; None removes one."""

    def act(root: Path) -> None:
        found = json.loads((root / "config.json").read_text()) | values
        kept = {name: value for name, value in found.items() if value is not None}
        (root / "config.json").write_text(json.dumps(kept))

    return act


def text(name: str, data: str | bytes) -> Callable[[Path], None]:
    raw = data if isinstance(data, bytes) else data.encode()
    return lambda root: (root / name).write_bytes(raw) and None


def header(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Return a function that rewrites the header of the source's file, its data left as it is."""

    def act(root: Path) -> None:
        data = (root / SOURCE).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        found = json.loads(data[8 : 8 + length])
        edit(found)
        written = json.dumps(found).encode()
        (root / SOURCE).write_bytes(struct.pack("<Q", len(written)) + written + data[8 + length :])

    return act


def indexed(weight_map: dict[str, str]) -> Callable[[Path], None]:
    return text("model.safetensors.index.json", json.dumps({"weight_map": weight_map}))


def cut(nbytes: int) -> Callable[[Path], None]:
    return lambda root: (root / SOURCE).write_bytes((root / SOURCE).read_bytes()[:nbytes]) and None


def instead(put: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Return a function that puts something else in the place of the weights."""

    def act(root: Path) -> None:
        (root / SOURCE).unlink()
        put(root / SOURCE)

    return act


def twice(root: Path) -> None:
    shutil.copy(root / SOURCE, root / "model-00002-of-00002.safetensors")
    (root / SOURCE).rename(root / "model-00001-of-00002.safetensors")


BLOCKS, SCALES = f"{EXPERT}.gate_up_proj_blocks", f"{EXPERT}.gate_up_proj_scales"
DOWN, BIAS = f"{EXPERT}.down_proj_blocks", f"{EXPERT}.gate_up_proj_bias"
NORM = "model.norm.weight"

BROKEN: dict[str, Callable[[Path], Any]] = {
    "no weights": lambda root: (root / SOURCE).unlink(),
    "no config": lambda root: (root / "config.json").unlink(),
    "config is no JSON": text("config.json", "{"),
    "config is a list": text("config.json", "[]"),
    "config is not UTF-8": text("config.json", b"\xff\xfe{}"),
    "config nested too deep": text("config.json", '{"a":' * 5000 + "1" + "}" * 5000),
    "config says a field twice": text("config.json", '{"a": 1, "model_type": "x", "a": 2}'),
    "unknown model_type": config(model_type="gpt_ossified"),
    "no model_type": config(model_type=None),
    "model_type is a number": config(model_type=7),
    "hidden size is text": config(hidden_size="64"),
    "hidden size is negative": config(hidden_size=-64),
    "another hidden size": config(hidden_size=96),
    "another intermediate size": config(intermediate_size=128),
    "more experts promised": config(num_local_experts=5),
    "fewer experts promised": config(num_local_experts=3),
    "more layers promised": config(num_hidden_layers=2),
    "unknown quantization": config(quantization_config={"quant_method": "new"}),
    "quantization is a list": config(quantization_config=[1]),
    "scales missing": without(SCALES),
    "blocks missing": without(BLOCKS),
    "down missing": changed(lambda t: (t.pop(DOWN), t.pop(f"{EXPERT}.down_proj_scales"))),
    "one bias missing": without(BIAS),
    "scales of another count": replaced(SCALES, lambda t: t[..., :-1]),
    "scales of fewer experts": replaced(SCALES, lambda t: t[:-1]),
    "blocks of another width": replaced(BLOCKS, lambda t: t[..., :8]),
    "blocks of another dtype": replaced(BLOCKS, lambda t: t.to(torch.int8)),
    "scales of another dtype": replaced(SCALES, lambda t: t.to(torch.bfloat16)),
    "blocks without groups": replaced(BLOCKS, lambda t: t.flatten(2)),
    "bias of another length": replaced(BIAS, lambda t: t[:, :-2]),
    "fewer experts in down": changed(
        lambda t: t.update({k: t[k][:-1] for k in (DOWN, f"{EXPERT}.down_proj_scales")})
    ),
    "an unknown tensor among the experts": added(f"{EXPERT}.gate_up_proj_shadow", 4),
    "experts twice": added(f"{EXPERT}.gate_up_proj", 4, 64, 128),
    "scales of nothing": added("model.layers.0.self_attn.q_proj.weight_scale_inv", 1, 1),
    "a weight of 8-bit floats without scales": replaced(
        "lm_head.weight", lambda t: t.to(torch.float8_e4m3fn)
    ),
    "file cut in its data": cut(-3),
    "file cut in its header": cut(100),
    "file of 4 bytes": cut(4),
    "empty file": cut(0),
    "data after the end": lambda root: (root / SOURCE).open("ab").write(b"x"),
    "header longer than the file": text(SOURCE, b"\xff" * 64),
    "header is no JSON": text(SOURCE, struct.pack("<Q", 8) + b"notjson!"),
    "overlapping tensors": header(lambda h: h[NORM].update(data_offsets=[0, 128])),
    "a hole in the data": header(lambda h: h.pop(NORM)),
    "offsets the wrong way round": header(lambda h: h[NORM]["data_offsets"].reverse()),
    "an unknown dtype": header(lambda h: h[NORM].update(dtype="F5")),
    "a shape that does not fit": header(lambda h: h[NORM].update(shape=[65])),
    "a negative extent": header(lambda h: h[NORM].update(shape=[-64])),
    "a name with control characters": header(lambda h: h.update({"a\nb": h.pop(NORM)})),
    "index names a missing file": indexed({"a": "b.safetensors"}),
    "index leads outside": indexed({NORM: "../src/model.safetensors"}),
    "index leads to an absolute path": indexed({NORM: "/etc/passwd"}),
    "index misses a tensor": indexed({NORM: SOURCE}),
    "index is no JSON": text("model.safetensors.index.json", "]"),
    "a directory instead of the file": instead(Path.mkdir),
    "a link to nothing": instead(lambda path: path.symlink_to("gone")),
    "only pickles": lambda root: (root / SOURCE).rename(root / "pytorch_model.bin"),
    "the same tensor in two files": twice,
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_input_is_a_typed_error_and_writes_nothing(name: str, tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "src", "gptoss-mxfp4").root
    assert api.plan(root).files  # sound until it is broken
    BROKEN[name](root)
    out = tmp_path / "out"
    for layout in ("hf", "vllm"):
        with pytest.raises(BadSource) as caught:
            convert(root, out, layout=layout)
        assert caught.value.exit_code == 4
        assert caught.value.what
        assert "\n" not in caught.value.what
    assert not out.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"src"}


def test_there_are_many_kinds_of_broken_input() -> None:
    assert len(BROKEN) >= 40


USAGE: list[dict[str, Any]] = [
    {"layout": "onnx"},
    {"tp": 0},
    {"dp": -1},
    {"tp": True},
    {"tp": "2"},
    {"placement": "random"},
    {"uneven": "drop"},
    {"vllm_names": "old"},
    {"nonfinite": "zero"},
    {"dense_dtype": "fp8"},
    {"orientation": "left"},
    {"redundant_experts": -2},
    {"pad_intermediate": 0},
    {"pad_hidden": -8},
    {"max_file_size": 0},
    {"include": "*gate*"},
]


@pytest.mark.parametrize("options", USAGE)
def test_values_that_options_never_take(options: dict[str, Any], tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "src", "mixtral").root
    with pytest.raises(UsageError) as caught:
        convert(root, tmp_path / "out", **({"layout": "vllm", "ep": True} | options))
    assert caught.value.exit_code == 2
    assert f"--{next(iter(options)).replace('_', '-')}" in caught.value.what
    assert not (tmp_path / "out").exists()


REFUSED: list[dict[str, Any]] = [
    {"tp": 2},
    {"ep": True},
    {"ranks": (0,)},
    {"uneven": "pad"},
    {"pad_hidden": 64},
    {"vllm_names": "plain"},
    {"dtype": "int4"},
    {"layers": (1,)},
    {"layers": (-1,)},
    {"include": ("nothing*",)},
    {"exclude": ("*",)},
]


@pytest.mark.parametrize("options", REFUSED)
def test_options_that_do_not_go_with_hf(options: dict[str, Any], tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "src", "mixtral").root
    with pytest.raises(Refused) as caught:
        convert(root, tmp_path / "out", **options)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "gone", tmp_path / "gone" / SOURCE):
        with pytest.raises(UsageError) as caught:
            api.plan(path)
        assert caught.value.exit_code == 2


OTHERS = [{"dtype": "fp32"}, {"layers": (0,)}, {"layout": "vllm"}, {"nonfinite": "keep"}]


def test_a_plan_is_the_same_wherever_and_however_often(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "src", "gptoss-mxfp4")
    shutil.copytree(checkpoint.root, tmp_path / "copy")
    digests = {api.plan(root).digest for root in (checkpoint.root, tmp_path / "copy")}
    assert digests == {api.plan(checkpoint.root).digest}
    others = [api.plan(checkpoint.root, **options).digest for options in OTHERS]
    assert len({*others, *digests}) == 5
    assert api.plan(checkpoint.root, layout="vllm", ranks=(0,)).digest == others[2]


def test_planning_writes_nothing(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "src", "mixtral")
    before = files_of(checkpoint.root)
    api.plan(checkpoint.root, tmp_path / "out", layout="vllm", tp=2)
    assert {path.name for path in tmp_path.iterdir()} == {"src"}
    assert files_of(checkpoint.root) == before


def test_a_source_that_shrinks_while_converting_is_an_error(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "src", "mixtral")
    plan = api.plan(checkpoint.root)
    cut(-400)(checkpoint.root)
    with pytest.raises(MoeconvError, match="changed while reading") as caught:
        api.convert(plan, tmp_path / "out")
    assert caught.value.exit_code == 4
    assert not (tmp_path / "out" / "config.json").exists()
    save(
        checkpoint.root, json.loads((checkpoint.root / "config.json").read_text()), checkpoint.form
    )
    assert api.convert(plan, tmp_path / "out").state == "converted"
