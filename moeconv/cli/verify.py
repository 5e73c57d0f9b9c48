"""moeconv verify: complete, undamaged, right?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moeconv.cli.failures import error_facts
from moeconv.cli.progress import shown
from moeconv.cli.tables import Printer, human_seconds
from moeconv.errors import MoeconvError, UsageError, VerifyFailed
from moeconv.types import Json

if TYPE_CHECKING:
    from moeconv.verify import Report


def verify_command(values: Mapping[str, Json]) -> int:
    """Check that an output is complete and undamaged and, with --source, right.

    Every byte is read and compared with its digest; with --source every value is derived once more.
    """
    if "sample" in values and "source" not in values:
        raise UsageError(
            "--sample says how much is derived from the source again; there is no --source",
            hint="add --source SRC",
        )
    report = run_verify(values["dst"], values.get("source"), values)
    printer = Printer(values)
    error = failure(report)
    printer.json(describe_report(report) | (error_facts(error) if error else {}))
    print_report(report, printer)
    if error is None or printer.as_json:
        return error.exit_code if error else 0
    raise error


def run_verify(dst: str, source: str | None, values: Mapping[str, Json]) -> Report:
    """Return the report of a verification, its progress shown."""
    from moeconv.verify import Effort, verify

    wanted = values.get("progress", "none" if values.get("quiet") else "auto")
    with shown(wanted, None, "verifying") as show:
        effort: dict[str, Any] = {"jobs": values.get("jobs"), "progress": show}
        if "memory" in values:
            effort["memory_nbytes"] = values["memory"]
        return verify(
            dst,
            source,
            values.get("sample", 1.0),
            config=values.get("config"),
            effort=Effort(**effort),
        )


def failure(report: Report) -> MoeconvError | None:
    """Return the error of a report that found problems."""
    try:
        report.require_ok()
    except VerifyFailed as error:
        return error
    return None


def describe_report(report: Report) -> dict[str, Json]:
    """Return a report as JSON values."""
    return {
        "ok": report.ok,
        "files": report.files,
        "tensors": report.tensors,
        "reread": report.reread._asdict(),
        "sample": report.sample,
        "rederived": report.rederived._asdict(),
        "problems": [one._asdict() for one in report.problems],
        "more_problems": report.more_problems,
        "notes": list(report.notes),
        "seconds": round(report.seconds, 3),
    }


def print_report(report: Report, printer: Printer) -> None:
    """Print what was checked, and every problem."""
    from moeconv.store.space import human

    if printer.silent:
        return
    for problem in report.problems:
        where = f" ({problem.where})" if problem.where else ""
        printer.marked("✗", f"{problem.what}{where}", "red")
    if report.more_problems:
        printer.marked("✗", f"and {report.more_problems:,} more", "red")
    for note in report.notes:
        printer.warn(note)
    if not report.ok:
        return
    reread = report.reread
    printer.done(
        f"digests: {reread.segments:,} segments of {report.files:,} files, "
        f"{human(reread.nbytes)} read again, all as written"
    )
    if report.sample is not None:
        derived = report.rederived
        printer.done(
            f"source: {derived.tensors:,} of {report.tensors:,} tensors, "
            f"{derived.elements:,} elements derived once more, all equal"
        )
    printer.done(f"verified in {human_seconds(report.seconds)}")
