"""Errors -> one block on stderr (or one JSON object on stdout) and the exit code."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence

import typer

from moeconv.errors import Interrupted, IOFailed, MoeconvError, UsageError
from moeconv.types import Json

BUG = 1
PIPE_CLOSED = 141  # 128 + SIGPIPE, as a shell reports programs that do not ignore it
# The class of every usage error, whether typer brings its own click or imports the package.
ClickError: type[Exception] = typer.BadParameter.__mro__[2]
PRINTING = ("moeconv.cli", "rich", "typer", "click")  # no other file is written in these


def run_guarded(command: Callable[[], int], arguments: Sequence[str]) -> int:
    """Return the exit code of a command, its error printed."""
    try:
        code = command()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        return _closed()
    except KeyboardInterrupt:
        return report(Interrupted("interrupted", hint="the same command starts again"), arguments)
    except SystemExit as stop:
        # Only rich and typer leave so: when what they print on was closed.
        return _closed() if stop.code == 1 else int(stop.code or 0)
    except Exception as error:  # noqa: BLE001  # the last place where a bug can be told from a crash
        return report(error, arguments)


def report(error: Exception, arguments: Sequence[str]) -> int:
    """Print an error in the form that the arguments ask for; return the exit code."""
    verbose = any(one == "--verbose" or _has_letter(one, "v") for one in arguments)
    known = as_known(error)
    if known is None and verbose:
        traceback.print_exception(error, file=sys.stderr)
    if "--json" in arguments:
        facts = json.dumps(error_facts(error, verbose=verbose), indent=1, ensure_ascii=False)
        with contextlib.suppress(OSError):  # where stdout takes nothing, stderr says it
            print(facts, flush=True)
            return known.exit_code if known else BUG
    shown = known or _bug(error, verbose=verbose)
    with contextlib.suppress(OSError):
        print(f"{type(known or error).__name__}: {shown}", file=sys.stderr)
    return known.exit_code if known else BUG


def error_facts(error: Exception, *, verbose: bool = False) -> dict[str, Json]:
    """Return an error and its exit code as --json gives them."""
    known = as_known(error)
    shown = known or _bug(error, verbose=verbose)
    facts = {"kind": type(known or error).__name__, "what": shown.what}
    facts |= {"where": shown.where, "hint": shown.hint}
    return {"error": facts, "exit_code": known.exit_code if known else BUG}


def as_known(error: Exception) -> MoeconvError | None:
    """Return an error as one of moeconv's own; None for a bug."""
    if isinstance(error, MoeconvError):
        return error
    if isinstance(error, OSError):
        name = error.filename
        where = os.fsdecode(name) if isinstance(name, str | bytes) else ""
        what = f"the system refused: {error.strerror or error}"
        if not where and _is_of_stdout(error):
            return IOFailed(what, where="stdout", hint="check where stdout goes, and its disk")
        return IOFailed(what, where=where, hint="check the path, its rights and its disk")
    return _as_usage(error)


def _is_of_stdout(error: OSError) -> bool:
    """Return whether an error came up where reports are printed."""
    module = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = str(frame.f_globals.get("__name__"))
    return any(module == one or module.startswith(f"{one}.") for one in PRINTING)


def _as_usage(error: Exception) -> MoeconvError | None:
    """Return one of typer's errors as one of moeconv's; None for any other."""
    if isinstance(error, ClickError):
        what = error.format_message()  # type: ignore[attr-defined]  # click's
        # Only choices have it: the words of what typer checks them with.
        return UsageError(what.replace(": Value error, ", ": ", 1), hint=_usage_hint(error))
    return Interrupted("interrupted") if isinstance(error, typer.Abort) else None


def _usage_hint(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    path = getattr(context, "command_path", "moeconv")
    return f"{path} --help lists what there is"


def _bug(error: Exception, *, verbose: bool) -> MoeconvError:
    """Return what to say of an error that nobody expected."""
    lines = "what it prints" if not verbose else "the lines above"
    again = "" if verbose else "run the command again with -v and "
    return MoeconvError(
        str(error).strip() or "no message",
        hint=f"this is a bug in moeconv: {again}report {lines}",
    )


def _has_letter(argument: str, letter: str) -> bool:
    return (
        argument[:1] == "-"
        and argument[1:2] != "-"
        and letter in argument
        and argument[1:].isalpha()
    )


def _closed() -> int:
    """Return the exit code for a reader that went away; Python's last flush goes nowhere."""
    with contextlib.suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
    return PIPE_CLOSED
