"""The tasks of a plan, done by worker threads in bounded memory and journalled once durable."""

from __future__ import annotations

import queue
import resource
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from moeconv.arrange import OutFile
from moeconv.errors import Interrupted, MoeconvError
from moeconv.journal import Entry, Journal, Segment
from moeconv.process import Context, Done, process
from moeconv.steps import cut_nbytes, floor_nbytes, pieces
from moeconv.store.writer import OutputFile
from moeconv.tasks import Task
from moeconv.types import Weight
from moeconv.work import Work

OTHER_FILES = 1024  # beside outputs, which take two each: those of the source
SYNC_SECONDS = 5.0  # finished tasks become durable at least this often
SYNC_NBYTES = 1 << 30


class Progress(NamedTuple):
    """How far a run is: output bytes of this run and in all, tasks, the layer being written."""

    done_nbytes: int
    total_nbytes: int
    done_tasks: int
    total_tasks: int
    layer: int | None


Report = Callable[[Progress], None]


class Signal:
    """Asks a run to stop after the tasks in flight; `error` is what it then raises."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.error: type[MoeconvError] = Interrupted

    def stop(self, error: type[MoeconvError]) -> None:
        """Ask to stop; a later call does not change the reason."""
        if not self._event.is_set():
            self.error = error
            self._event.set()

    @property
    def is_set(self) -> bool:
        return self._event.is_set()


class _Admission:
    """Lets tasks in, in order, while their bytes fit."""

    def __init__(self, max_nbytes: int) -> None:
        self._free = self._max = max_nbytes
        self._changed = threading.Condition()

    def enter(self, nbytes: int) -> int:
        """Wait until `nbytes` are free and take them; return what was taken."""
        taken = min(nbytes, self._max)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= taken)
            self._free -= taken
        return taken

    def leave(self, nbytes: int) -> None:
        """Give back what `enter` took."""
        with self._changed:
            self._free += nbytes
            self._changed.notify_all()


class Job(NamedTuple):
    """A task to do, and the output bytes that this run writes of it."""

    work: Work
    output_nbytes: int


class Limits(NamedTuple):
    """Threads, and the bytes that all tasks in flight may take."""

    jobs: int
    memory_nbytes: int


def make_jobs(
    tasks: Iterable[Task],
    weights: Sequence[Weight],
    files: Sequence[OutFile],
    wanted: Mapping[int, frozenset[int]],
) -> Iterator[Job]:
    """Yield the jobs for the files still wanted of each task (number -> file indices)."""
    for task in tasks:
        keep = wanted.get(task.number, frozenset())
        regions = tuple(region for region in task.regions if region.file in keep)
        if not regions:
            continue
        members = tuple(weights[member.weight] for member in task.members)
        work = Work(task._replace(regions=regions), members, files)
        nbytes = sum(region.nbytes for region in regions)
        yield Job(work, nbytes)


def check_memory(tasks: Iterable[Task], weights: Sequence[Weight], files: Sequence[OutFile]) -> int:
    """Return the bytes that tasks in flight need at least: the largest smallest piece."""
    floor = 0
    seen: set[object] = set()
    for task in tasks:
        work = Work(task, tuple(weights[member.weight] for member in task.members), files)
        kind = _kind(work)
        if kind not in seen:
            seen.add(kind)
            floor = max(floor, floor_nbytes(work))
    return floor


def _kind(work: Work) -> object:
    """Return what a task's smallest pieces depend on, not in which files and slots they lie."""
    members = [
        (one.rows, *_form(w)) for one, w in zip(work.task.members, work.weights, strict=True)
    ]
    regions = []
    for region in work.task.regions:
        draft = work.draft(region)
        form = (draft.dtype, draft.transposed, draft.encode, draft.constant)
        regions.append((region.start, region.stop, region.nbytes, region.rects, form))
    return tuple(members), tuple(regions)


def _form(weight: Weight) -> tuple[object, ...]:
    """Return how a weight is stored."""
    parts = tuple((part, ref.dtype) for part, ref in weight.parts.items())
    params = tuple(weight.params.items())
    return weight.codec, weight.rows, weight.cols, weight.transposed, params, parts


