"""moeconv bench: how fast are kernels, memory and disk here, and what bounds a conversion?"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from moeconv.cli.convert import Stop, handled_signals
from moeconv.cli.options import DEVICE, JOBS, RUNNING, SRC, Row, shape_options
from moeconv.cli.plan import make_plan, make_resources
from moeconv.cli.tables import Printer
from moeconv.errors import Refused, UsageError
from moeconv.types import Json

if TYPE_CHECKING:
    from moeconv.device.choose import Wanted
    from moeconv.device.speed import Effort as DeviceEffort
    from moeconv.estimate import Estimate
    from moeconv.measure.figures import Device, Disk, Figures, Rates
    from moeconv.measure.machine import Effort
    from moeconv.plan import Plan

ROWS: tuple[Row, ...] = (
    SRC._replace(
        help="A model to estimate the conversion of, with the options that convert takes."
        " (default: none)",
        metavar="[SRC]",
        optional=True,
    ),
    Row(
        "dst",
        "text",
        "Where outputs will go: the disk of this directory, or of the nearest above it that is"
        " there, is measured. (default: the current directory)",
        RUNNING,
        metavar="DIR",
    ),
    DEVICE,
    JOBS,
)
WRITERS = 8  # of the disk at most; as many as tasks in flight where those are fewer


class Measured(NamedTuple):
    """What a run found; `kept`: the file that plan reads it from; `note`: what was left out."""

    figures: Figures
    kept: Path | None
    directory: Path
    plan: Plan | None
    estimate: Estimate | None
    note: str


class Said:
    """Tells on stderr what is being measured: on a terminal in one line that changes."""

    def __init__(self, silent: bool) -> None:
        self._silent = silent
        self._terminal = sys.stderr.isatty()
        self._part = ""

    def __call__(self, part: str, detail: str) -> None:
        """Tell a part, and what of it."""
        if self._silent:
            return
        with contextlib.suppress(OSError):  # nobody reads: no reason to stop measuring
            if self._terminal:
                text = f"measuring {part}: {detail}" if detail else f"measuring {part}"
                line = f"\r\x1b[K{text}" if part else "\r\x1b[K"
                print(line, end="", file=sys.stderr, flush=True)
            elif part and part != self._part:
                print(f"measuring {part}", file=sys.stderr, flush=True)
        self._part = part


def choose_effort(threads: int, jobs: int) -> Effort:
    """Return how much to run: about twenty seconds."""
    from moeconv.measure.disk import Effort as DiskEffort
    from moeconv.measure.kernels import Effort as KernelEffort
    from moeconv.measure.machine import Effort

    tiles = max(16, 4 * threads)
    kernels = KernelEffort(tiles=tiles, passes=4, repeats=3, threads=threads)
    return Effort(kernels, DiskEffort(threads=min(jobs, WRITERS)))


def bench_command(values: Mapping[str, Json]) -> int:
    """Measure this machine's disk, memory and kernels; with SRC, estimate its conversion.

    Takes about twenty seconds; the first run also compiles every kernel, which takes a minute or
    two. The figures are kept in the user's cache directory, where plan finds them for its
    estimate. The disk is measured with files of 0.5 GB in a directory that is removed at the end.
    """
    stop = Stop()
    stop.state = ("no figures are kept", "the same command measures again")
    with handled_signals(stop):
        measured = _measure(values)
    printer = Printer(values)
    printer.json(describe(measured))
    if not printer.silent:
        print_measured(measured, printer)
    return 0


def _measure(values: Mapping[str, Json]) -> Measured:
    alone = "src" not in values
    for name in (*shape_options(values), "config"):
        if alone and name in values:
            option = name.replace("_", "-")
            raise UsageError(f"--{option} goes with a SRC", hint="moeconv bench SRC with it")
    plan = None if alone else make_plan(values)

    from moeconv.device.choose import wanted_device
    from moeconv.measure.disk import nearest_directory
    from moeconv.measure.machine import measure
    from moeconv.measure.stored import save_figures
    from moeconv.resources import choose_limits
    from moeconv.store.space import cpu_count

    resources = make_resources(values)
    jobs = choose_limits(resources).jobs
    wanted = wanted_device(resources.device, resources.vram_nbytes)
    directory = nearest_directory(Path(values.get("dst", ".")))
    sources = list(plan.model.source.files.values()) if plan else []
    effort = choose_effort(cpu_count(), jobs)
    say = Said(bool(values.get("json") or values.get("quiet")))
    try:
        devices, note = measure_devices(wanted, directory, effort, say)
        figures = measure(directory, sources, effort, say)
    finally:
        say("", "")
    figures = replace(figures, devices=devices)
    kept = save_figures(figures)
    found = _estimate(plan, directory, figures, (wanted, jobs)) if plan else None
    return Measured(figures, kept, directory, plan, found, note)


def measure_devices(
    wanted: Wanted, directory: Path, effort: Effort, say: Said
) -> tuple[dict[str, Device], str]:
    """Return what the GPU that may be used does, and why none is measured that is there.

    One stands for all: those of a machine are alike. Refused for one that cannot be used.
    """
    if not wanted.cards:
        return {}, ""
    card = wanted.cards[0]
    try:
        from moeconv.device.open import open_gpus

        open_gpus([card], wanted.vram_nbytes, halve=False).close()
    except (Refused, ImportError) as error:
        if wanted.insist:
            raise
        return {}, f"{card.name} is not measured: {error}".splitlines()[0]
    import torch

    from moeconv.device.speed import measure_device
    from moeconv.measure.disk import workplace
    from moeconv.measure.start import start_seconds

    name = f"cuda:{card.number}"
    say("the device", "start-up")
    with workplace(directory, effort.disk) as place:
        seconds = start_seconds(place, effort.starts, name)
    return {card.name: measure_device(torch.device(name), seconds, choose_device_effort(), say)}, ""


def choose_device_effort() -> DeviceEffort:
    """Return how much a GPU runs."""
    from moeconv.device.speed import Effort as DeviceEffort

    return DeviceEffort()


def _estimate(
    plan: Plan, directory: Path, figures: Figures, given: tuple[Wanted, int]
) -> Estimate | None:
    """Return the estimate of a plan on the GPUs that convert would use, of so many tasks."""
    from moeconv.cli.estimate_report import Means, estimate_plan
    from moeconv.device.choose import uses_gpus
    from moeconv.device.ways import decoded_by
    from moeconv.tasks import build_tasks

    wanted, jobs = given
    tasks = build_tasks(plan.weights, plan.files)
    usable = wanted.cards if figures.devices else ()
    decoded = decoded_by(tasks, plan.weights, plan.files) if usable else None
    cards = usable if uses_gpus(wanted, decoded) else ()
    return estimate_plan(plan, tasks, figures, Means(directory, jobs, cards))


def describe(measured: Measured) -> dict[str, Json]:
    """Return what was measured as JSON values."""
    from moeconv.cli.estimate_report import describe_estimate
    from moeconv.measure.figures import as_json
    from moeconv.measure.host import describe_machine

    plan = measured.plan
    return {
        "machine": describe_machine(),
        "directory": str(measured.directory),
        "figures": as_json(measured.figures),
        "kept": measured.kept and str(measured.kept),
        "source": str(plan.model.source.root) if plan else None,
        "layout": plan.options.layout if plan else None,
        "estimate": describe_estimate(measured.estimate) if measured.estimate else None,
        "note": measured.note,
    }


def print_measured(measured: Measured, printer: Printer) -> None:
    """Print tables of what was measured, and the estimate."""
    from moeconv.cli.estimate_report import print_estimate
    from moeconv.measure.host import describe_machine

    figures, threads = measured.figures, measured.figures.threads
    printer.pairs(
        [
            ("machine", describe_machine()),
            ("kept in", str(measured.kept) if measured.kept else "nowhere: no cache directory"),
            ("start-up", f"{figures.start_seconds:.2f} s, of a conversion of next to nothing"),
        ]
    )
    for disk in figures.disks.values():
        _print_disk(disk, measured, printer)
    for title, rows in _tables(figures):
        printer.line()
        heads = (f"{title}: GB/s of output", ">1 thread", f">{threads} threads", ">times as much")
        roofs = (">of the roofline", f">with {threads}") if any(one.roof for one in rows) else ()
        printer.table((*heads, *roofs), [_cells(one)[: 4 + len(roofs)] for one in rows])
    for name, device in figures.devices.items():
        _print_device(name, device, printer)
    if measured.note:
        printer.warn(measured.note)
    if measured.estimate:
        printer.line()
        print_estimate(measured.estimate, printer)


def _print_device(name: str, device: Device, printer: Printer) -> None:
    printer.line()
    printer.table(
        (f"{name}: GB/s", ">"),
        [
            ("host to device", f"{device.up:.1f}"),
            ("device to host", f"{device.down:.1f}"),
            ("copy on it, read and written", f"{device.copy:.0f}"),
        ],
    )
    printer.line()
    printer.table(
        ("its kernels: GB/s of output", ">", ">of the copy's bytes"),
        [
            (one.title, f"{one.one:.0f}", f"{one.one / one.roof:.0%}")
            for one in device.rates.values()
        ],
    )


def _tables(figures: Figures) -> list[tuple[str, list[Rates]]]:
    """Return the tables of rates: memory, what every conversion does beside, kernels."""
    from moeconv.measure.figures import MEMORY, WORKS

    tables: dict[str, list[Rates]] = {"memory": [], "beside them": [], "kernels": []}
    for key, rates in figures.rates.items():
        kind = "beside them" if key in WORKS else "kernels"
        tables["memory" if key.startswith(MEMORY) else kind].append(rates)
    return list(tables.items())


def _print_disk(disk: Disk, measured: Measured, printer: Printer) -> None:
    rows = [one for one in (disk.write, disk.read) if one is not None]
    way = "past the page cache" if disk.direct else "through the page cache"
    printer.line()
    printer.table(
        ("disk: GB/s", ">1 thread", f">{disk.threads} threads", ">times as much"),
        [(_where(one, measured, way), *_cells(one)[1:4]) for one in rows],
    )


def _where(rates: Rates, measured: Measured, way: str) -> str:
    if rates.title == "write":
        return f"write {measured.directory}, {way}"
    return f"read {measured.plan.model.source.root if measured.plan else measured.directory}"


def _cells(rates: Rates) -> tuple[str, ...]:
    cells = (rates.title, f"{rates.one:.2f}", f"{rates.all:.2f}", f"{rates.all / rates.one:.2f}")
    if not rates.roof:
        return (*cells, "", "")
    return (*cells, f"{rates.one / rates.roof:.0%}", f"{rates.all / rates.roof_all:.0%}")
