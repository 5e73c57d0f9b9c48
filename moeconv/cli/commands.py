"""The commands: name, what it does, its arguments and options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from moeconv.cli import options
from moeconv.cli.bench import ROWS as BENCH_ROWS
from moeconv.cli.bench import bench_command
from moeconv.cli.convert import convert_command
from moeconv.cli.demo import demo_command
from moeconv.cli.formats import formats_command
from moeconv.cli.inspect import inspect_command
from moeconv.cli.options import Row
from moeconv.cli.plan import plan_command
from moeconv.cli.verify import verify_command
from moeconv.types import Json


class Entry(NamedTuple):
    """One command."""

    name: str
    function: Callable[[Mapping[str, Json]], int]
    rows: tuple[Row, ...]


_WHOLE = (
    options.SRC,
    options.DST,
    *options.SHAPE,
    options.CONFIG,
    options.ORIENTATION,
    *options.RESOURCES,
    options.VERIFY,
    options.PROGRESS,
)
COMMANDS: tuple[Entry, ...] = (
    Entry(
        "inspect",
        inspect_command,
        (
            options.SRC._replace(help=f"{options.SRC.help} Or an output of moeconv."),
            options.CONFIG,
            options.ORIENTATION,
            *options.COMMON,
        ),
    ),
    Entry("plan", plan_command, (*_WHOLE, *options.COMMON)),
    Entry("convert", convert_command, (*_WHOLE, *options.COMMON)),
    Entry(
        "verify",
        verify_command,
        (
            options.DST._replace(help="A finished output of moeconv."),
            *options.CHECK,
            *options.EFFORT,
            options.PROGRESS,
            *options.COMMON,
        ),
    ),
    Entry(
        "bench",
        bench_command,
        (
            *BENCH_ROWS,
            *options.SHAPE,
            options.CONFIG,
            options.ORIENTATION,
            *options.COMMON,
        ),
    ),
    Entry("demo", demo_command, (options.DEMO, *options.COMMON)),
    Entry("formats", formats_command, options.COMMON),
)
