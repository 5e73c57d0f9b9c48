"""What commands print: tables and lines on stdout, never cut off where it is no terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from moeconv.types import Json

if TYPE_CHECKING:
    from rich.console import Console

PIPED_COLUMNS = 1 << 16  # rich would cut names at 80 columns


def make_console(*, stderr: bool = False) -> Console:
    """Return a console on stdout or stderr; it respects NO_COLOR and marks up nothing by itself."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PIPED_COLUMNS
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


class Printer:
    """Prints the report of a command, as JSON or for people; nothing but JSON when `quiet`."""

    def __init__(self, options: Mapping[str, Json]) -> None:
        self.as_json = bool(options.get("json"))
        self.verbose = bool(options.get("verbose"))
        self.quiet = bool(options.get("quiet"))
        self.silent = self.quiet or self.as_json
        self._console: Console | None = None

    @property
    def console(self) -> Console:
        """Return the console on stdout, made when first used."""
        if self._console is None:
            self._console = make_console()
        return self._console

    def json(self, value: Json) -> None:
        """Print the one object of --json."""
        if self.as_json:
            sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")

    def line(self, text: str = "", style: str | None = None) -> None:
        """Print a line."""
        if not self.silent:
            self.console.print(text, style=style, soft_wrap=True)

    def done(self, text: str) -> None:
        """Print what succeeded."""
        self.marked("✓", text, "green")

    def warn(self, text: str) -> None:
        """Print what deserves a look."""
        self.marked("!", text, "yellow")

    def marked(self, mark: str, text: str, style: str) -> None:
        """Print a line after a coloured mark."""
        if not self.silent:
            from rich.text import Text

            self.console.print(Text.assemble((mark, style), " ", text), soft_wrap=True)

    def pairs(self, rows: Iterable[tuple[str, str]]) -> None:
        """Print names and values, the values below one another."""
        kept = [(name, value) for name, value in rows if value]
        width = max((len(name) for name, _ in kept), default=0)
        for name, value in kept:
            self.line(f"{name:<{width}}  {value}")

    def table(self, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Print a table; columns whose head starts with ">" are aligned to the right."""
        if self.silent:
            return
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for head in heads:
            justify = "right" if head.startswith(">") else "left"
            table.add_column(Text(head.lstrip(">")), justify=justify, overflow="fold")  # type: ignore[arg-type]
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        self.console.print(table)


def human_seconds(seconds: float) -> str:
    """Return a duration as 0.8s, 42s, 3m21s or 2h05m."""
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def some(names: Sequence[str], most: int) -> str:
    """Return names as a list, the first `most` of them and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
