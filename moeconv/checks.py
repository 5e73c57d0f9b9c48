"""What can be checked of an output without reading its data: names, sizes, headers, configs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moeconv.commit import INDEX, output_configs
from moeconv.destination import MANIFEST
from moeconv.digest import bytes_digest, file_digest
from moeconv.errors import BadHeader, BadSource, IOFailed
from moeconv.findings import REMOVE, Findings
from moeconv.finished import Finished, RecordedFile
from moeconv.manifest import accounting_facts, dump_json
from moeconv.ownership import is_for_loaders
from moeconv.plan import Plan
from moeconv.store.safetensors import Header, read_header
from moeconv.store.shards import read_whole
from moeconv.store.strictjson import JsonProblem, parse_object
from moeconv.types import Json

_SUFFIX = ".safetensors"
_MAX_INDEX_NBYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Files:
    """What the data files are: headers of those that can be parsed, bytes of those there."""

    headers: Mapping[str, Header]
    sizes: Mapping[str, int]


def check_files(finished: Finished, findings: Findings) -> Files:
    """Return what the data files are; their presence, sizes, headers and tensors checked."""
    headers: dict[str, Header] = {}
    sizes: dict[str, int] = {}
    for file in finished.files:
        path = finished.root / file.name
        if not path.is_file():
            findings.problem("the file is missing", file.name)
            continue
        sizes[file.name] = path.stat().st_size
        header = _check_file(path, file, sizes[file.name], findings)
        if header is not None:
            headers[file.name] = header
    recorded = sum(file.tensors for file in finished.files)
    said = finished.facts["accounting"].get("output_tensors")
    if said != recorded:
        findings.problem(f"the files have {recorded} tensors, the accounting {said}", MANIFEST)
    return Files(headers, sizes)


def _check_file(
    path: Path, file: RecordedFile, actual_nbytes: int, findings: Findings
) -> Header | None:
    if actual_nbytes != file.nbytes:
        what = f"the file has {actual_nbytes} bytes; the manifest says {file.nbytes}"
        findings.problem(what, file.name)
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        raise IOFailed(
            f"the file cannot be read: {error.strerror}",
            where=str(path),
            hint="check its permissions and the disk, then verify again",
        ) from error
    try:
        header = read_header(path, file.name)
    except BadHeader as error:
        findings.problem(error.what, error.where)
        return None
    if len(header.tensors) != file.tensors:
        what = f"the file has {len(header.tensors)} tensors; the manifest says {file.tensors}"
        findings.problem(what, file.name)
    return header


def check_index(finished: Finished, files: Files, findings: Findings) -> None:
    """Check that the index lists exactly the tensors that the headers have, and their bytes."""
    path = finished.root / INDEX
    readable = len(files.headers) == len(finished.files) and path.is_file()
    if INDEX not in finished.beside or not readable:
        return
    refs = [(ref, name) for name, header in files.headers.items() for ref in header.tensors]
    expected = {
        "metadata": {"total_size": sum(ref.nbytes for ref, _ in refs)},
        "weight_map": {ref.name: name for ref, name in refs},
    }
    try:
        if parse_object(read_whole(path, INDEX, _MAX_INDEX_NBYTES)) != expected:
            findings.problem("the index does not list exactly the tensors of the files", INDEX)
    except JsonProblem as problem:
        findings.problem(f"the index {problem}", INDEX)
    except BadSource as error:
        findings.problem(error.what, INDEX)


def check_beside(finished: Finished, findings: Findings) -> None:
    """Check the files beside the weights, and name those that moeconv did not write."""
    for name, digest in finished.beside.items():
        path = finished.root / name
        if not path.is_file():
            findings.problem("the file is missing", name)
        elif file_digest(path) != digest:
            findings.problem("the file is not the one that was written", name)
    known = {MANIFEST, *finished.beside, *(file.name for file in finished.files)}
    with os.scandir(finished.root) as entries:
        found = sorted((entry.name, entry.is_dir()) for entry in entries)
    for name, is_directory in found:
        if name in known:
            continue
        if is_directory:
            _check_below(finished, name, findings)
        elif name.lower().endswith(_SUFFIX):
            what = "moeconv did not write this file; loaders read every .safetensors file here"
            findings.problem(what, name, REMOVE)
        elif is_for_loaders(name):
            what = "moeconv did not write this file; loaders would take the output for that model"
            findings.problem(what, name, REMOVE)
        else:
            findings.note(f"moeconv did not write {name}")


def _check_below(finished: Finished, name: str, findings: Findings) -> None:
    """Name weights in a sub-directory: kt-kernel reads those too, by their names alone."""
    if not any((finished.root / name).rglob(f"*{_SUFFIX}")):
        return
    what = f"moeconv did not write the {_SUFFIX} files in this sub-directory"
    if finished.layout == "ktransformers":
        findings.problem(f"{what}; kt-kernel reads them too", name, REMOVE)
    else:
        findings.note(f"{what}: {name}")


def check_facts(finished: Finished, plan: Plan, findings: Findings) -> None:
    """Check the manifest, headers, configs and copies against the plan made again."""
    expected: dict[str, Json] = {
        "accounting": accounting_facts(plan.accounting),
        "layout_facts": dict(plan.facts),
        "layout": plan.options.layout,
        "family": plan.model.family.name,
        "partial": plan.options.partial,
    }
    for name, value in expected.items():
        if dump_json(finished.facts[name]) != dump_json(value):
            findings.problem(f"'{name}' is not what the source gives", MANIFEST)
    for file, recorded in zip(plan.files, finished.files, strict=False):
        same = file.name == recorded.name and file.nbytes == recorded.nbytes
        if not same or recorded.segments[0].digest != bytes_digest(file.header):
            findings.problem("the file is not laid out as the source gives it", recorded.name)
    if len(plan.files) != len(finished.files):
        findings.problem(f"{len(finished.files)} files, not {len(plan.files)}", MANIFEST)
    if not plan.is_model:
        return
    for name, config in output_configs(plan).items():
        if finished.beside.get(name) != bytes_digest(dump_json(config)):
            findings.problem("the file is not what the source gives", name)
    for name in plan.auxiliary:
        if finished.beside.get(name) != file_digest(plan.model.source.root / name):
            findings.note(f"{name} is not the source's, which may have been edited since")
