"""What an output directory holds: nothing, an output of ours (finished or not), or another's."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moeconv.errors import Refused, VerifyFailed
from moeconv.plan import FORMAT_VERSION, Plan, option_facts
from moeconv.store.lock import LOCK_NAME, STATE_DIRECTORY
from moeconv.store.writer import partial_path, write_small_file
from moeconv.types import Json

MANIFEST = "moeconv.json"
STARTED = "plan.json"
# What a manifest says of the plan that made it, beside its files.
IDENTITY = ("format", "plan", "source", "options", "auxiliary", "configs")


@dataclass(frozen=True, slots=True)
class Found:
    """The state of a directory; `facts` are its manifest's or its started plan's."""

    state: str  # "nothing" | "finished" | "unfinished" | "foreign"
    facts: Mapping[str, Json]


def examine(dst: Path) -> Found:
    """Return what `dst` holds; Refused if it is no directory, or one that cannot be read."""
    try:
        return _examine(dst)
    except OSError as error:
        raise Refused(
            f"DST cannot be read: {error.strerror}", where=str(dst), hint="choose another directory"
        ) from error


def _examine(dst: Path) -> Found:
    if not dst.exists() and not dst.is_symlink():
        return Found("nothing", {})
    if not dst.is_dir():
        raise Refused("DST is not a directory", where=str(dst), hint="choose a new directory")
    names = {entry.name for entry in dst.iterdir()}
    started = _read(dst / STATE_DIRECTORY / STARTED)
    if started is not None:
        return Found("unfinished", started)
    finished = _read(dst / MANIFEST)
    if finished is not None and "plan" in finished and "files" in finished:
        return Found("finished", finished)
    if names <= {STATE_DIRECTORY} and _only_lock(dst / STATE_DIRECTORY):
        return Found("nothing", {})
    return Found("foreign", {})


def _only_lock(directory: Path) -> bool:
    if not directory.is_dir():
        return not directory.exists()
    return {entry.name for entry in directory.iterdir()} <= {LOCK_NAME, f"{STARTED}.partial"}


def _read(path: Path) -> Mapping[str, Json] | None:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def facts_of(plan: Plan) -> dict[str, Json]:
    """Return what identifies a plan in a manifest or a started run."""
    return {
        "format": FORMAT_VERSION,
        "plan": plan.digest,
        "source": plan.model.source.fingerprint,
        "options": dict(option_facts(plan.options)),
        "files": [file.name for file in plan.files],
        "auxiliary": list(plan.auxiliary),
    }


def decide(found: Found, plan: Plan, dst: Path, *, overwrite: bool) -> str:
    """Return "convert", "continue" or "finished"; Refused by the rerun table."""
    if found.state == "foreign":
        raise Refused(
            "DST holds files that moeconv did not write",
            where=str(dst),
            hint="choose an empty or new directory; --overwrite never removes others' files",
        )
    if found.state == "nothing":
        return "convert"
    if overwrite:
        return "replace"
    difference = _difference(found.facts, facts_of(plan))
    if difference:
        raise Refused(
            f"DST holds {'a' if found.state == 'finished' else 'an'} {found.state} output of "
            f"another conversion: {difference}",
            where=str(dst),
            hint="--overwrite replaces it; or choose another directory",
        )
    return "finished" if found.state == "finished" else "continue"


def _difference(there: Mapping[str, Json], now: Mapping[str, Json]) -> str:
    """Return in words how two plans differ, "" if they do not."""
    if there.get("format") != now["format"]:
        return f"format version {there.get('format')} there, {now['format']} now"
    if there.get("source") != now["source"]:
        return "made from another source (or the source has changed)"
    old = there.get("options")
    options = old if isinstance(old, dict) else {}
    changed = [
        f"--{name.replace('_', '-')} {options.get(name)!r} there, {value!r} now"
        for name, value in now["options"].items()
        if options.get(name) != value
    ]
    if changed:
        return "; ".join(changed)
    return "" if there.get("plan") == now["plan"] else "made by a release that plans differently"


def check_finished(found: Found, dst: Path) -> None:
    """Raise VerifyFailed unless every file of a finished output has its size."""
    for file in found.facts["files"]:
        path = dst / file["name"]
        actual = path.stat().st_size if path.is_file() else None
        if actual != file["nbytes"]:
            raise VerifyFailed(
                f"{file['name']} has {'no file' if actual is None else f'{actual} bytes'}; "
                f"the manifest says {file['nbytes']}",
                where=str(path),
                hint="--overwrite converts anew",
            )


def start(dst: Path, plan: Plan) -> None:
    """Write down what is being made, so that a rerun knows it."""
    _mark(dst, facts_of(plan))


def _mark(dst: Path, facts: Mapping[str, Json]) -> None:
    data = json.dumps(facts, indent=1, sort_keys=True).encode()
    write_small_file(dst / STATE_DIRECTORY / STARTED, data)


def remove_output(found: Found, dst: Path) -> None:
    """Remove what moeconv wrote; other files stay.

    It is marked as unfinished first, until the next `start`: cut short, it can be done again.
    """
    facts = found.facts
    files = [file["name"] if isinstance(file, dict) else str(file) for file in facts["files"]]
    if found.state == "finished":
        _mark(dst, {**{name: facts.get(name) for name in IDENTITY}, "files": files})
    hide(dst)
    names = [*files, *(facts.get("auxiliary") or ()), *(facts.get("configs") or ())]
    for name in names:
        if Path(name).name != name:
            continue
        for path in (dst / name, partial_path(dst / name)):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
    with contextlib.suppress(FileNotFoundError):
        (dst / STATE_DIRECTORY / "journal").unlink()


def hide(dst: Path) -> None:
    """Remove what makes a directory a model or a finished output: it is about to be neither."""
    for name in ("config.json", "model.safetensors.index.json", MANIFEST):
        with contextlib.suppress(FileNotFoundError):
            (dst / name).unlink()


def finish(dst: Path) -> None:
    """Remove the state directory: from now on the output is finished."""
    with contextlib.suppress(FileNotFoundError):
        (dst / STATE_DIRECTORY / STARTED).unlink()
    shutil.rmtree(dst / STATE_DIRECTORY, ignore_errors=True)
