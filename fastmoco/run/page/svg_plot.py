"""Line plots as inline SVG: curves over epochs, with text only where nothing can overlap.

The legend belongs to HTML beside the plot. Colours are classes of the page's style sheet, so that
one picture serves light, dark and print; a dash pattern and an end mark tell lines apart without
colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 10, 24
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 4", "12 4")
MARKS = ("circle", "square", "triangle", "diamond", "cross", "ring")
STYLES = len(DASHES)
# Points per curve: two for each of so many columns, which is what the width can show.
COLUMNS = 300


@dataclass(frozen=True)
class Line:
    """One curve; `style` counts the curves of a page and chooses colour, dash and mark."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: int = 0


@dataclass(frozen=True)
class Level:
    """A horizontal line to compare with."""

    label: str
    y: float
    style: int = 0


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers that lie in [low, high], about `wanted` of them, evenly spaced."""
    rough = (high - low) / max(wanted - 1, 1)
    if not rough > 0 or not math.isfinite(rough):
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def number(value: float) -> str:
    """A value in at most six characters, as at an axis: `0.03`, `1.2k`, `3e-05`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * (10 if letter == "k" else 1):
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def mark(style: int, x: float, y: float) -> str:
    """The end mark of a curve, centred on (x, y)."""
    kind, r = MARKS[style % STYLES], 4.0
    if kind in ("circle", "ring"):
        hollow = ' class="hollow"' if kind == "ring" else ""
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}"{hollow}/>'
    shapes = {
        "square": [(-r, -r), (r, -r), (r, r), (-r, r)],
        "triangle": [(0, -r), (r, r), (-r, r)],
        "diamond": [(0, -r), (r, 0), (0, r), (-r, 0)],
        "cross": [(-r, -r), (0, -1), (r, -r), (1, 0), (r, r), (0, 1), (-r, r), (-1, 0)],
    }
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in shapes[kind])
    return f'<polygon points="{points}"/>'


def swatch(style: int) -> str:
    """How a curve looks, for the legend."""
    return (
        f'<svg class="swatch c{style % STYLES}" viewBox="0 0 34 12" aria-hidden="true">'
        f'<path d="M1 6H33" stroke-dasharray="{DASHES[style % STYLES]}"/>{mark(style, 17, 6)}</svg>'
    )


def level_swatch(style: int) -> str:
    """How a level looks, for the legend."""
    return (
        '<svg class="swatch level" viewBox="0 0 34 12" aria-hidden="true">'
        f'<path d="M1 6H33" stroke-dasharray="{DASHES[1 + style % 3]}"/></svg>'
    )


def plot(
    title: str,
    lines: Sequence[Line],
    levels: Sequence[Level] = (),
    *,
    low: float | None = None,
    high: float | None = None,
) -> str:
    """One `<svg>` of the curves and levels; x is the epoch and starts at 0.

    The y axis spans what is drawn, and `low` and `high` where they are given. Points that are not
    finite are left out; the curve is interrupted there.
    """
    values = [v for line in lines for v in line.y if math.isfinite(v)]
    values += [level.y for level in levels]
    values += [v for v in (low, high) if v is not None]
    bottom, top = (min(values), max(values)) if values else (0.0, 1.0)
    if top - bottom < 1e-9 * max(abs(top), 1e-9):
        bottom, top = bottom - 0.5 * (abs(bottom) or 1), top + 0.5 * (abs(top) or 1)
    room = 0.04 * (top - bottom)
    bottom -= room if low is None or min(values) < low else 0
    top += room if high is None or max(values) > high else 0
    right = max((x for line in lines for x in line.x), default=1.0) or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + x / right * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - bottom) / (top - bottom) * (HEIGHT - TOP - BOTTOM),
        )

    parts = [
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}"><title>{escape(title)}</title>'
    ]
    for value in ticks(bottom, top):
        _, y = at(0, value)
        parts.append(
            f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
            f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{number(value)}</text>'
        )
    for value in ticks(0, right, 5):
        x, _ = at(value, bottom)
        anchor = "end" if x > WIDTH - RIGHT - 8 else "middle"
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{number(value)}</text>'
        )
    for level in levels:
        _, y = at(0, level.y)
        dash = DASHES[1 + level.style % 3]
        parts.append(
            f'<path class="level" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke-dasharray="{dash}"/>'
        )
    parts += [_curve(line, at) for line in lines]
    return "".join([*parts, "</svg>"])


def thinned(x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float]]:
    """At most 2 `COLUMNS` + 1 points: the lowest and highest of each stretch, and the last one."""
    points = list(zip(x, y, strict=True))
    if len(points) <= 2 * COLUMNS:
        return points
    kept = {len(points) - 1}
    for column in range(COLUMNS):
        stretch = range(column * len(points) // COLUMNS, (column + 1) * len(points) // COLUMNS)
        kept |= {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def _curve(line: Line, at: object) -> str:
    """Path and end mark of one curve."""
    assert callable(at)
    steps: list[str] = []
    pen, last = "M", None
    for x, y in thinned(line.x, line.y):
        if not math.isfinite(y):
            pen = "M"
            continue
        last = at(x, y)
        steps.append(f"{pen}{last[0]:.1f} {last[1]:.1f}")
        pen = "L"
    if last is None:
        return ""
    dash = DASHES[line.style % STYLES]
    return (
        f'<g class="c{line.style % STYLES}"><path class="curve" d="{"".join(steps)}" '
        f'stroke-dasharray="{dash}"/>{mark(line.style, *last)}</g>'
    )
