"""Figures kept between runs, as JSON in the user's cache directory, one file per machine."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import replace
from pathlib import Path

from moeconv import __version__
from moeconv.errors import IOFailed
from moeconv.kernels.cpu.cache import cache_directory, version_key
from moeconv.measure.figures import Disk, Figures, as_json, from_json
from moeconv.store.space import cpu_count
from moeconv.store.strictjson import JsonProblem, parse_object
from moeconv.store.writer import write_small_file


def machine_key() -> str:
    """Return 16 hex digits that name what the figures are true of.

    The kernels, the CPU, how many threads run at once, this release, and the machine's name: home
    directories are shared.
    """
    facts = (version_key(), __version__, platform.node(), cpu_count())
    return hashlib.blake2b(repr(facts).encode(), digest_size=8).hexdigest()


def stored_path() -> Path | None:
    """Return where this machine's figures are kept; None where nothing can be."""
    directory = cache_directory()
    return None if directory is None else directory.parent / f"machine-{machine_key()}.json"


def load_figures() -> Figures | None:
    """Return this machine's figures; None where there are none that can be understood."""
    path = stored_path()
    try:
        return None if path is None else from_json(parse_object(path.read_bytes()))
    except (OSError, JsonProblem):
        return None


def save_figures(figures: Figures) -> Path | None:
    """Keep figures, with those kept before of other disks and GPUs; None where that fails."""
    path, before = stored_path(), load_figures()
    if path is None:
        return None
    disks = dict(before.disks if before else {})
    disks |= {name: one.over(disks.get(name, Disk())) for name, one in figures.disks.items()}
    devices = {**(before.devices if before else {}), **figures.devices}
    try:
        text = json.dumps(as_json(replace(figures, disks=disks, devices=devices)), indent=1)
        write_small_file(path, text.encode() + b"\n")
    except IOFailed:  # a full disk: the next run measures again
        return None
    return path
