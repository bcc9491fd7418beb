"""The figure of a grid: mean and spread over seeds, the paper's numbers beside it.

A dot is a run; a line joins means, and bars or bands are one standard deviation over seeds. A run
that failed is a cross at the bottom. The paper's numbers have a panel of their own: they are of
another data set, encoder and measure.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastmoco.config import ConfigError
from fastmoco.config.names import in_figure
from fastmoco.experiments.grid import Grid
from fastmoco.experiments.grid_fields import X
from fastmoco.experiments.results import PER_CENT, Result, mean_and_spread
from fastmoco.machine import durable
from fastmoco.run.curves import BLUE, FAINT, GREEN, INK, ORANGE, PURPLE

COLOURS = (BLUE, ORANGE, GREEN, PURPLE)
# Per cent that a panel spans at least.
_LEAST_RANGE = 5.0
NAMES = {
    "knn_top1": "kNN top-1 (%)",
    "pretext_top1": "pretext accuracy (%)",
    "pretext_top5": "key among the first five (%)",
    "loss": "loss (InfoNCE)",
}


def draw(grid: Grid, found: Sequence[Result], out: Path) -> None:
    """Draw the grid to `out`, a PNG. Raises `ConfigError` if it cannot be written."""
    panels = len(grid.metrics) + (grid.paper is not None)
    width = max(6.5, 4.4 * panels + 0.4)
    figure = Figure(figsize=(width, 4.3), dpi=130, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)  # type: ignore[union-attr, call-arg]
    for place, metric in enumerate(grid.metrics, 1):
        axes = figure.add_subplot(1, panels, place)
        (_over_points if grid.over == "points" else _over_time)(axes, grid, found, metric)
        _dress(axes, grid, NAMES[metric])
    if grid.paper is not None:
        axes = figure.add_subplot(1, panels, panels)
        _of_paper(axes, grid)
        _dress(axes, grid, f"{grid.paper.metric} (%)")
    figure.suptitle(
        in_figure(grid.title), color=INK, fontsize=12, fontweight="bold", x=0.02, ha="left"
    )
    told = caption(grid, found, int(15 * width)).split("\n")
    figure.supxlabel("\n".join(map(in_figure, told)), color=FAINT, fontsize=8, x=0.02, ha="left")
    FigureCanvasAgg(figure)
    try:
        durable.replace(
            out, lambda partial: figure.savefig(partial, format="png", facecolor="white")
        )
    except OSError as error:
        raise ConfigError(f"Cannot write the figure {out}: {error}.") from error


def caption(grid: Grid, found: Sequence[Result], width: int) -> str:
    """What the marks mean, which runs are missing, and where the paper's numbers are from."""
    seeds = len(grid.seeds)
    told = [f"Left: {_recipe(grid, found)}; " if grid.paper else f"{_recipe(grid, found)}; "]
    told[0] += f"mean and standard deviation of {seeds} seeds." if seeds > 1 else "one seed."
    if failed := [result for result in found if result.failure]:
        first = f"{failed[0].run.folder.name}: {failed[0].failure}"
        told.append(f"{len(failed)} of {len(found)} runs FAILED (crosses), the first {first}")
    if missing := sum(not result.ended for result in found):
        told.append(f"{missing} of {len(found)} runs have not ended.")
    if grid.paper:
        told.append(f"Right: {grid.paper.source}.")
    told += [f"{grid.note}."] * bool(grid.note)
    return "\n".join(line for text in told for line in textwrap.wrap(text, width))


def _recipe(grid: Grid, found: Sequence[Result]) -> str:
    """Its name, and the options that all runs have beside it."""
    shared = set.intersection(*(set(result.run.options) for result in found))
    told = [f"{n} {v}" for n, v in sorted(shared) if not n.startswith(("run.", "data.", "knn."))]
    return " with ".join([grid.recipe, *[", ".join(told)] * bool(told)])


def positions(grid: Grid) -> dict[X, float]:
    """Where each x stands, the paper's too: at itself, or one after another."""
    places = dict.fromkeys(point.x for point in grid.points)
    if grid.paper:
        places |= dict.fromkeys(x for line in grid.paper.lines.values() for x in line)
    even = grid.x_scale == "even" or any(isinstance(x, str) for x in places)
    return {x: i if even or isinstance(x, str) else x for i, x in enumerate(places)}


def _over_points(axes: Axes, grid: Grid, found: Sequence[Result], metric: str) -> None:
    where = positions(grid)
    for colour, line in zip(COLOURS * 9, grid.lines(), strict=False):
        here = [result for result in found if result.point.line == line]
        means: dict[float, tuple[float, float]] = {}
        for x in dict.fromkeys(result.point.x for result in here):
            runs = [result for result in here if result.point.x == x]
            values = [v for result in runs if (v := result.final(metric)) is not None]
            axes.plot([where[x]] * len(values), values, "o", color=colour, ms=4, alpha=0.45)
            if values:
                means[where[x]] = mean_and_spread(values)
            if failed := sum(bool(result.failure) for result in runs):
                _cross(axes, where[x], f"{failed} of {len(runs)} failed", colour)
        axes.errorbar(
            list(means),
            [mean for mean, _ in means.values()],
            yerr=[0 if math.isnan(spread) else spread for _, spread in means.values()],
            fmt="-" if isinstance(here[0].point.x, float) else "_",
            color=colour,
            label=in_figure(line),
            lw=1.8,
            ms=14,
            capsize=3,
        )
    _level_and_range(axes, found, metric)
    _ticks(axes, grid, [point.x for point in grid.points])


