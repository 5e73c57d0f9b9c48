"""A picture of threads over time, coloured by what they do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from bench import trace
from bench.plots import TOP, WIDTH, rule, save, text, ticks

LANES = 84  # width of the names of threads
LANE = 24  # height of a thread with its gap
KEYS = 4  # of the legend in a row
START, COMPUTED, ENDED = "#bf8700", "#db6d28", "#1b7c83"
WAITING = "#c9d1d9"

# What a thread does -> its colour; what starts it is one colour, and so on.
COLORS: Mapping[str, str] = {
    trace.STARTING: START,
    trace.IMPORTING: START,
    trace.PLANNING: START,
    trace.LOADING: START,
    trace.MAKING: START,
    trace.TAKING: "#57606a",
    trace.READING: "#2f81f7",
    trace.DECODING: COMPUTED,
    trace.QUANTIZING: COMPUTED,
    trace.COUNTING: COMPUTED,
    trace.PLACING: "#a371f7",
    trace.DIGESTING: "#3fb950",
    trace.WRITING: "#d1242f",
    trace.ADMITTED: WAITING,
    trace.QUEUED: WAITING,
    trace.WATCHING: WAITING,
    trace.SYNCING: ENDED,
    trace.COMMITTING: ENDED,
    trace.ENDING: ENDED,
    trace.REST: "#57606a",
}
LEGEND: Mapping[str, str] = {
    START: "starting",
    "#2f81f7": "reading",
    COMPUTED: "decoding, quantizing",
    "#a371f7": "turning, placing",
    "#3fb950": "digesting",
    "#d1242f": "writing",
    ENDED: "syncing, committing",
    WAITING: "waiting",
    "#57606a": "the rest",
}


class Part(NamedTuple):
    """What a thread is in, from when to when, seconds."""

    lane: str
    what: str
    start: float
    stop: float


def columns(parts: Sequence[Part], scale: float) -> Iterator[tuple[str, int, int]]:
    """Yield (colour, first column, how many): each column is what fills most of it."""
    most: dict[int, dict[str, float]] = {}
    for part in parts:
        left, right = part.start * scale, part.stop * scale
        for column in range(int(left), int(right) + 1):
            covered = min(right, column + 1) - max(left, column)
            if covered > 0:
                found = most.setdefault(column, {})
                color = COLORS[part.what]
                found[color] = found.get(color, 0.0) + covered
    chosen = [(column, max(found, key=lambda one: found[one])) for column, found in most.items()]
    runs = groupby(enumerate(sorted(chosen)), key=lambda one: (one[1][1], one[1][0] - one[0]))
    for (color, _), run in runs:
        inside = [column for _, (column, _) in run]
        yield color, inside[0], len(inside)


def draw(path: Path, heading: str, lanes: Sequence[str], parts: Sequence[Part]) -> list[str]:
    """Write the picture; return the Markdown lines that show it."""
    end = max(part.stop for part in parts)
    scale = (WIDTH - LANES - 16) / end
    bottom = TOP + LANE * len(lanes)
    drawn = []
    for tick in ticks(end):
        x = LANES + tick * scale
        drawn.append(rule(x, TOP - 4, x, bottom))
        drawn.append(text(x, bottom + 14, f"{tick:.4g}", anchor="middle"))
    drawn.append(text(WIDTH - 16, bottom + 14, "s", anchor="end"))
    for index, lane in enumerate(lanes):
        y = TOP + index * LANE
        drawn.append(text(8, y + 14, f"worker {index}" if index else "main"))
        by_color: dict[str, str] = {}
        for color, first, count in columns([one for one in parts if one.lane == lane], scale):
            box = f"M{LANES + first} {y}h{count}v{LANE - 6}h-{count}z"
            by_color[color] = by_color.get(color, "") + box
        drawn += [f'<path fill="{color}" d="{boxes}"/>' for color, boxes in by_color.items()]
    for index, (color, words) in enumerate(LEGEND.items()):
        x, y = 8 + index % KEYS * 176, bottom + 24 + index // KEYS * 18
        drawn.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{color}"/>')
        drawn.append(text(x + 18, y + 11, words))
    rows = -(-len(LEGEND) // KEYS)
    return save(path, bottom + 28 + rows * 18, heading, drawn)
