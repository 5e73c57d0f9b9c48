"""The command line: a thin layer over moeconv.inspect, plan, convert and verify."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Annotated, Any

import typer

from moeconv import __version__
from moeconv.cli.commands import COMMANDS
from moeconv.cli.failures import run_guarded
from moeconv.cli.options import with_options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: no file of ours may get its descriptor
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # A name may have bytes that are no text, a terminal no letter for what is printed.
            stream.reconfigure(errors="backslashreplace")
    command = build()

    def run() -> int:
        found = command.main(args=given, prog_name="moeconv", standalone_mode=False)
        return found if isinstance(found, int) else 0

    code = run_guarded(run, given)
    for stream in (sys.stdout, sys.stderr):  # the process ends without doing so
        with contextlib.suppress(OSError):
            stream.flush()
    sys.exit(code)


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
