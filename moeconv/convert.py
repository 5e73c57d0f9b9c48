"""plan -> output directory: lock, checks, tasks, commit; what is done already is not done again."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from moeconv import __version__
from moeconv.commit import commit
from moeconv.decoding import CpuDecoder
from moeconv.destination import (
    Found,
    check_finished,
    decide,
    examine,
    finish,
    hide,
    refuse_strangers,
    remove_output,
    start,
)
from moeconv.device.choose import Chosen, Wanted, choose_decoder, wanted_device
from moeconv.device.ways import decoded_by
from moeconv.errors import Refused
from moeconv.execute import Limits, Report, Run, Signal, check_memory, make_jobs, open_outputs
from moeconv.journal import JOURNAL_NAME, Entry, Header, Journal
from moeconv.manifest import Outcome, outcome_of
from moeconv.plan import Plan
from moeconv.process import Context
from moeconv.resources import IDLE_SHARE, Resources, check_floor, check_vram, choose_limits
from moeconv.store import system
from moeconv.store.lock import STATE_DIRECTORY, DirectoryLock
from moeconv.store.reader import Reader
from moeconv.store.space import check_space, check_writable, process_peak_rss
from moeconv.store.writer import OutputFile, partial_path
from moeconv.tasks import Task, build_tasks
from moeconv.types import Json


class Result(NamedTuple):
    """What a run did. `state`: converted, finished (it was already), or waiting (for other ranks).

    `nbytes` were written by this run, `read_nbytes` read; seconds of wall time; `devices` decoded,
    none where nothing was to be done; `device_note`: why no GPU did, though there is one.
    """

    state: str
    manifest: Mapping[str, Json]
    nbytes: int
    read_nbytes: int
    seconds: float
    peak_rss_nbytes: int
    missing_files: tuple[str, ...]
    devices: tuple[str, ...] = ()
    device_note: str = ""


def convert_plan(
    plan: Plan,
    dst: Path,
    resources: Resources | None = None,
    *,
    report: Report | None = None,
    signal: Signal | None = None,
) -> Result:
    """Do what a plan says; return what was done.

    Raises Refused before anything is written; IOFailed, Interrupted, Stopped while running: the
    same call continues; BadSource where the source's numbers cannot be converted.
    """
    resources = resources or Resources()
    begin = time.monotonic()
    check_apart(plan.model.source.root, dst)
    decide(examine(dst), plan, dst, overwrite=resources.overwrite)
    limits = choose_limits(resources)
    device = wanted_device(resources.device, resources.vram_nbytes)
    tasks = build_tasks(plan.weights, plan.files)
    floor = check_memory(tasks, plan.weights, plan.files)
    check_floor(limits, floor, resources.memory_nbytes)
    if examine(dst).state == "nothing":
        check_writable(dst)
        check_space(dst, needed_nbytes(plan))
    try:
        with DirectoryLock(dst):
            return _Conversion(plan, dst, Bounds(limits, device, floor), begin).run(
                resources, tasks, report, signal or Signal()
            )
    except OSError as error:
        raise system.failed("convert", error, str(error.filename or dst)) from error


def check_apart(source: Path, dst: Path) -> None:
    """Raise Refused if the output would lie in the source or over it."""
    root = (source if source.is_dir() else source.parent).resolve()
    target = dst.resolve()
    if target == root or root in target.parents or target in root.parents:
        raise Refused(
            "DST and SRC lie in one another", where=str(dst), hint="choose a directory beside SRC"
        )


def needed_nbytes(plan: Plan) -> int:
    """Return the disk bytes of an output: of the chosen ranks' files, and those beside them."""
    chosen = [plan.files[index] for index in chosen_files(plan)]
    root = plan.model.source.root
    beside = sum((root / name).stat().st_size for name in plan.auxiliary)
    return sum(file.nbytes for file in chosen) + beside + (1 << 20)


def chosen_files(plan: Plan) -> tuple[int, ...]:
    """Return the indices of the files that --ranks asks for; all without it."""
    ranks = plan.options.ranks
    return tuple(
        index for index, file in enumerate(plan.files) if ranks is None or file.rank in ranks
    )


class Bounds(NamedTuple):
    """What a run may use; `floor_nbytes`: what the largest block needs."""

    limits: Limits
    device: Wanted
    floor_nbytes: int


