"""`python -m bench [FOLDER]`: run the benchmarks in FOLDER and write docs/benchmarks.md."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench import (
    aims,
    cold,
    fp8_job,
    kernels,
    kt_job,
    loading,
    main_job,
    ranks,
    scaling,
    start_up,
)
from moeconv.measure.host import describe_machine

DOCUMENT = Path(__file__).parents[1] / "docs" / "benchmarks.md"

# Name -> the part of the page. What needs most disk comes last: its sources are its own.
PARTS: Mapping[str, Callable[[argparse.Namespace], list[str]]] = {
    "main": lambda o: main_job.section(o.folder, o.plots, o.repeats, peer=o.peer),
    "fp8": lambda o: fp8_job.section(o.folder, o.plots, o.repeats),
    "ktransformers": lambda o: kt_job.section(o.folder, o.plots, o.repeats),
    "ranks": lambda o: ranks.section(o.folder, o.repeats),
    "loading": lambda o: loading.section(o.folder),
    "cold": lambda o: cold.section(o.folder, o.repeats),
    "kernels": lambda o: kernels.section(o.folder, o.plots),
    "start-up": lambda o: start_up.section(o.folder),
    "scaling": lambda o: scaling.section(o.folder, o.plots, o.repeats),
}


def document(sections: Sequence[Sequence[str]]) -> str:
    """Return the text of docs/benchmarks.md."""
    lines = [
        "# Benchmarks",
        "",
        aims.summary([line for section in sections for line in section]),
        "`make bench` runs everything here and writes this page. Figures are medians of runs that",
        "take turns on one machine; only ratios inside a table mean something elsewhere.",
        "",
        f"Machine: {describe_machine()}, no GPU.",
        "What ran on no GPU yet is not here.",
    ]
    for section in sections:
        lines += ["", *section]
    return "\n".join([*lines, ""])


def updated(page: Path, sections: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """Return the sections of a page, those of the same headings replaced."""
    fresh = {section[0]: section for section in sections}
    _, *bodies = page.read_text().split("\n## ")
    kept = [f"## {body}".rstrip("\n").split("\n") for body in bodies]
    return [fresh.get(section[0], section) for section in kept]


def names(text: str) -> list[str]:
    """Return the parts of `--only`: their names, separated by commas."""
    chosen = text.split(",")
    unknown = [name for name in chosen if name not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    return chosen


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("bench-data"), help="where the data are made"
    )
    parser.add_argument(
        "--only",
        type=names,
        metavar="NAMES",
        help=f"some of {', '.join(PARTS)}, separated by commas; the page is then printed alone",
    )
    parser.add_argument(
        "--update", action="store_true", help="with --only: put these parts into the page instead"
    )
    parser.add_argument(
        "--out", type=Path, help="the page (default: docs/benchmarks.md, none with --only)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="of a conversion")
    parser.add_argument(
        "--no-peer", dest="peer", action="store_false", help="leave transformers' main job out"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and write."""
    given = options(arguments)
    page = given.out or (None if given.only and not given.update else DOCUMENT)
    given.plots = (page.parent if page else given.folder) / "plots"
    given.folder.mkdir(parents=True, exist_ok=True)
    sections = []
    for name in given.only or PARTS:
        start = time.monotonic()
        sections.append(PARTS[name](given))
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr)
    text = document(updated(page, sections) if given.update and page else sections)
    if page is not None:
        page.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
