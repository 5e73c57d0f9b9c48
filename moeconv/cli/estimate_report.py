"""Estimate -> what `plan` and `bench` say of it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from moeconv.cli.tables import Printer
from moeconv.convert import chosen_files
from moeconv.device.driver import Card
from moeconv.estimate import (
    DECODE,
    DEVICE,
    DOWN,
    MEMORY,
    READ,
    START,
    UP,
    WRITE,
    Bound,
    Estimate,
    Place,
    estimate,
)
from moeconv.measure.disk import cached_share, disk_id
from moeconv.measure.figures import Disk, Figures
from moeconv.plan import Plan
from moeconv.tasks import Task
from moeconv.types import Json
from moeconv.workload import workload_of

LIMITS: Mapping[str, str] = {
    START: "starting and ending take most of it",
    READ: "the disk's reading at {rate} is the limit",
    WRITE: "the disk's writing at {rate} is the limit",
    DECODE: "decoding at {rate} of output is the limit",
    MEMORY: "memory at {rate} is the limit",
    UP: "copying to the GPU at {rate} is the limit",
    DEVICE: "the GPU's decoding at {rate} of output is the limit",
    DOWN: "copying from the GPU at {rate} is the limit",
}
_UNITS = (("h", 3600.0), ("min", 60.0))


class Means(NamedTuple):
    """What a run may use: where to write, tasks in flight, the GPUs that decode."""

    dst: Path
    jobs: int
    cards: tuple[Card, ...]


def estimate_plan(
    plan: Plan, tasks: Sequence[Task], figures: Figures, means: Means
) -> Estimate | None:
    """Return how long a plan takes; None where a disk or the GPU was not measured."""
    cards = means.cards
    work = workload_of(plan, tasks, frozenset(chosen_files(plan)), gpu=bool(cards))
    sources = plan.model.source.files.values()
    names = [disk_id(path) for path in (next(iter(sources)), means.dst)]
    source, output = (figures.disks.get(name, Disk()) for name in names)
    place = Place(
        source,
        output,
        means.jobs,
        figures.devices.get(cards[0].name) if cards else None,
        len(cards),
        shared=names[0] == names[1],
        cached=cached_share(sources),
    )
    return estimate(work, figures, place)


def describe_estimate(found: Estimate) -> dict[str, Json]:
    """Return an estimate as JSON values."""
    return {
        "seconds": round(found.seconds, 3),
        "duration": duration(found),
        "limit": found.limit.name,
        "reason": reason(found),
        "bounds": [
            {
                "name": bound.name,
                "nbytes": bound.nbytes,
                "seconds": round(bound.seconds, 3),
                "gb_per_second": round(bound.gb_per_second, 3),
            }
            for bound in found.bounds
        ],
        "lacking": list(found.lacking),
    }


def reason(found: Estimate) -> str:
    """Return what decides how long it takes."""
    if found.lacking:
        return f"decoding {', '.join(found.lacking)} was not measured and is not in it"
    return LIMITS[found.limit.name].format(rate=f"{found.limit.gb_per_second:.1f} GB/s")


def duration(found: Estimate) -> str:
    """Return how long it takes, to two digits: about 3.1 min."""
    return f"{'more than' if found.lacking else 'about'} {rough(found.seconds)}"


def plan_line(facts: Json) -> str:
    """Return what a plan says of its time; "" where nothing would be written."""
    found = facts["estimate"]
    if facts["action"] == "finished" or (found is None and facts["action"] == "refused"):
        return ""
    if found is None:
        source, dst = shlex.quote(facts["source"]["path"]), shlex.quote(facts["dst"])
        return f"none yet: moeconv bench {source} --dst {dst} measures this machine for it"
    of = " for all of it" if facts["action"] == "continue" else ""
    return f"{found['duration']}{of}: {found['reason']}"


def print_estimate(found: Estimate, printer: Printer) -> None:
    """Print what each part would take alone, and the estimate."""
    printer.table(
        ("what", ">bytes", ">GB/s", ">alone"),
        [_cells(bound) for bound in found.bounds],
    )
    printer.line(f"estimate: {duration(found)}: {reason(found)}")


def _cells(bound: Bound) -> tuple[str, ...]:
    from moeconv.store.space import human

    if not bound.nbytes:
        return bound.name, "", "", f"{bound.seconds:.1f} s"
    return (
        bound.name,
        human(bound.nbytes),
        f"{bound.gb_per_second:.1f}",
        f"{bound.seconds:.1f} s",
    )


def rough(seconds: float) -> str:
    """Return a duration to two digits, which is more than an estimate can promise."""
    for unit, length in _UNITS:
        if seconds >= 0.995 * length:
            amount = seconds / length
            return f"{amount:.0f} {unit}" if amount >= 9.95 else f"{amount:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