class _Conversion:
    """One run on a locked directory."""

    def __init__(self, plan: Plan, dst: Path, bounds: Bounds, begin: float) -> None:
        self.plan = plan
        self.dst = dst
        self.bounds = bounds
        self.limits = bounds.limits
        self.chosen = Chosen(CpuDecoder(), ())
        self.begin = begin
        self.read_nbytes = 0

    def run(
        self,
        resources: Resources,
        tasks: Sequence[Task],
        report: Report | None,
        signal: Signal,
    ) -> Result:
        """Examine again now that nobody else can change it, then convert or continue."""
        found = examine(self.dst)
        action = decide(found, self.plan, self.dst, overwrite=resources.overwrite)
        if action == "finished":
            return self.already(found)
        device = self.bounds.device
        self.chosen = choose_decoder(
            device, decoded_by(tasks, self.plan.weights, self.plan.files) if device.cards else None
        )
        check_vram(self.chosen.decoder.max_nbytes, self.bounds.floor_nbytes)
        if action == "replace":
            remove_output(found, self.dst)
        if action == "continue":
            hide(self.dst)
        else:
            check_space(self.dst, needed_nbytes(self.plan))
            start(self.dst, self.plan)
        journal, done = self.open_journal(tasks, fresh=action != "continue")
        with journal, closing(self.chosen.decoder):
            written, new = self.do(journal, tasks, done, (report, signal))
        outcome = outcome_of([*done, *new])
        missing = self.missing(tasks, outcome)
        if missing:
            return self.result("waiting", {}, written, missing)
        refuse_strangers(examine(self.dst), self.dst)  # what came while this run was converting
        manifest = commit(self.plan, self.dst, outcome)
        return self.result("converted", manifest, written, ())

    def already(self, found: Found) -> Result:
        """Return the result for a finished output of this very plan, its sizes checked."""
        check_finished(found, self.dst)
        finish(self.dst)  # only the lock that this run took is there
        return self.result("finished", found.facts, 0, ())

    def open_journal(self, tasks: Sequence[Task], *, fresh: bool) -> tuple[Journal, list[Entry]]:
        """Return the journal and what of it still holds; a new one if it is not of this plan.

        What no longer holds (a file was removed) is struck out before the file is made again, as
        zeros of the right size: a later run would believe it.
        """
        path = self.dst / STATE_DIRECTORY / JOURNAL_NAME
        header = Header(self.plan.digest, self.plan.model.source.fingerprint, __version__)
        opened = None if fresh else Journal.open(path)
        kept: list[Entry] = []
        if opened is not None:
            journal, there, entries = opened
            if there == header:
                kept = self.trusted(entries, tasks)
                if kept == entries:
                    return journal, kept
            journal.close()
        journal = Journal.create(path, header)
        journal.append(kept)
        return journal, kept

    def trusted(self, entries: Sequence[Entry], tasks: Sequence[Task]) -> list[Entry]:
        """Return the entries whose files are still there, cut down to those files."""
        there = {
            index
            for index, file in enumerate(self.plan.files)
            if self.has_bytes(file.name, file.nbytes)
        }
        known = {
            (task.number, region.file, region.offset, region.nbytes)
            for task in tasks
            for region in task.regions
        }
        kept = []
        for entry in entries:
            segments = tuple(
                segment
                for segment in entry.segments
                if segment.file in there
                and (entry.task, segment.file, segment.offset, segment.nbytes) in known
            )
            if segments:
                files = tuple(sorted({segment.file for segment in segments}))
                kept.append(entry._replace(segments=segments, files=files))
        return kept

    def has_bytes(self, name: str, nbytes: int) -> bool:
        """Return whether a file of an earlier run is there, complete or partial, in its size."""
        for path in (self.dst / name, partial_path(self.dst / name)):
            if path.is_file() and path.stat().st_size == nbytes:
                return True
        return False

    def do(
        self,
        journal: Journal,
        tasks: Sequence[Task],
        done: Sequence[Entry],
        watch: tuple[Report | None, Signal],
    ) -> tuple[int, list[Entry]]:
        """Do the tasks that are missing; return the bytes written and the new entries."""
        finished = {(entry.task, file) for entry in done for file in entry.files or ()}
        chosen = set(chosen_files(self.plan))
        wanted: dict[int, frozenset[int]] = {}
        for task in tasks:
            files = {region.file for region in task.regions} & chosen
            left = frozenset(file for file in files if (task.number, file) not in finished)
            if left:
                wanted[task.number] = left
        needed = sorted({file for files in wanted.values() for file in files} | self.bare(chosen))
        self.reopen(needed)
        decoder = self.chosen.decoder
        pool = decoder.pool(self.limits.memory_nbytes // (IDLE_SHARE - 1))
        outputs = open_outputs(
            {
                index: (self.plan.files[index].name, self.plan.files[index].nbytes)
                for index in needed
            },
            lambda name, nbytes: OutputFile(self.dst / name, nbytes, resume=True, bounces=pool),
        )
        try:
            with Reader(self.plan.model.source.files, pool) as reader:
                for index, output in outputs.items():
                    output.write(0, memoryview(self.plan.files[index].header))
                nonfinite = self.plan.options.nonfinite
                context = Context(reader, pool, outputs, nonfinite, decoder)
                jobs = list(make_jobs(tasks, self.plan.weights, self.plan.files, wanted))
                run = Run(context, journal, self.limits, watch[1])
                run.do(jobs, watch[0])
                self.read_nbytes = reader.nbytes_read
                for output in outputs.values():
                    output.sync()
        finally:
            for output in outputs.values():
                output.close()
        return sum(job.output_nbytes for job in jobs), run.entries

    def reopen(self, needed: Sequence[int]) -> None:
        """Make files partial again that were complete, but of which the journal has lost a part."""
        for index in needed:
            path = self.dst / self.plan.files[index].name
            if path.is_file() and not partial_path(path).exists():
                system.rename(path, partial_path(path))

    def bare(self, chosen: set[int]) -> set[int]:
        """Return the chosen files of which nothing is there yet, not even their header."""
        return {
            index
            for index in chosen
            if not self.has_bytes(self.plan.files[index].name, self.plan.files[index].nbytes)
        }

    def missing(self, tasks: Sequence[Task], outcome: Outcome) -> tuple[str, ...]:
        """Return the names of the files that still lack bytes: those of other ranks."""
        lacking: dict[int, None] = {}
        for task in tasks:
            for region in task.regions:
                of_file = outcome.segments.get(region.file, {})
                if (region.offset, region.nbytes) not in of_file:
                    lacking[region.file] = None
        return tuple(self.plan.files[index].name for index in sorted(lacking))

    def result(
        self, state: str, manifest: Mapping[str, Json], nbytes: int, missing: tuple[str, ...]
    ) -> Result:
        seconds = time.monotonic() - self.begin
        return Result(
            state,
            manifest,
            nbytes,
            self.read_nbytes,
            seconds,
            process_peak_rss(),
            missing,
            self.chosen.names,
            self.chosen.note,
        )
