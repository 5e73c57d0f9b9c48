"""moeconv plan: what would happen, exactly? Writes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from moeconv.cli.failures import error_facts
from moeconv.cli.options import shape_options
from moeconv.cli.parse import show_numbers
from moeconv.cli.tables import Printer
from moeconv.types import Json

if TYPE_CHECKING:
    from moeconv.plan import Plan
    from moeconv.resources import Resources

_SHOWN = 8  # files without -v

ACTIONS = {
    "convert": "DST is new: convert writes all of it",
    "continue": "DST holds an unfinished output of this plan: convert continues it",
    "finished": "DST holds this very output, finished: convert only checks its sizes",
    "replace": "DST holds another output of moeconv: --overwrite replaces it",
    "refused": "convert would be refused",
}


def make_plan(values: Mapping[str, Json]) -> Plan:
    """Return the plan that the command line asks for; whether DST can take it is not looked at."""
    from moeconv.api import plan

    return plan(values["src"], config=values.get("config"), **shape_options(values))


def make_resources(values: Mapping[str, Json]) -> Resources:
    """Return what a run may use, as the command line says."""
    from moeconv.resources import Resources

    return Resources(
        memory_nbytes=values.get("memory"),
        jobs=values.get("jobs"),
        overwrite=bool(values.get("overwrite")),
        device=values.get("device") or "auto",
        vram_nbytes=values.get("vram"),
    )


def plan_command(values: Mapping[str, Json]) -> int:
    """Say what convert would do with the same options: files, bytes, memory, disk. Writes nothing.

    Reads headers only. What convert would refuse is refused here, with what would work.
    """
    from moeconv.cli import plan_report

    plan = make_plan(values)
    dst = Path(values["dst"])
    resources = make_resources(values)
    needs = plan_report.measure(plan, dst, resources)
    action, refusals = plan_report.find_refusals(plan, dst, resources, needs)
    facts = plan_report.describe_plan(plan, dst, needs)
    facts["action"] = action
    facts["refusals"] = [error_facts(one)["error"] for one in refusals]
    printer = Printer(values)
    if not printer.silent:
        print_plan(facts, plan, printer)
    if refusals and printer.as_json:
        printer.json(facts | error_facts(refusals[0]))
        return refusals[0].exit_code
    if refusals:
        raise refusals[0]
    printer.json(facts)
    return 0


def print_plan(facts: Json, plan: Plan, printer: Printer) -> None:
    """Print what describe_plan found."""
    from moeconv.cli.estimate_report import plan_line
    from moeconv.cli.inspect import options_text
    from moeconv.cli.plan_report import serve_warning, source_line
    from moeconv.store.space import human

    memory, disk, options = facts["memory"], facts["disk"], options_text(facts["options"])
    already = f", {human(disk['already_nbytes'])} of it there" if disk["already_nbytes"] else ""
    chosen = [file for file in facts["files"] if file["written"]]
    of_all = f" of {len(facts['files']):,}" if len(chosen) < len(facts["files"]) else ""
    printer.pairs(
        [
            ("source", f"{facts['source']['path']} ({facts['family']})"),
            ("output", f"{facts['dst']}: {facts['layout']} {options}".rstrip()),
            ("action", ACTIONS[facts["action"]]),
            ("files", f"{len(chosen):,}{of_all}, {human(sum(file['nbytes'] for file in chosen))}"),
            ("tasks", f"{facts['tasks']:,}"),
            (
                "memory",
                f"{human(memory['nbytes'])} in flight, {memory['jobs']} tasks at once; needs at "
                f"least --memory {human(memory['floor_nbytes'])}",
            ),
            ("device", ", ".join(facts["devices"])),
            (
                "disk",
                f"{human(disk['needed_nbytes'])} needed{already}, "
                f"{human(disk['free_nbytes'])} free",
            ),
            ("estimate", plan_line(facts)),
            ("plan", facts["plan"]),
        ]
    )
    printer.line()
    print_accounting(facts["accounting"], printer)
    printer.line(source_line(facts["accounting"], facts["source"]))
    printer.line()
    print_files(facts, printer)
    for note in facts["notes"]:
        printer.warn(note)
    if facts["serve"]:
        printer.line(f"  serve: {facts['serve']}")
    if warning := serve_warning(plan):
        printer.warn(warning)


def print_accounting(facts: Json, printer: Printer) -> None:
    """Print how many source tensors end in which state, and what is dropped by which rule."""
    from moeconv.cli.tables import some
    from moeconv.store.space import human

    printer.table(
        ("source tensors", ">tensors", ">bytes"),
        [
            (state, f"{one['tensors']:,}", human(one["nbytes"]))
            for state, one in facts["source"].items()
            if one["tensors"]
        ],
    )
    for rule, names in facts["dropped"].items():
        printer.line(f"  dropped, {rule}: {some(names, len(names) if printer.verbose else 3)}")


def print_files(facts: Json, printer: Printer) -> None:
    """Print the files of an output, the first few without -v."""
    files = facts["files"]
    shown = files if printer.verbose else files[:_SHOWN]
    experts = facts["layout_facts"].get("experts") if facts["options"].get("ep") else None
    heads = ["file", ">tensors", ">bytes", "experts"]
    printer.table(
        heads if experts else heads[:3],
        [
            (
                file["name"],
                f"{file['tensors']:,}",
                f"{file['nbytes']:,}",
                *([show_numbers(experts[file["rank"]])] if experts else []),
            )
            for file in shown
        ],
    )
    if len(shown) < len(files):
        printer.line(f"... and {len(files) - len(shown):,} more files (-v lists them)")
