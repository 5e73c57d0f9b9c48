"""The end of a conversion: files get their names, manifest, index and config.json come last."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from moeconv.destination import MANIFEST, finish
from moeconv.digest import bytes_digest, file_digest, json_digest
from moeconv.errors import IOFailed
from moeconv.layouts.options import DTYPES
from moeconv.manifest import Outcome, build_manifest, dump_json
from moeconv.plan import Plan
from moeconv.quantization import strip_quantization, with_dtype
from moeconv.store.writer import OutputFile, copy_file, partial_path, write_small_file
from moeconv.types import Json

INDEX = "model.safetensors.index.json"
CONFIG_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
# Configs beside config.json that only speak of a quantization, and go with it.
QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json")
NATIVE_CONFIG = "params.json"


def commit(plan: Plan, dst: Path, outcome: Outcome) -> dict[str, Json]:
    """Complete an output whose tasks are all done; return the manifest.

    May be cut short anywhere and called again: until its last step DST counts as unfinished.
    """
    manifest = build_manifest(plan, outcome)
    configs = output_configs(plan) if plan.is_model else {}
    manifest["configs"] = sorted(configs)
    for file in plan.files:
        path = dst / file.name
        if partial_path(path).exists() or not path.exists():
            with OutputFile(path, file.nbytes, resume=True) as output:
                if not output.resumed:
                    raise IOFailed(
                        f"{output.partial.name} vanished while the output was being completed",
                        where=str(dst),
                        hint="the same command writes it again",
                    )
                output.commit()
    for name in plan.auxiliary:
        copy_file(plan.model.source.root / name, dst / name)
    manifest["beside"] = beside_digests(plan, dst, configs)
    manifest["digest"] = json_digest(manifest)
    write_small_file(dst / MANIFEST, dump_json(manifest))
    # A directory with config.json is a model: nothing may be missing when it appears.
    for name in sorted(configs, key=lambda name: (name == "config.json", name)):
        write_small_file(dst / name, dump_json(configs[name]))
    finish(dst)
    return manifest


def beside_digests(plan: Plan, dst: Path, configs: Mapping[str, Json]) -> dict[str, str]:
    """Return the xxh3-128 of every file beside the weights: configs to be written, copies made."""
    digests = {name: file_digest(dst / name) for name in plan.auxiliary}
    texts = {name: bytes_digest(dump_json(value)) for name, value in configs.items()}
    return dict(sorted({**digests, **texts}.items()))


def output_configs(plan: Plan) -> dict[str, Mapping[str, Json]]:
    """Return the config files of a whole output by name: index, params.json, config.json."""
    source, options = plan.model.source, plan.options
    configs: dict[str, Mapping[str, Json]] = {}
    if options.layout == "hf":
        configs[INDEX] = build_index(plan)
    kept = "quantization" in plan.facts or options.dtype == options.dense == "keep"
    if kept:
        for name in QUANTIZATION_FILES:
            if name in source.extra_configs:
                configs[name] = source.extra_configs[name]
    native = source.extra_configs.get(NATIVE_CONFIG)
    if isinstance(native, dict):
        configs[NATIVE_CONFIG] = native if kept else strip_quantization(native)
    if source.config:
        config = source.config if kept else strip_quantization(source.config)
        wanted = options.dense if options.dense != "keep" else options.dtype
        configs["config.json"] = (
            config if wanted == "keep" else with_dtype(config, CONFIG_DTYPES[DTYPES[wanted]])
        )
    return configs


def build_index(plan: Plan) -> dict[str, Json]:
    """Return the index of an hf output: every tensor's file, and the exact bytes of all tensors."""
    tensors = [(tensor, file.name) for file in plan.files for tensor in file.tensors]
    return {
        "metadata": {"total_size": sum(tensor.nbytes for tensor, _ in tensors)},
        "weight_map": dict(sorted((t.draft.name, file) for t, file in tensors)),
    }
