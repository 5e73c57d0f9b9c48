"""What typer makes of the rows: the command line with its help, its errors and its completion."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from functools import cache
from typing import Annotated, Any

import typer

from moeconv import __version__
from moeconv.cli.commands import COMMANDS
from moeconv.cli.options import PARSERS, Row, flags_of

# Option -> what it is where it was not given.
_EMPTY: Mapping[str, Any] = {"flag": False}


def build() -> Any:
    """Return the command with all of its subcommands, as click has it."""
    return typer.main.get_command(make_app())


def make_app() -> typer.Typer:
    """Return the typer application."""
    app = typer.Typer(
        name="moeconv",
        help="Offline converter for mixture-of-experts checkpoints.",
        context_settings={"help_option_names": ["-h", "--help"]},
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
    )
    app.callback(invoke_without_command=True)(_root)
    for name, function, rows in COMMANDS:
        app.command(name)(with_options(function, rows))
    return app


def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", show_default=False)
    ] = False,
) -> None:
    """Offline converter for mixture-of-experts checkpoints."""
    if version:
        print(f"moeconv {__version__}")
        raise typer.Exit(0)
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


@cache
def _choice(name: str, choices: tuple[str, ...]) -> Any:
    return Enum(name, {choice: choice for choice in choices}, type=str)


def _annotation(row: Row) -> Any:
    """Return the type and typer's description of a row."""
    metavar = row.value_name or None
    if row.argument:
        kind = str | None if row.optional else str
        return Annotated[kind, typer.Argument(help=row.help, metavar=metavar, show_default=False)]
    flags = flags_of(row)
    shared: dict[str, Any] = {
        "help": row.help,
        "rich_help_panel": row.panel,
        "show_default": False,
    }
    if row.kind == "flag":
        return Annotated[bool, typer.Option(*flags, **shared)]
    if row.kind == "choice":
        kind = _choice(row.name, row.choices)
        return Annotated[kind | None, typer.Option(*flags, **shared)]
    shared["metavar"] = metavar
    if row.kind == "number":
        return Annotated[int | None, typer.Option(*flags, min=row.least, **shared)]
    if row.kind == "texts":
        return Annotated[list[str] | None, typer.Option(*flags, **shared)]
    if row.kind in PARSERS:
        parser = PARSERS[row.kind]
        return Annotated[Any, typer.Option(*flags, parser=parser, **shared)]
    return Annotated[str | None, typer.Option(*flags, **shared)]


def _default(row: Row) -> Any:
    if row.argument and not row.optional:
        return inspect.Parameter.empty
    return _EMPTY.get(row.kind)


def with_options(
    function: Callable[[Mapping[str, Any]], int], rows: Sequence[Row]
) -> Callable[..., int]:
    """Return a command that typer reads these rows from, and that calls `function` with the values.

    Choices come as text; what was not given is left out.
    """
    parameters = [
        inspect.Parameter(
            row.name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=_annotation(row),
            default=_default(row),
        )
        for row in rows
    ]

    def command(**values: Any) -> int:
        plain = {
            name: value.value if isinstance(value, Enum) else value
            for name, value in values.items()
            if value is not None and value is not False and value != []
        }
        return function(plain)

    command.__doc__ = function.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command
