"""The reference page of the command line: python -m moeconv.cli.reference > docs/cli.md"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence

from moeconv.cli.commands import COMMANDS, Entry
from moeconv.cli.failures import BUG, PIPE_CLOSED
from moeconv.cli.options import Row, flags_of
from moeconv.errors import (
    BadSource,
    Interrupted,
    IOFailed,
    Locked,
    MoeconvError,
    Refused,
    Stopped,
    UsageError,
    VerifyFailed,
)

_INTRO = """# Command line

<!-- Made by `python -m moeconv.cli.reference > docs/cli.md`; a test fails where it is stale. -->

Tables and results go to stdout, progress and errors to stderr. `--json` prints one object on
stdout and nothing else there. Sizes take `KB MB GB TB` (powers of 1000), `KiB MiB GiB TiB` (powers
of 1024) or a plain number of bytes; lists of numbers look like `0,3-5`. `NO_COLOR` is respected,
and what is piped is never cut to the width of a terminal.

`moeconv --version` prints the version, `moeconv --install-completion` teaches the shell to complete
names and options.
"""
_ERRORS: tuple[type[MoeconvError], ...] = (
    UsageError,
    Refused,
    BadSource,
    VerifyFailed,
    Locked,
    IOFailed,
    Stopped,
    Interrupted,
)
_RESUME = """## Resuming

The same command again continues a conversion that was stopped, killed or ran out of disk. Ctrl-C
and SIGTERM let the tasks in flight finish; a second Ctrl-C exits at once, and nothing that is done
is lost.

| DST holds | what convert does |
|---|---|
| nothing | converts |
| the finished output of the same plan and source | says so, checks names and sizes, exits with 0 |
| an unfinished output of the same plan and source | continues |
| an output of another plan, source or format version | refuses (3); `--overwrite` starts anew |
| an output, and weights, an index or a config.json that moeconv did not write | \
refuses (3), always, and names them; files that no loader reads stay as they are |
| an output of which moeconv's own record is damaged | refuses (3), always: remove it yourself |
| anything else that moeconv did not write | refuses (3), always |
"""


def reference() -> str:
    """Return the page."""
    parts = [_INTRO, *(_command(entry) for entry in COMMANDS), _RESUME, _exit_codes()]
    return "\n".join(parts)


def _command(entry: Entry) -> str:
    arguments = [row.metavar for row in entry.rows if row.argument]
    usage = " ".join(["moeconv", entry.name, *arguments, "[OPTIONS]"])
    lines = [f"## moeconv {entry.name}", "", "```", usage, "```", ""]
    lines += [inspect.getdoc(entry.function) or "", ""]
    lines += [f"- `{row.metavar.strip('[]')}`: {row.help}" for row in entry.rows if row.argument]
    if arguments:
        lines.append("")
    same = next(one for one in COMMANDS if one.rows == entry.rows)
    if same != entry:
        lines += [f"The options are those of `moeconv {same.name}` above.", ""]
        return "\n".join(lines)
    for panel, rows in _panels(entry.rows):
        lines += [f"| {panel} | |", "|---|---|"]
        lines += [f"| `{_option(row)}` | {_escaped(row.help)} |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def _panels(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Yield the options by panel, in the order of their first rows."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if not row.argument:
            found.setdefault(row.panel, []).append(row)
    yield from found.items()


def _option(row: Row) -> str:
    flags = ", ".join(reversed(flags_of(row)))
    value = "\\|".join(row.choices) or row.value_name
    return f"{flags} {value}".rstrip()


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _exit_codes() -> str:
    lines = ["## Exit codes", "", "| code | meaning |", "|---|---|", "| 0 | Done. |"]
    lines.append(f"| {BUG} | A bug in moeconv; `-v` prints a traceback. |")
    for error in _ERRORS:
        meaning = (inspect.getdoc(error) or "").partition("\n")[0]
        lines.append(f"| {error.exit_code} | {meaning} |")
    lines.append(f"| {PIPE_CLOSED} | What read stdout went away. |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(reference())