class Run:
    """Workers, journal and progress of one run."""

    def __init__(self, context: Context, journal: Journal, limits: Limits, signal: Signal) -> None:
        self._context = context
        self._journal = journal
        self._limits = limits
        self._signal = signal
        self._admission = _Admission(limits.memory_nbytes)
        self._share = min(limits.memory_nbytes // limits.jobs, context.decoder.max_nbytes)
        self._most = limits.memory_nbytes // min(limits.jobs, 2)  # two tasks still overlap
        self._finished: queue.Queue[tuple[Job, Done | BaseException]] = queue.Queue()
        self._dispatch = threading.Lock()
        self._failed = threading.Event()
        self.entries: list[Entry] = []

    def do(self, jobs: Sequence[Job], report: Report | None = None) -> None:
        """Do all jobs; what was finished is in the journal when this returns or raises."""
        waiting = iter(jobs)
        threads = [
            threading.Thread(target=self._work, args=(waiting,), name=f"moeconv-{index}")
            for index in range(min(self._limits.jobs, max(len(jobs), 1)))
        ]
        for thread in threads:
            thread.start()
        try:
            error = self._collect(jobs, threads, report)
        finally:
            self._failed.set()
            for thread in threads:
                thread.join()
        if error is not None:
            raise error
        if self._signal.is_set and len(self.entries) < len(jobs):
            raise self._signal.error(
                f"stopped: {len(self.entries)} of {len(jobs)} tasks of this run are done",
                hint="the same command continues",
            )

    def _work(self, waiting: Iterator[Job]) -> None:
        while True:
            with self._dispatch:  # in order: a large task is not overtaken for ever
                if self._failed.is_set() or self._signal.is_set:
                    return
                job = next(waiting, None)
                if job is None:
                    return
                cut = pieces(job.work, self._share, self._most)
                taken = self._admission.enter(cut_nbytes(job.work, cut))
            try:
                self._finished.put((job, process(job.work, cut, self._context)))
            except BaseException as error:  # noqa: BLE001  # handed to the thread that waits
                self._failed.set()
                self._finished.put((job, error))
            finally:
                self._admission.leave(taken)

    def _collect(
        self, jobs: Sequence[Job], threads: Sequence[threading.Thread], report: Report | None
    ) -> BaseException | None:
        total = sum(job.output_nbytes for job in jobs)
        pending: list[Entry] = []
        done_nbytes = unsynced = done_tasks = 0
        error: BaseException | None = None
        last = time.monotonic()
        while done_tasks < len(jobs):
            found = self._next(threads)
            if found is None:
                break
            job, result = found
            if isinstance(result, BaseException):
                error = error or result
                continue
            done_tasks += 1
            pending.append(_entry(job, result))
            done_nbytes += job.output_nbytes
            unsynced += job.output_nbytes
            if report is not None:
                layer = job.work.weights[0].layer if job.work.weights else None
                report(Progress(done_nbytes, total, done_tasks, len(jobs), layer))
            if unsynced >= SYNC_NBYTES or time.monotonic() - last >= SYNC_SECONDS:
                self._flush(pending)
                unsynced, last = 0, time.monotonic()
        self._flush(pending)
        return error

    def _next(self, threads: Sequence[threading.Thread]) -> tuple[Job, Done | BaseException] | None:
        """Return the next finished job; None once all workers have ended."""
        while True:
            try:
                return self._finished.get(timeout=0.2)
            except queue.Empty:
                if not any(thread.is_alive() for thread in threads) and self._finished.empty():
                    return None

    def _flush(self, pending: list[Entry]) -> None:
        """Make the pending tasks durable, then say so in the journal."""
        if not pending:
            return
        for file in {index for entry in pending for index in entry.files or ()}:
            self._context.outputs[file].sync()
        self._journal.append(pending)
        self.entries += pending
        pending.clear()


def _entry(job: Job, done: Done) -> Entry:
    segments = tuple(
        Segment(region.file, region.offset, region.nbytes, digest)
        for region, digest in zip(job.work.task.regions, done.digests, strict=True)
    )
    files = tuple(sorted({segment.file for segment in segments}))
    return Entry(job.work.task.number, files, segments, done.counts._asdict())


def open_outputs(
    paths: Mapping[int, tuple[str, int]], make: Callable[[str, int], OutputFile]
) -> dict[int, OutputFile]:
    """Return the output files by index; all are closed again if one cannot be opened."""
    raise_open_files(2 * len(paths) + OTHER_FILES)
    opened: dict[int, OutputFile] = {}
    try:
        for index, (name, nbytes) in paths.items():
            opened[index] = make(name, nbytes)
    except BaseException:
        for output in opened.values():
            output.close()
        raise
    return opened


def raise_open_files(wanted: int) -> None:
    """Raise the soft limit of open files as far as the hard one allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
