"""What each command says, to people and to scripts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from moeconv.codecs import CODECS
from moeconv.families.tables import FAMILIES
from moeconv.plan import LAYOUTS
from tests.cli.runs import Cli, contents, run_process

VLLM = ("--layout", "vllm", "--tp", "2")


def test_inspect_a_source(checkpoint: Path, cli: Cli) -> None:
    facts = cli("inspect", checkpoint, "--json").json
    assert facts["family"] == "gpt_oss"
    assert facts["layers"] == {"total": 2, "moe": [0, 1], "dense": []}
    assert facts["experts"] == [4]
    assert facts["sizes"]["hidden"] == 64
    assert facts["sizes"]["vocab"] == 128
    roles = {row["role"]: row for row in facts["roles"]}
    # 2 layers x 4 experts x 128 x 64 elements, 17 bytes for 32 of them
    assert roles["experts gate+up"]["codec"] == "mxfp4"
    assert roles["experts gate+up"]["nbytes"] == 2 * 4 * 128 * 64 * 17 // 32
    assert roles["experts gate+up"]["tensors"] == 4
    assert roles["experts down bias"]["nbytes"] == 2 * 4 * 64 * 2
    assert roles["embeddings"]["shapes"] == [[128, 64]]
    assert {"attention", "norms", "router", "output head"} <= set(roles)
    assert sum(row["nbytes"] for row in facts["roles"]) == facts["nbytes"]
    assert sum(row["tensors"] for row in facts["roles"]) == facts["tensors"]
    assert facts["auxiliary"] == ["generation_config.json"]
    assert any("E8M0" in oddity for oddity in facts["oddities"])

    text = cli("inspect", checkpoint).out
    assert "2, all with experts" in text
    assert "model.embed_tokens, lm_head (config.json: quantization_config)" in text


@pytest.mark.parametrize(
    ("name", "role", "codec"),
    [
        ("deepseekv3-fp8-block128", "experts gate", "fp8-block"),
        ("deepseekv3-bf16-mtp", "mtp: experts up", "float"),
        ("mixtral-bf16", "experts down", "float"),
        ("qwen3moe-gptq-int4-g128", "experts up", "gptq"),
        ("qwen3moe-bf16", "router", "float"),
        ("kimik2-int4-packed-g32", "shared experts", "float"),
    ],
)
def test_inspect_what_others_made(
    name: str, role: str, codec: str, fixtures: Path, cli: Cli
) -> None:
    facts = cli("inspect", fixtures / "checkpoints" / name, "--json").json
    assert (role, codec) in {(row["role"], row["codec"]) for row in facts["roles"]}
    text = cli("inspect", fixtures / "checkpoints" / name).out
    assert codec in text


def test_inspect_tells_oddities(fixtures: Path, cli: Cli) -> None:
    facts = cli("inspect", fixtures / "checkpoints" / "deepseekv3-bf16-mtp", "--json").json
    assert any(one.startswith("MTP layers") for one in facts["oddities"])


def test_plan_says_what_convert_then_does(checkpoint: Path, tmp_path: Path, cli: Cli) -> None:
    dst = tmp_path / "dst"
    planned = cli("plan", checkpoint, dst, *VLLM, "--json").json
    assert not dst.exists()
    assert planned["action"] == "convert"
    done = cli("convert", checkpoint, dst, *VLLM, "--json").json
    assert done["state"] == "converted"
    assert done["written_nbytes"] <= planned["nbytes"]
    assert {file["name"]: file["nbytes"] for file in planned["files"]} == {
        name: len(data) for name, data in contents(dst).items() if name.endswith(".safetensors")
    }
    manifest = json.loads((dst / "moeconv.json").read_bytes())
    assert planned["plan"] == manifest["plan"] == done["plan"]
    assert planned["accounting"] == manifest["accounting"] == done["accounting"]
    assert planned["serve"] == done["serve"]
    assert cli("plan", checkpoint, dst, *VLLM, "--json").json["action"] == "finished"


def test_plan_looks_at_what_the_output_directory_holds(
    checkpoint: Path, tmp_path: Path, cli: Cli
) -> None:
    dst = tmp_path / "dst"
    assert cli("convert", checkpoint, dst, *VLLM, "--ranks", "0").code == 0
    assert "continues it" in cli("plan", checkpoint, dst, *VLLM).out
    refused = cli("plan", checkpoint, dst, "--json")
    assert refused.code == 3
    assert refused.json["action"] == "refused"
    assert "--layout" in refused.json["error"]["what"]
    assert len(refused.json["files"]) == 1
    replaced = cli("plan", checkpoint, dst, "--overwrite")
    assert (replaced.code, "replaces it" in replaced.out) == (0, True)


def test_plan_names_the_memory_that_is_enough(checkpoint: Path, tmp_path: Path, cli: Cli) -> None:
    dst = tmp_path / "dst"
    words = ("convert", checkpoint, dst, "--jobs", "3", "--progress", "none")
    floor = cli("plan", *words[1:], "--json").json["memory"]["floor_nbytes"]
    assert cli(*words, "--memory", floor - 100).code == 3
    assert cli(*words, "--memory", floor + 100).code == 0


def test_convert_tells_people(checkpoint: Path, tmp_path: Path, cli: Cli) -> None:
    dst = tmp_path / "my dst"
    ran = cli("convert", checkpoint, dst, *VLLM, "--ep", "--progress", "none")
    assert ran.code == 0
    assert ran.err == ""
    lines = ran.out.splitlines()
    assert lines[1].startswith("✓ source: 41 tensors, ")
    assert "8 decoded or codec parts, 33 copied, 0 dropped" in lines[1]
    assert lines[2] == "✓ experts: 0 NaN, 0 Inf · manifest moeconv.json"
    serve = f"vllm serve '{dst}' --load-format sharded_state --tensor-parallel-size 2"
    assert f"  serve: {serve} --enable-expert-parallel" in lines
    assert f"  check: moeconv verify '{dst}' --source {checkpoint}" in lines
    assert "nonsense" in ran.out  # of another tensor-parallel size

    again = cli("convert", checkpoint, dst, *VLLM, "--ep")
    assert again.code == 0
    assert "already" in again.out


def test_convert_rank_by_rank(checkpoint: Path, tmp_path: Path, cli: Cli) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli("convert", checkpoint, whole, *VLLM).code == 0
    first = cli("convert", checkpoint, parts, *VLLM, "--ranks", "1")
    assert first.code == 0
    assert "complete ranks: 1 · missing: 0" in first.out
    assert "--ranks 0" in first.out
    assert not (parts / "config.json").exists()
    unfinished = cli("inspect", parts, "--json").json
    assert unfinished["state"] == "unfinished"
    assert cli("convert", checkpoint, parts, *VLLM, "--ranks", "0", "--json").json["state"] == (
        "converted"
    )
    assert contents(whole) == contents(parts)


def test_a_part_of_a_model_is_not_served(checkpoint: Path, tmp_path: Path, cli: Cli) -> None:
    facts = cli("convert", checkpoint, tmp_path / "x", "--experts-only", "--json").json
    assert facts["partial"] is True
    assert facts["serve"] is None
    assert facts["accounting"]["source"]["not selected"]["tensors"] > 0


def test_nan_and_inf_are_announced(checkpoint: Path, tmp_path: Path, cli: Cli) -> None:
    src = tmp_path / "src"
    shutil.copytree(checkpoint, src)
    index = json.loads((src / "model.safetensors.index.json").read_bytes())
    name = "model.layers.0.mlp.experts.down_proj_scales"
    file = src / index["weight_map"][name]
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin = json.loads(data[8 : 8 + length])[name]["data_offsets"][0] + 8 + length
    data[begin] = 255  # NaN in E8M0: 32 elements
    file.write_bytes(data)
    ran = cli("convert", src, tmp_path / "dst")
    assert ran.code == 0
    assert "! experts: 32 NaN, 0 Inf" in ran.out


def test_inspect_an_output(checkpoint: Path, tmp_path: Path, cli: Cli) -> None:
    dst = tmp_path / "dst"
    assert cli("convert", checkpoint, dst, *VLLM, "--ep", "--placement", "round-robin").code == 0
    facts = cli("inspect", dst, "--json").json
    assert facts["kind"] == "output"
    assert facts["state"] == "finished"
    assert facts["rank_experts"] == [[0, 2], [1, 3]]
    assert [file["state"] for file in facts["files"]] == ["complete", "complete"]
    text = cli("inspect", dst).out
    assert "--tp 2 --ep --placement round-robin" in text
    (dst / facts["files"][0]["name"]).unlink()
    assert cli("inspect", dst, "--json").json["files"][0]["state"] == "missing"


def test_ktransformers_tells_its_launch_arguments(fixtures: Path, tmp_path: Path, cli: Cli) -> None:
    src = fixtures / "checkpoints" / "deepseekv3-fp8-block128"
    words = (src, tmp_path / "x", "--layout", "ktransformers", "--dtype", "int8", "--numa", "1")
    arguments = f"--kt-weight-path {tmp_path / 'x'} --kt-method AMXINT8 --kt-threadpool-count 1"
    assert f"  serve: {arguments}\n" in cli("plan", *words).out


def test_a_manifest_that_was_changed_is_not_believed(
    checkpoint: Path, tmp_path: Path, cli: Cli
) -> None:
    dst = tmp_path / "dst"
    assert cli("convert", checkpoint, dst).code == 0
    manifest = json.loads((dst / "moeconv.json").read_bytes())
    manifest["experts"]["nan"] = 7
    (dst / "moeconv.json").write_text(json.dumps(manifest))
    assert cli("inspect", dst).code == 5


def test_an_hf_output_is_inspected_as_an_output(checkpoint: Path, tmp_path: Path, cli: Cli) -> None:
    assert cli("convert", checkpoint, tmp_path / "dst").code == 0
    assert cli("inspect", tmp_path / "dst", "--json").json["layout"] == "hf"


def test_verify(checkpoint: Path, tmp_path: Path, cli: Cli) -> None:
    dst = tmp_path / "dst"
    ran = cli("convert", checkpoint, dst, "--verify", "deep", "--json")
    assert ran.code == 0
    assert ran.json["verify"]["ok"] is True
    assert ran.json["verify"]["rederived"]["tensors"] == ran.json["accounting"]["output_tensors"]
    assert cli("verify", dst, "--json").json["sample"] is None
    sampled = cli("verify", dst, "--source", checkpoint, "--sample", "50%", "--json").json
    assert sampled["sample"] == 0.5

    file = next(dst.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    damaged = cli("verify", dst)
    assert damaged.code == 5
    assert "damaged" in damaged.out
    assert "--overwrite" in damaged.err
    as_json = cli("verify", dst, "--json")
    assert as_json.code == as_json.json["exit_code"] == 5
    assert as_json.json["problems"]
    broken = cli("convert", checkpoint, dst, "--verify", "digest", "--json")
    assert broken.code == broken.json["exit_code"] == 5


def test_formats_lists_the_registries(cli: Cli) -> None:
    facts = cli("formats", "--json").json
    assert [one["name"] for one in facts["families"]] == [family.name for family in FAMILIES]
    assert [one["name"] for one in facts["codecs"]] == list(CODECS)
    assert [one["name"] for one in facts["layouts"]] == [layout.name for layout in LAYOUTS]
    assert all(one["meaning"] for one in facts["codecs"])
    ways = {one["name"]: (one["on_cpu"], one["on_gpu"]) for one in facts["codecs"]}
    assert ways["mxfp4"] == ("kernel", "kernel")
    assert ways["repeated"] == ("kernel", "cpu")
    assert ways["nf4"] == ("kernel", "kernel")
    text = cli("formats").out
    for name in (*CODECS, *(family.name for family in FAMILIES)):
        assert name in text


def test_demo(tmp_path: Path, cli: Cli) -> None:
    ran = cli("demo", tmp_path / "demo")
    assert ran.code == 0
    for command in ("inspect", "plan", "convert", "verify"):
        assert f"$ moeconv {command} {tmp_path / 'demo'}/" in ran.out
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == [
        "checkpoint",
        "hf",
        "vllm-tp2",
    ]
    assert cli("demo", tmp_path / "demo").code == 3


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "SRC"),
        ("plan", "SRC", "DST"),
        ("convert", "SRC", "DST"),
        ("formats",),
        ("demo",),
    ],
)
def test_quiet_prints_nothing(
    words: tuple[str, ...], checkpoint: Path, tmp_path: Path, cli: Cli
) -> None:
    paths: dict[str, Any] = {"SRC": checkpoint, "DST": tmp_path / "dst"}
    assert cli(*(paths.get(word, word) for word in words), "-q") == (0, "", "")
    quiet = cli(*(paths.get(word, word) for word in words), "-q", "--json")
    assert quiet.json
    assert quiet.err == ""


def test_what_is_piped_is_not_cut(checkpoint: Path, tmp_path: Path) -> None:
    src = tmp_path / ("a-long-name-" * 15)
    shutil.copytree(checkpoint, src)
    narrow = {"COLUMNS": "40", "PATH": "", "HOME": str(tmp_path)}
    ran = run_process("inspect", src, env=narrow)
    assert ran.code == 0
    assert str(src) in ran.out
    assert "\x1b" not in ran.out
    plan = run_process("plan", src, tmp_path / "dst", *VLLM, env=narrow)
    assert "model-rank-0-part-0.safetensors" in plan.out
    assert plan.out.count("--tensor-parallel-size 2\n") == 1
