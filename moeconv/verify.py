"""Is an output complete, undamaged, and what its source gives?"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moeconv.checks import Files, check_beside, check_facts, check_files, check_index
from moeconv.destination import MANIFEST
from moeconv.errors import UsageError, VerifyFailed
from moeconv.findings import Findings, Problem
from moeconv.finished import Finished, read_finished
from moeconv.layouts.options import Options
from moeconv.model import build_model
from moeconv.parallel import in_threads
from moeconv.plan import Plan, build_plan
from moeconv.reread import Unit, damaged_segments, tensors_within, units_of
from moeconv.store import system
from moeconv.store.reader import Reader
from moeconv.store.source import open_source
from moeconv.store.space import cpu_count
from moeconv.types import Json

if TYPE_CHECKING:
    from moeconv.execute import Progress

SHOWN_TENSORS = 3
OTHER_FILES = 64  # that a process has open besides

Name = str | PathLike[str]


class Reread(NamedTuple):
    """Segments of data files that were read again, and their bytes."""

    segments: int = 0
    nbytes: int = 0


class Rederived(NamedTuple):
    """What was derived once more from the source and compared: tensors (whole or in part)."""

    tensors: int = 0
    elements: int = 0
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """What was checked and what is wrong.

    `sample`: the share that was to be derived from the source, None without one. `more_problems`:
    how many are not listed.
    """

    files: int
    tensors: int
    reread: Reread
    sample: float | None
    rederived: Rederived
    problems: tuple[Problem, ...]
    more_problems: int
    notes: tuple[str, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        return not self.problems

    def require_ok(self) -> None:
        """Raise VerifyFailed with the first problem, if there is one."""
        if self.ok:
            return
        first = self.problems[0]
        more = len(self.problems) - 1 + self.more_problems
        raise VerifyFailed(
            first.what + (f" (and {more} more problems)" if more else ""),
            where=first.where,
            hint=first.hint,
        )


@dataclass(frozen=True, slots=True)
class Effort:
    """What a verification may use, and who hears of its progress; it changes no result.

    `memory_nbytes` bounds what is derived at once; None: 1 GiB, or half of what is free where that
    is less. `jobs` None: as many threads as cores. Fewer derive where they would need more memory.
    """

    memory_nbytes: int | None = None
    jobs: int | None = None
    progress: Callable[[Progress], None] | None = None

    @property
    def threads(self) -> int:
        return self.jobs or cpu_count()


def verify(
    dst: Name,
    source: Name | None = None,
    sample: float = 1.0,
    *,
    config: Name | None = None,
    effort: Effort | None = None,
) -> Report:
    """Return whether an output is complete and undamaged and, with its source, right.

    `sample`: the share of the output that is derived once more from the source. `config` as in the
    conversion. VerifyFailed where there is nothing to check: DST is unfinished, its manifest is
    damaged, or the source is another one.
    """
    if not 0 < sample <= 1:
        raise UsageError(f"a sample of {sample} is not above 0 and at most 1", hint="5% is 0.05")
    begin = time.monotonic()
    effort = effort or Effort()
    finished = read_finished(Path(dst))
    plan = None
    if source is not None:
        plan = recorded_plan(finished, Path(source), Path(config) if config is not None else None)
    findings = Findings(effort.progress)
    files = check_files(finished, findings)
    check_index(finished, files, findings)
    check_beside(finished, findings)
    deep = None
    if plan is not None:
        check_facts(finished, plan, findings)
        deep = _Deep(finished, plan, files, sample, effort)
        findings.expect(*deep.work())
    reread = _read_again(finished, files, effort.threads, findings)
    rederived = deep.run(findings) if deep is not None else Rederived()
    return Report(
        len(finished.files),
        sum(file.tensors for file in finished.files),
        reread,
        sample if deep is not None else None,
        rederived,
        tuple(findings.problems),
        findings.more_problems,
        tuple(findings.notes),
        time.monotonic() - begin,
    )


def recorded_plan(finished: Finished, source: Path, config: Path | None) -> Plan:
    """Return the plan of a finished output, made again; VerifyFailed if it is not the same."""
    opened = open_source(source, config=config)
    facts = finished.facts
    if opened.fingerprint != facts["source"]:
        raise VerifyFailed(
            "DST was made from another source, or the source has changed since",
            where=str(source),
            hint="give the source (and --config) that it was converted from",
        )
    options = recorded_options(facts["options"])
    model = build_model(opened, orientation=options.orientation, experts_only=options.experts_only)
    plan = build_plan(model, options)
    if plan.digest != facts["plan"]:
        raise VerifyFailed(
            "this moeconv plans the conversion differently",
            where=str(finished.root / MANIFEST),
            hint=f"verify with moeconv {facts['moeconv']}, which made the output",
        )
    return plan


def recorded_options(facts: Mapping[str, Json]) -> Options:
    """Return the options that a manifest tells."""
    unknown = sorted(set(facts) - set(Options.__dataclass_fields__))
    if unknown:
        raise VerifyFailed(f"the manifest has unknown options: {', '.join(unknown)}")
    return Options(**{name: _tuples(value) for name, value in facts.items()})


def _tuples(value: Json) -> Any:
    return tuple(_tuples(one) for one in value) if isinstance(value, list) else value


def _read_again(finished: Finished, files: Files, jobs: int, findings: Findings) -> Reread:
    """Compare the digest of every segment that is there."""
    units = [
        unit for file in finished.files for unit in units_of(file, files.sizes.get(file.name, 0))
    ]
    findings.expect(sum(unit.nbytes for unit in units), len(units))
    read = Reread()
    for unit, damaged in in_threads(
        lambda unit: damaged_segments(finished.root, unit), units, jobs
    ):
        read = Reread(read.segments + len(unit.segments), read.nbytes + unit.nbytes)
        for segment in damaged:
            end = segment.offset + segment.nbytes
            where = f"{unit.file.name}, bytes [{segment.offset}, {end})"
            findings.problem(f"damaged: {_contents(unit, segment.offset, end, files)}", where)
        findings.advance(unit.nbytes)
    return read


def _contents(unit: Unit, offset: int, end: int, files: Files) -> str:
    """Return in words what lies in [offset, end) of a file."""
    header = files.headers.get(unit.file.name)
    if offset == 0:
        return "the header"
    if header is None:
        return "tensors that the damaged header does not name"
    names = tensors_within(header.tensors, offset, end)
    more = f" and {len(names) - SHOWN_TENSORS} more" if len(names) > SHOWN_TENSORS else ""
    return ", ".join(f"'{name}'" for name in names[:SHOWN_TENSORS]) + more


class _Deep:
    """What is derived once more from the source."""

    def __init__(
        self,
        finished: Finished,
        plan: Plan,
        files: Files,
        sample: float,
        effort: Effort,
    ) -> None:
        from moeconv.rederive import choose_units
        from moeconv.rederive_memory import check_room, choose_share, least_nbytes

        whole = {file.name for file in finished.files if files.sizes.get(file.name) == file.nbytes}
        self.root = finished.root
        self.plan = plan
        self.units = [
            unit for unit in choose_units(plan, sample) if plan.files[unit.file].name in whole
        ]
        least = least_nbytes(plan, self.units)
        check_room(least, finished.root)
        import torch  # noqa: F401  # only when asked to derive; what it takes is no longer free

        self.share = choose_share(effort.memory_nbytes, effort.threads, least)

    def work(self) -> tuple[int, int]:
        """Return (bytes, pieces) to be derived."""
        from moeconv.rederive import unit_nbytes

        return sum(unit_nbytes(self.plan, unit) for unit in self.units), len(self.units)

    def run(self, findings: Findings) -> Rederived:
        """Derive and compare; return how much."""
        from moeconv.execute import raise_open_files
        from moeconv.rederive import Deriver, block_nbytes_within

        tensors: set[tuple[int, int]] = set()
        elements = nbytes = 0
        threads = self.share.threads
        block_nbytes = block_nbytes_within(self.share.memory_nbytes, threads)
        paths = {file.name: self.root / file.name for file in self.plan.files}
        raise_open_files(len(paths) + len(self.plan.model.source.files) + OTHER_FILES)
        if self.share.is_short:
            system.return_freed_memory()
        with Reader(self.plan.model.source.files) as source, Reader(paths) as output:
            deriver = Deriver(self.plan, source, output, block_nbytes)
            for unit, checked in in_threads(deriver.check, self.units, threads):
                file = self.plan.files[unit.file]
                tensors.add((unit.file, unit.tensor))
                elements += checked.elements
                nbytes += checked.nbytes
                if checked.difference:
                    findings.problem(checked.difference, file.name)
                findings.advance(checked.nbytes, file.tensors[unit.tensor].draft.layer)
        return Rederived(len(tensors), elements, nbytes)
