"""What each thread of a conversion does, and when: its seams wrapped from outside, in its process.

`run` is called first thing in a process of its own and imports only what Python has already
imported; moeconv is then imported as ever, and each seam is wrapped once its module is there.
"""

from __future__ import annotations

import importlib
import json
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# What a thread may be doing, in the order in which it is told.
STARTING, IMPORTING, PLANNING, LOADING = (
    "starting Python",
    "importing",
    "planning",
    "loading kernels",
)
MAKING, READING, DECODING = "making files", "reading", "decoding"
QUANTIZING, COUNTING, PLACING = "quantizing", "counting NaN and Inf", "turning and placing"
DIGESTING, WRITING, TAKING = "digesting", "writing", "taking buffers"
ADMITTED, QUEUED, WATCHING = "waiting for memory", "waiting for a turn", "waiting for workers"
SYNCING, COMMITTING, REST, ENDING = "syncing", "committing", "the rest", "ending"

MAIN = "MainThread"  # the name that threading gives it

# Module, what it looks up there -> what calling it is. Of what a module imports by name, the
# user's own name is wrapped.
SEAMS: Mapping[tuple[str, str], str] = {
    ("moeconv.cli.convert", "make_plan"): PLANNING,
    ("moeconv.convert", "build_tasks"): PLANNING,
    ("moeconv.convert", "check_memory"): PLANNING,
    ("moeconv.convert", "open_outputs"): MAKING,
    ("moeconv.convert", "start"): MAKING,
    ("moeconv.convert", "commit"): COMMITTING,
    ("moeconv.execute", "Run._work"): REST,
    ("moeconv.execute", "Run._next"): WATCHING,
    ("moeconv.execute", "_Admission.enter"): ADMITTED,
    ("moeconv.journal", "Journal.append"): SYNCING,
    ("moeconv.process", "_Piece.assemble"): PLACING,
    ("moeconv.process", "count_copied"): COUNTING,
    ("moeconv.decoding", "CpuDecoder.decode"): DECODING,
    ("moeconv.decoding", "CpuDecoder.encode"): QUANTIZING,
    ("moeconv.kernels.cpu.cache", "Compiled.load"): LOADING,
    ("moeconv.store.buffers", "BufferPool.take"): TAKING,
    ("moeconv.store.reader", "Reader.read_ranges"): READING,
    ("moeconv.store.reader", "Reader.read_strided"): READING,
    ("moeconv.store.writer", "OutputFile.write"): WRITING,
    ("moeconv.store.writer", "OutputFile.sync"): SYNCING,
}


class Span(NamedTuple):
    """One call: seconds from the start of the process; `cpu`: without calls inside it."""

    lane: str
    what: str
    start: float
    stop: float
    cpu: float


class Recorder:
    """What was called, by threads that each know what they are inside of. `began`: monotonic."""

    def __init__(self, began: float) -> None:
        self.began = began
        self.spans: list[Span] = []
        self._inside = threading.local()

    def now(self) -> float:
        """Return the seconds since the process was started."""
        return time.monotonic() - self.began

    def wrap(self, what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does the same and is recorded."""

        def run(*given: Any, **named: Any) -> Any:
            inner: list[float] = self._inside.__dict__.setdefault("inner", [])
            inner.append(0.0)
            start, busy = self.now(), time.thread_time()
            try:
                return function(*given, **named)
            finally:
                spent, stop = time.thread_time() - busy, self.now()
                own = spent - inner.pop()
                if inner:
                    inner[-1] += spent
                lane = threading.current_thread().name
                self.spans.append(Span(lane, what, start, stop, own))

        return run


class Turnstile:
    """A lock whose waiting is recorded."""

    def __init__(self, recorder: Recorder, lock: Any) -> None:
        self._lock = lock
        self._enter = recorder.wrap(QUEUED, lock.__enter__)

    def __enter__(self) -> object:
        return self._enter()

    def __exit__(self, *given: object) -> None:
        self._lock.__exit__(*given)


class Digests:
    """xxhash as moeconv/process.py uses it, its updates recorded."""

    def __init__(self, recorder: Recorder, module: Any) -> None:
        self._recorder, self._module = recorder, module

    def xxh3_128(self) -> Any:
        """Return a digest to update."""
        return _Digest(self._recorder, self._module.xxh3_128())


class _Digest:
    def __init__(self, recorder: Recorder, digest: Any) -> None:
        self.update = recorder.wrap(DIGESTING, digest.update)
        self.hexdigest = digest.hexdigest


def _wrap_lock(recorder: Recorder, made: Callable[..., None]) -> Callable[..., None]:
    def make(self: Any, *given: Any) -> None:
        made(self, *given)
        self._dispatch = Turnstile(recorder, self._dispatch)

    return make


# What is no call -> how it is replaced.
OTHERS: Mapping[tuple[str, str], Callable[[Recorder, Any], Any]] = {
    ("moeconv.execute", "Run.__init__"): _wrap_lock,
    ("moeconv.process", "xxhash"): Digests,
}


def replace(recorder: Recorder, seam: tuple[str, str]) -> None:
    """Replace a seam; AttributeError where moeconv has it no more."""
    module, path = seam
    *owners, name = path.split(".")
    owner: Any = sys.modules[module]
    for one in owners:
        owner = getattr(owner, one)
    found = getattr(owner, name)
    made = OTHERS[seam](recorder, found) if seam in OTHERS else recorder.wrap(SEAMS[seam], found)
    setattr(owner, name, made)


def watch_imports(recorder: Recorder) -> set[tuple[str, str]]:
    """Record what imports take and replace seams after them; return those still to come.

    CPython asks for `_find_and_load` by name at every import of what is not there yet.
    """
    waiting = set(SEAMS) | set(OTHERS)
    depth = threading.local()
    bootstrap: Any = importlib._bootstrap
    load = recorder.wrap(IMPORTING, original := bootstrap._find_and_load)

    def watched(name: str, importer: Any) -> Any:
        if getattr(depth, "inside", False):
            return original(name, importer)
        depth.inside = True
        try:
            return load(name, importer)
        finally:
            depth.inside = False
            for seam in [seam for seam in waiting if seam[0] in sys.modules]:
                waiting.discard(seam)
                replace(recorder, seam)

    bootstrap._find_and_load = watched
    return waiting


def run(began: float, report: str, arguments: Sequence[str]) -> None:
    """Run `moeconv ARGUMENTS` and write what it did to `report`; RuntimeError for an unmet seam."""
    recorder = Recorder(began)
    here, busy = recorder.now(), time.process_time()
    recorder.spans.append(Span(MAIN, STARTING, 0.0, here, busy))
    waiting = watch_imports(recorder)

    def command() -> None:
        from moeconv.cli import main

        main(arguments)

    try:
        recorder.wrap(REST, command)()
    except SystemExit as stop:
        if stop.code:
            raise
    if waiting:
        raise RuntimeError(f"never called: {sorted(waiting)}")
    Path(report).write_text(json.dumps([recorder.now(), time.process_time(), recorder.spans]))
