"""What an output directory holds: nothing, an output of ours (finished or not), or another's."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moeconv.digest import bytes_digest
from moeconv.errors import Refused, VerifyFailed
from moeconv.ownership import (
    is_manifest,
    is_started,
    is_undamaged,
    own_names,
    read_object,
    strangers,
)
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
    """The state of a directory; `facts` are its manifest's or its started plan's.

    Damaged: moeconv wrote it, but what it wrote down of it can no longer be believed. `strangers`:
    files of others that a loader would read with the output; those that no loader reads (a README,
    logs, hidden files) may lie in an output, and are left alone.
    """

    state: str  # "nothing" | "finished" | "unfinished" | "damaged" | "foreign"
    facts: Mapping[str, Json]
    strangers: tuple[str, ...] = ()


def examine(dst: Path) -> Found:
    """Return what `dst` holds; Refused if it is no directory, or one that cannot be read."""
    try:
        return _examine(dst)
    except OSError as error:
        raise Refused(
            f"the directory cannot be read: {error.strerror}",
            where=str(error.filename or dst),
            hint="check its permissions, or choose another directory",
        ) from error


def _examine(dst: Path) -> Found:
    if not dst.exists() and not dst.is_symlink():
        return Found("nothing", {})
    if not dst.is_dir():
        raise Refused("DST is not a directory", where=str(dst), hint="choose a new directory")
    names = {entry.name for entry in dst.iterdir()}
    started = read_object(dst / STATE_DIRECTORY / STARTED)
    if started is not None and is_started(started):
        return Found("unfinished", started, strangers(dst, started))
    if (dst / STATE_DIRECTORY / STARTED).exists():
        return Found("damaged", {})
    finished = read_object(dst / MANIFEST)
    if finished is not None and is_manifest(finished):
        if finished["format"] == FORMAT_VERSION and not is_undamaged(finished):
            return Found("damaged", {})
        return Found("finished", finished, strangers(dst, finished))
    if names <= {STATE_DIRECTORY} and _only_lock(dst / STATE_DIRECTORY):
        return Found("nothing", {})
    return Found("damaged" if (dst / STATE_DIRECTORY / "journal").is_file() else "foreign", {})


def _only_lock(directory: Path) -> bool:
    if not directory.is_dir():
        return not directory.exists()
    return {entry.name for entry in directory.iterdir()} <= {LOCK_NAME, f"{STARTED}.partial"}


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
    """Return "convert", "continue", "replace" or "finished"; Refused by the rerun table."""
    refuse_strangers(found, dst)
    if found.state == "damaged":
        raise Refused(
            "DST holds an output of which moeconv's own record is damaged",
            where=str(dst),
            hint="remove the directory yourself and convert anew; or choose another directory",
        )
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


def refuse_strangers(found: Found, dst: Path) -> None:
    """Raise Refused for an output among files that a loader would read with it."""
    if not found.strangers:
        return
    more = f" and {len(found.strangers) - 5} more" if len(found.strangers) > 5 else ""
    raise Refused(
        "DST holds files that moeconv did not write, and that loaders would read with its own: "
        + ", ".join(found.strangers[:5])
        + more,
        where=str(dst),
        hint="remove them or move them elsewhere; moeconv never removes others' files",
    )


def _difference(there: Mapping[str, Json], now: Mapping[str, Json]) -> str:
    """Return in words how two plans differ, "" if they do not."""
    if there.get("format") != now["format"]:
        return f"format version {there.get('format')} there, {now['format']} now"
    if there.get("source") != now["source"]:
        return "made from another source (or the source has changed)"
    old = there.get("options")
    options = old if isinstance(old, dict) else {}
    changed = [
        f"{option_text(name, options.get(name))} there, {_value_text(value)} now"
        for name, value in now["options"].items()
        if options.get(name) != value
    ]
    if changed:
        return "; ".join(changed)
    return "" if there.get("plan") == now["plan"] else "made by a release that plans differently"


def option_text(name: str, value: Json) -> str:
    """Return an option as the command line writes it: `--ep`, `--tp 2`, `no --layers`."""
    flag = f"--{name.replace('_', '-')}"
    if value is True:
        return flag
    return f"no {flag}" if value in (None, False, []) else f"{flag} {_value_text(value)}"


def _value_text(value: Json) -> str:
    """Return an option's value as the command line takes it, "not" without one."""
    if value is True:
        return "given"
    if value in (None, False, []):
        return "not"
    if not isinstance(value, list):
        return str(value)
    if all(isinstance(one, int) for one in value):
        return ",".join(str(one) for one in value)
    return " ".join(shlex.quote(one) if isinstance(one, str) else str(one) for one in value)


def check_finished(found: Found, dst: Path) -> None:
    """Raise VerifyFailed unless a finished output has all its files, data files in their sizes."""
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
    for name, digest in found.facts["beside"].items():
        path = dst / name
        empty = path.is_file() and path.stat().st_size == 0 and digest != bytes_digest(b"")
        if empty or not path.is_file():
            raise VerifyFailed(
                f"{name} is {'empty' if empty else 'missing'}; the manifest says otherwise",
                where=str(path),
                hint="restore it from a copy; or --overwrite converts anew",
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
    for name in own_names(facts):
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
