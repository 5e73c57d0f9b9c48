"""moeconv convert: do it; the same line again resumes."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple

from moeconv.cli.failures import error_facts
from moeconv.cli.parse import show_numbers
from moeconv.cli.plan import make_plan, make_resources
from moeconv.cli.progress import shown
from moeconv.cli.tables import Printer, human_seconds
from moeconv.cli.verify import describe_report, failure, print_report, run_verify
from moeconv.errors import Interrupted, MoeconvError, Stopped
from moeconv.types import Json

if TYPE_CHECKING:
    from moeconv.convert import Result
    from moeconv.execute import Signal
    from moeconv.plan import Plan
    from moeconv.verify import Report

REASONS: Mapping[int, type[MoeconvError]] = {
    signal.SIGINT: Interrupted,
    signal.SIGTERM: Stopped,
}
_STOPPING = b"\nstopping after the tasks in flight; once more exits at once\n"


class Run(NamedTuple):
    """A conversion that has ended, with what it was asked."""

    plan: Plan
    dst: Path
    result: Result
    values: Mapping[str, Json]
    verified: Report | None


class Stop:
    """What Ctrl-C and SIGTERM do: end at once before and after the run, in it a clean stop."""

    def __init__(self) -> None:
        self.running: Signal | None = None
        self.state = ("nothing is written yet", "the same command starts again")

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle one signal."""
        reason = REASONS[number]
        if self.running is None:
            raise reason(f"stopped: {self.state[0]}", hint=self.state[1])
        if self.running.is_set:
            os._exit(reason.exit_code)  # the journal knows what is done
        self.running.stop(reason)
        os.write(2, _STOPPING)


@contextmanager
def handled_signals(stop: Stop) -> Iterator[None]:
    """Let `stop` handle SIGINT and SIGTERM for a while."""
    before = {number: signal.signal(number, stop) for number in REASONS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def convert_command(values: Mapping[str, Json]) -> int:
    """Convert SRC into DST; the same command again continues where it was stopped.

    SRC is never changed. DST has no config.json before it is complete.
    """
    stop = Stop()
    with handled_signals(stop):
        plan = make_plan(values)
        result = _convert(plan, values, stop)
        stop.running = None
        stop.state = ("the conversion is done", "moeconv verify checks it")
        run = Run(plan, Path(values["dst"]), result, values, _verify(values, result))
        return report(run)


def _convert(plan: Plan, values: Mapping[str, Json], stop: Stop) -> Result:
    from moeconv.api import convert
    from moeconv.execute import Signal

    wanted = values.get("progress", "none" if values.get("quiet") else "auto")
    with shown(wanted, plan.model.sizes.layers) as show:
        stop.running = Signal()
        return convert(
            plan,
            values["dst"],
            resources=make_resources(values),
            progress=show,
            signal=stop.running,
        )


def _verify(values: Mapping[str, Json], result: Result) -> Report | None:
    """Return what --verify found; None without it, or while ranks are missing."""
    depth = values.get("verify", "none")
    if depth == "none" or result.state == "waiting":
        return None
    return run_verify(values["dst"], values["src"] if depth == "deep" else None, values)


def missing_ranks(run: Run) -> list[int]:
    """Return the ranks whose files are not complete yet."""
    lacking = set(run.result.missing_files)
    return sorted({file.rank for file in run.plan.files if file.name in lacking})


def describe(run: Run) -> dict[str, Json]:
    """Return the report of a run as JSON values."""
    from moeconv.cli.plan_report import describe_source, serve_line
    from moeconv.manifest import accounting_facts

    plan, result = run.plan, run.result
    lacking = missing_ranks(run)
    return {
        "state": result.state,
        "dst": str(run.dst),
        "layout": plan.options.layout,
        "partial": plan.options.partial,
        "plan": plan.digest,
        "source": describe_source(plan.model.source),
        "written_nbytes": result.nbytes,
        "read_nbytes": result.read_nbytes,
        "output_nbytes": plan.nbytes,
        "seconds": round(result.seconds, 3),
        "peak_memory_nbytes": result.peak_rss_nbytes,
        "devices": list(result.devices),
        "device_note": result.device_note,
        "accounting": accounting_facts(plan.accounting),
        "experts": result.manifest.get("experts"),
        "overflow": result.manifest.get("overflow", 0),
        "missing_files": list(result.missing_files),
        "missing_ranks": lacking,
        "ranks": sorted({file.rank for file in plan.files} - set(lacking)),
        "notes": list(plan.notes),
        "serve": serve_line(plan, run.dst) if result.state != "waiting" else None,
        "check": check_line(run),
        "verify": describe_report(run.verified) if run.verified else None,
    }


def check_line(run: Run) -> str:
    """Return the command that checks an output against its source."""
    words = ["moeconv", "verify", str(run.dst), "--source", str(run.values["src"])]
    if "config" in run.values:
        words += ["--config", str(run.values["config"])]
    return shlex.join(words)


def report(run: Run) -> int:
    """Print what a run did; return the exit code."""
    printer = Printer(run.values)
    facts = describe(run)
    error = failure(run.verified) if run.verified else None
    printer.json(facts | (error_facts(error) if error else {}))
    if not printer.silent:
        _print_state(run, facts, printer)
    if run.verified:
        print_report(run.verified, printer)
    if error is not None and not printer.as_json:
        raise error
    if not printer.silent and facts["state"] != "waiting":
        _print_next(run, facts, printer)
    return error.exit_code if error else 0


def _print_state(run: Run, facts: Json, printer: Printer) -> None:
    from moeconv.cli.plan_report import source_line
    from moeconv.store.space import human

    if facts["state"] == "finished":
        printer.done(f"{run.dst} holds this very output already, finished; its sizes are right")
        return
    printer.done(
        f"{human(facts['written_nbytes'])} in {human_seconds(facts['seconds'])}"
        f" · peak memory {human(facts['peak_memory_nbytes'])}"
    )
    if facts["device_note"]:
        printer.warn(facts["device_note"])
    elif facts["devices"] not in ([], ["cpu"]):
        printer.line(f"  decoded on {', '.join(facts['devices'])}")
    if facts["state"] == "waiting":
        there = show_numbers(facts["ranks"]) or "none"
        lacking = show_numbers(facts["missing_ranks"])
        printer.done(f"complete ranks: {there} · missing: {lacking}")
        printer.line(f"  next: the same command with --ranks {lacking}; the last run completes DST")
        return
    printer.done(source_line(facts["accounting"], facts["source"]))
    experts = facts["experts"]
    line = f"experts: {experts['nan']:,} NaN, {experts['inf']:,} Inf · manifest moeconv.json"
    if experts["nan"] or experts["inf"]:
        printer.warn(line)
        printer.warn("those are the source's own; they are kept")
    else:
        printer.done(line)
    if facts["overflow"]:
        printer.warn(
            f"{facts['overflow']:,} finite values were too large and became Inf, as --nonfinite "
            "keep allows"
        )


def _print_next(run: Run, facts: Json, printer: Printer) -> None:
    from moeconv.cli.plan_report import serve_warning

    for note in facts["notes"]:
        printer.warn(note)
    if facts["partial"]:
        printer.warn("a part of the model: no config.json or index, nothing loads it as a whole")
    if facts["serve"]:
        printer.line(f"  serve: {facts['serve']}")
    printer.line(f"  check: {facts['check']}")
    if warning := serve_warning(run.plan):
        printer.warn(warning)
