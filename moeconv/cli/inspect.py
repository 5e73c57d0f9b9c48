"""moeconv inspect: what is this checkpoint, or this output?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from moeconv.cli.parse import show_numbers
from moeconv.cli.tables import Printer, some
from moeconv.types import Json

_SHOWN = 8  # files and notes without -v


def inspect_command(values: Mapping[str, Json]) -> int:
    """Say what a checkpoint, or an output of moeconv, is. Reads headers only."""
    from moeconv.destination import examine

    path = Path(values["src"])
    printer = Printer(values)
    found = examine(path) if path.is_dir() else None
    if found is not None and found.state in ("finished", "unfinished", "damaged"):
        from moeconv.cli.output_report import describe_output
        from moeconv.finished import read_finished

        finished = None
        if found.state != "unfinished":
            finished = read_finished(path)  # a damaged manifest is not to be believed

        facts = describe_output(path, found, finished)
        printer.json(facts)
        if not printer.silent:
            print_output(facts, printer)
        return 0
    from moeconv.api import inspect
    from moeconv.cli.model_report import describe_model

    model = inspect(path, config=values.get("config"), orientation=values.get("orientation"))
    facts = describe_model(model)
    printer.json(facts)
    if not printer.silent:
        print_model(facts, printer)
    return 0


def print_model(facts: Json, printer: Printer) -> None:
    """Print what describe_model found."""
    from moeconv.cli.model_report import layers_text
    from moeconv.store.space import human

    sizes = facts["sizes"]
    files = facts["files"]
    printer.pairs(
        [
            ("source", facts["path"]),
            ("family", facts["family"]),
            ("model_type", facts["model_type"] or ""),
            ("layers", layers_text(facts)),
            ("experts", " or ".join(str(count) for count in facts["experts"])),
            ("hidden", _number(sizes["hidden"])),
            ("intermediate", " or ".join(str(one) for one in sizes["intermediate"])),
            ("vocabulary", _number(sizes["vocab"])),
            ("quantization", facts["quantization"]["summary"]),
            ("files", f"{len(files):,} {facts['format']}, {human(facts['nbytes'])} of tensors"),
            ("beside them", some(facts["auxiliary"], 1000 if printer.verbose else _SHOWN)),
        ]
    )
    printer.line()
    printer.table(
        ("role", "codec", "stored as", ">weights", ">tensors", ">bytes", "decoded shape"),
        [_role_cells(row) for row in facts["roles"]],
    )
    remarks = [*facts["oddities"], *facts["notes"]]
    if remarks:
        printer.line()
    for remark in remarks:
        printer.warn(remark)
    if printer.verbose:
        printer.line()
        printer.table(("file", ">bytes"), [(one["name"], f"{one['nbytes']:,}") for one in files])


def _role_cells(row: Json) -> tuple[str, ...]:
    from moeconv.store.space import human

    shapes = row["shapes"]
    more = f" and {len(shapes) - 1} more" if len(shapes) > 1 else ""
    return (
        row["role"],
        row["codec"],
        " + ".join(row["dtypes"]),
        f"{row['weights']:,}",
        f"{row['tensors']:,}",
        human(row["nbytes"]),
        f"{shapes[0]}{more}",
    )


def _number(value: Json) -> str:
    return "" if value is None else f"{value:,}"


def print_output(facts: Json, printer: Printer) -> None:
    """Print what describe_output found."""
    from moeconv.store.space import human

    files = facts["files"]
    done = sum(file["done_nbytes"] for file in files)
    state = facts["state"]
    if state == "unfinished":
        state += f": {human(done)} are done; the command that began it continues"
    printer.pairs(
        [
            ("output", facts["path"]),
            ("state", state),
            ("layout", f"{facts['layout']}{', a part of the model' if facts['partial'] else ''}"),
            ("family", facts["family"] or ""),
            ("ranks", str(facts["ranks"]) if facts["layout"] == "vllm" else ""),
            ("options", options_text(facts["options"])),
            ("files", f"{len(files):,}, {human(facts['nbytes'])}"),
            ("experts", _counts(facts["experts"])),
            ("source", facts["source"] or ""),
            ("plan", facts["plan"] or ""),
            ("made by", f"moeconv {facts['made_by']}" if facts["made_by"] else ""),
        ]
    )
    if facts["map"] and facts["layout"] != "hf":
        printer.line()
        _print_map(facts["map"], printer)
    printer.line()
    printer.table(
        ("file", ">rank", ">tensors", ">bytes", "state"),
        [
            (
                file["name"],
                _number(file["rank"]),
                _number(file["tensors"]),
                _number(file["nbytes"]),
                file["state"],
            )
            for file in files
        ],
    )
    for note in facts["notes"]:
        printer.warn(note)


def _print_map(rows: Json, printer: Printer) -> None:
    """Print which experts, bytes and pages lie on which rank or NUMA part."""
    parts = any(row["numa"] is not None for row in rows)
    place = "numa" if parts else "rank"
    printer.table(
        (f">{place}", "experts", ">tensors", ">bytes", ">4 KiB pages", ">shared with others"),
        [
            (
                _number(row[place]),
                show_numbers(row["experts"]),
                _number(row["tensors"]),
                _number(row["nbytes"]),
                _number(row["pages"]),
                _number(row["shared_pages"]),
            )
            for row in rows
        ],
    )


def _counts(experts: Json) -> str:
    return f"{experts['nan']:,} NaN, {experts['inf']:,} Inf" if isinstance(experts, dict) else ""


def options_text(options: Mapping[str, Json]) -> str:
    """Return the options that are not the default ones, as the command line writes them."""
    from moeconv.layouts.options import Options
    from moeconv.plan import option_facts

    default = option_facts(Options())
    words = []
    for name, value in options.items():
        if name == "layout" or value == default.get(name):
            continue
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif isinstance(value, list) and all(isinstance(one, int) for one in value):
            words.append(f"{flag} {show_numbers(value)}")
        else:
            words.append(f"{flag} {value}")
    return " ".join(words)
