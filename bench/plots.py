"""Small pictures as SVG, readable on light and on dark pages: bars, and lines over a size."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import floor, log10
from pathlib import Path
from typing import NamedTuple

WIDTH = 720
ROW = 22  # height of a bar with its gap
LABELS = 300  # width of the labels left of bars
HEIGHT = 260  # of a picture of lines
LEFT, RIGHT, TOP, BOTTOM = 56, 170, 36, 40
COLORS = ("#2f81f7", "#db6d28", "#3fb950", "#a371f7")
GREY = "#8b949e"
TICKS = 5  # at most so many steps on an axis
STYLE = (
    "<style>text{font:12px sans-serif;fill:#24292f}.title{font-weight:bold}"
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}}</style>"
)


class Bar(NamedTuple):
    """One bar; `ours`: in colour, else grey."""

    label: str
    value: float
    ours: bool = True


class Line(NamedTuple):
    """One line through its points (x, y)."""

    label: str
    points: Sequence[tuple[float, float]]


def text(x: float, y: float, words: str, *, anchor: str = "start", name: str = "") -> str:
    """Return a line of text."""
    marked = f' class="{name}"' if name else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{marked}>{escape(words)}</text>'


def rule(x1: float, y1: float, x2: float, y2: float, *, dashed: bool = False) -> str:
    """Return a thin grey line."""
    dashes = ' stroke-dasharray="4 3"' if dashed else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{GREY}"'
        f' stroke-opacity="0.6"{dashes}/>'
    )


def save(path: Path, height: float, heading: str, parts: Sequence[str]) -> list[str]:
    """Write the picture; return the Markdown lines that show it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}" '
        f'viewBox="0 0 {WIDTH} {height:.0f}" role="img">'
    )
    title = text(8, 18, heading, name="title")
    path.write_text("\n".join([opening, STYLE, title, *parts, "</svg>", ""]))
    return [f"![{heading}](plots/{path.name})"]


def bars(
    path: Path, heading: str, rows: Sequence[Bar], form: str = ".2f", aim: float | None = None
) -> list[str]:
    """Write horizontal bars from 0, values beside them; `aim`: a dashed line."""
    top = max([row.value for row in rows] + ([aim] if aim else []))
    scale = (WIDTH - LABELS - 70) / (top or 1)
    parts = []
    for index, row in enumerate(rows):
        y = TOP + index * ROW
        width = row.value * scale
        color = COLORS[0] if row.ours else GREY
        parts.append(text(LABELS - 8, y + 12, row.label, anchor="end"))
        parts.append(
            f'<rect x="{LABELS}" y="{y}" width="{width:.1f}" height="{ROW - 7}" fill="{color}"/>'
        )
        parts.append(text(LABELS + width + 6, y + 12, format(row.value, form)))
    height = TOP + len(rows) * ROW
    if aim:
        x = LABELS + aim * scale
        parts.append(rule(x, TOP - 6, x, height, dashed=True))
    return save(path, height + 8, heading, parts)


def ticks(top: float) -> list[float]:
    """Return round numbers from 0 to at most `top`: 1, 2 or 5 times a power of ten apart."""
    power = 10.0 ** floor(log10(top / TICKS))
    step = next(step for step in (1, 2, 5, 10) if step * power * TICKS >= top) * power
    return [index * step for index in range(int(top / step) + 1)]


def lines(
    path: Path, heading: str, series: Sequence[Line], unit: str, aim: Line | None = None
) -> list[str]:
    """Write lines from 0 over sizes with their points; `aim`: a dashed line without points."""
    every = [*series, *([aim] if aim else [])]
    right = max(x for line in every for x, _ in line.points)
    top = max(y for line in every for _, y in line.points) * 1.1 or 1
    across, up = (WIDTH - LEFT - RIGHT) / right, (HEIGHT - TOP - BOTTOM) / top

    def at(point: tuple[float, float]) -> tuple[float, float]:
        return LEFT + point[0] * across, HEIGHT - BOTTOM - point[1] * up

    parts = []
    for tick in ticks(top):
        y = at((0, tick))[1]
        parts.append(rule(LEFT, y, WIDTH - RIGHT, y))
        parts.append(text(LEFT - 6, y + 4, f"{tick:.4g}", anchor="end"))
    for tick in ticks(right):
        parts.append(text(at((tick, 0))[0], HEIGHT - BOTTOM + 16, f"{tick:.4g}", anchor="middle"))
    parts.append(text(WIDTH - RIGHT, HEIGHT - 8, unit, anchor="end"))
    for index, line in enumerate(every):
        color, dashes = (GREY, ' stroke-dasharray="4 3"') if line is aim else (COLORS[index], "")
        places = [at(point) for point in line.points]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(
            f'<polyline points="{joined}" fill="none" stroke="{color}" stroke-width="2"{dashes}/>'
        )
        if line is not aim:
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in places
            ]
        y = 50 + 18 * index
        parts.append(
            f'<line x1="{WIDTH - RIGHT + 10}" y1="{y - 4}" x2="{WIDTH - RIGHT + 26}" y2="{y - 4}"'
            f' stroke="{color}" stroke-width="2"{dashes}/>'
        )
        parts.append(text(WIDTH - RIGHT + 32, y, line.label))
    return save(path, HEIGHT, heading, parts)