def _level_and_range(axes: Axes, found: Sequence[Result], metric: str) -> None:
    """The untrained encoder as a line, and a range in which noise does not look like an effect."""
    untrained = [u for r in found if metric == "knn_top1" and (u := r.untrained()) is not None]
    if untrained:
        mean = mean_and_spread(untrained)[0]
        axes.axhline(mean, color=FAINT, ls="--", lw=1.2, label=f"untrained encoder: {mean:.1f}")
    low, high = axes.get_ylim()
    if metric in PER_CENT and high - low < _LEAST_RANGE:
        middle = (low + high) / 2
        axes.set_ylim(middle - _LEAST_RANGE / 2, middle + _LEAST_RANGE / 2)


def _ticks(axes: Axes, grid: Grid, shown: Sequence[X]) -> None:
    """Every x of the panel, but none that would cover the one before."""
    where = positions(grid)
    if grid.x_scale == "log":
        axes.set_xscale("log")
        axes.minorticks_off()
    ticks: list[X] = []
    for x in sorted(set(shown), key=lambda x: where[x]):
        if not ticks or grid.x_scale != "log" or where[x] > 1.2 * where[ticks[-1]]:
            ticks.append(x)
    names = [f"{x:g}" if isinstance(x, float) else in_figure(x) for x in ticks]
    axes.set_xticks([where[x] for x in ticks], names)
    if any(isinstance(x, str) for x in shown):
        axes.set_xlim(-0.6, len(where) - 0.4)
        axes.tick_params(axis="x", rotation=20)


def _cross(axes: Axes, x: float, text: str, colour: str) -> None:
    """At the bottom of the panel, whatever its range."""
    across = axes.get_xaxis_transform()
    axes.plot([x], [0.03], "x", color=colour, ms=9, mew=2.5, transform=across, clip_on=False)
    axes.text(x, 0.08, text, color=colour, fontsize=7, ha="center", transform=across)


def _over_time(axes: Axes, grid: Grid, found: Sequence[Result], metric: str) -> None:
    for colour, line in zip(COLOURS * 9, grid.lines(), strict=False):
        here = [result for result in found if result.point.line == line]
        failed = sum(bool(result.failure) for result in here)
        label = f"{in_figure(line)} ({failed} of {len(here)} FAILED)" if failed else in_figure(line)
        at: dict[float, list[tuple[float, float]]] = {}
        for result in here:
            epochs, values = result.curve(metric)
            times = epochs if grid.over == "epochs" else result.cpu_minutes(epochs)
            values = values[: len(times)]  # none where the times are not known
            axes.plot(times, values, color=colour, lw=0.8, alpha=0.45)
            if result.failure and times:
                axes.plot(times[-1:], values[-1:], "x", color=colour, ms=9, mew=2.5)
            for epoch, place in zip(epochs, zip(times, values, strict=True), strict=False):
                at.setdefault(epoch, []).append(place)
        # The mean of those epochs that every run has recorded: a band of fewer runs would jump.
        full = [places for _, places in sorted(at.items()) if len(places) == len(here)]
        middle = [mean_and_spread([time for time, _ in places])[0] for places in full]
        spreads = [mean_and_spread([value for _, value in places]) for places in full]
        means = [mean for mean, _ in spreads]
        axes.plot(middle, means, "o-", color=colour, lw=2, ms=3, label=label)
        if len(here) > 1:
            low, high = ([m + sign * s for m, s in spreads] for sign in (-1, 1))
            axes.fill_between(middle, low, high, color=colour, alpha=0.15, lw=0)
    _level_and_range(axes, found, metric)
    axes.set_xlabel(
        "epoch" if grid.over == "epochs" else "CPU minutes of training, loader included"
    )


def _of_paper(axes: Axes, grid: Grid) -> None:
    assert grid.paper is not None
    where = positions(grid)
    words = any(isinstance(x, str) for x in where)
    for colour, line in zip(COLOURS * 9, grid.lines(), strict=False):
        published = grid.paper.lines.get(line, {})
        points = [(where[x], y) for x, y in published.items() if y is not None]
        for x, y in points:
            axes.annotate(f"{y:g}", (x, y), xytext=(0, 6), textcoords="offset points", ha="center")
        style = "s" if words else "s-"
        if points:
            axes.plot(
                *zip(*points, strict=True), style, color=colour, lw=1.8, label=in_figure(line)
            )
        for failed in [x for x, value in published.items() if value is None]:
            _cross(axes, where[failed], "failed", colour)
    axes.margins(y=0.2)
    _ticks(axes, grid, [x for line in grid.paper.lines.values() for x in line])


def _dress(axes: Axes, grid: Grid, title: str) -> None:
    axes.set_title(in_figure(title), fontsize=10, color=INK, fontweight="bold")
    if grid.over == "points":
        axes.set_xlabel(in_figure(grid.x_label))
    axes.xaxis.label.set_color(FAINT)
    axes.grid(axis="y", color="#e8eaee", lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, labelsize=8, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color("#c9cdd4")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
