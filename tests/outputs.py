"""Finished outputs for the tests that read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moeconv.convert import convert_plan
from moeconv.digest import json_digest
from moeconv.layouts.options import Options
from moeconv.manifest import dump_json
from moeconv.model import build_model
from moeconv.plan import build_plan
from moeconv.resources import Resources
from moeconv.store.source import open_source


def convert(source: Path, dst: Path, **options: Any) -> Path:
    """Convert a checkpoint into the new directory `dst` and return that."""
    chosen = Options(**options)
    plan = build_plan(build_model(open_source(source), orientation=chosen.orientation), chosen)
    convert_plan(plan, dst, Resources(jobs=1))
    return dst


def rewrite_manifest(dst: Path, **changes: Any) -> None:
    """Change fields of a manifest and give it the digest that it then has."""
    facts = json.loads((dst / "moeconv.json").read_bytes())
    facts |= changes
    del facts["digest"]
    facts["digest"] = json_digest(facts)
    (dst / "moeconv.json").write_bytes(dump_json(facts))


def flip(path: Path, position: int, bit: int = 0) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1 << bit
    path.write_bytes(data)
