"""How far a conversion is: a bar on a terminal, lines elsewhere, both on stderr."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from moeconv.store.space import human, process_peak_rss

if TYPE_CHECKING:
    from moeconv.execute import Progress

LINE_SECONDS = 10.0
LINE_SHARE = 0.05
QUIET_SECONDS = 1.0  # a small model would print twenty lines at once
_UNITS = (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3), ("B", 1))


class Meter:
    """Rate and time left, from when it was made."""

    def __init__(self, layers: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._layers = layers
        self._clock = clock
        self.start = clock()

    def seconds(self) -> float:
        """Return the seconds since the start."""
        return self._clock() - self.start

    def text(self, progress: Progress) -> str:
        """Return bytes, rate, time left, layer and memory of a moment."""
        seconds = max(self.seconds(), 1e-9)
        rate = progress.done_nbytes / seconds
        left = progress.total_nbytes - progress.done_nbytes
        parts = [amounts(progress.done_nbytes, progress.total_nbytes), f"{human(int(rate))}/s"]
        parts.append(f"eta {clock_text(left / rate)}" if rate else "eta -")
        if progress.layer is not None:
            of = f"/{self._layers}" if self._layers else ""
            parts.append(f"layer {progress.layer + 1 if of else progress.layer}{of}")
        parts.append(f"ram {human(resident_nbytes())}")
        return "  ".join(parts)


def amounts(done_nbytes: int, total_nbytes: int) -> str:
    """Return two amounts in the unit of the larger: 179.6/264.0 GB."""
    unit, factor = next((one for one in _UNITS if total_nbytes >= one[1]), _UNITS[-1])
    if factor == 1:
        return f"{done_nbytes}/{total_nbytes} B"
    return f"{done_nbytes / factor:.1f}/{total_nbytes / factor:.1f} {unit}"


def clock_text(seconds: float) -> str:
    """Return a time left as 1:04 or 2:05:30."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, last = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{last:02d}" if hours else f"{minutes}:{last:02d}"


def resident_nbytes() -> int:
    """Return the memory that this process holds now; the most it held where that is not told."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return process_peak_rss()
    return pages * os.sysconf("SC_PAGE_SIZE")


class Shower(Protocol):
    """What shows the progress of a run."""

    def __call__(self, progress: Progress) -> None:
        """Show a moment of a run."""
        ...


class Lines:
    """A line every LINE_SECONDS or LINE_SHARE of the bytes, and one at the end."""

    def __init__(self, meter: Meter, doing: str) -> None:
        self._meter = meter
        self._doing = doing
        self._shown = (0.0, 0.0)  # seconds, share
        self._open = True

    def __call__(self, progress: Progress) -> None:
        """Print a line if it is time for one."""
        seconds = self._meter.seconds()
        share = progress.done_nbytes / max(progress.total_nbytes, 1)
        waited, gained = seconds - self._shown[0], share - self._shown[1]
        due = waited >= LINE_SECONDS or (gained >= LINE_SHARE and waited >= QUIET_SECONDS)
        if not due and progress.done_tasks < progress.total_tasks:
            return
        self._shown = (seconds, share)
        self._print(f"{self._doing}  {int(share * 100):3d}%  {self._meter.text(progress)}")

    def _print(self, line: str) -> None:
        if not self._open:
            return
        try:
            print(line, file=sys.stderr, flush=True)
        except OSError:
            self._open = False  # nobody reads any more: no reason to stop converting


def choose(wanted: str) -> str:
    """Return bar, plain or none for what --progress says."""
    if wanted != "auto":
        return wanted
    on_terminal = sys.stderr.isatty() and os.environ.get("TERM", "") != "dumb"
    return "bar" if on_terminal else "plain"


@contextmanager
def shown(wanted: str, layers: int | None, doing: str = "converting") -> Iterator[Shower | None]:
    """Give what shows the progress of a run; None for --progress none."""
    kind = choose(wanted)
    meter = Meter(layers)
    if kind == "none":
        yield None
    elif kind == "plain":
        yield Lines(meter, doing)
    else:
        with _bar(meter, doing) as bar:
            yield bar


@contextmanager
def _bar(meter: Meter, doing: str) -> Iterator[Shower]:
    from rich import progress as rich_progress
    from rich.console import Console

    columns = (
        rich_progress.TextColumn(f" {doing}"),
        rich_progress.BarColumn(),
        rich_progress.TaskProgressColumn(),
        rich_progress.TextColumn("{task.fields[text]}", markup=False),
    )
    console = Console(stderr=True, highlight=False, force_terminal=True)
    with rich_progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None, text="")

        def show(progress: Progress) -> None:
            bar.update(
                task,
                total=progress.total_nbytes,
                completed=progress.done_nbytes,
                text=meter.text(progress),
            )

        yield show
