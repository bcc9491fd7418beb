"""A grid of runs, as a YAML file describes it: what varies, over which seeds, and what is drawn.

    title: Momentum of the key encoder
    recipe: cifar10_r18                  # a file of configs/
    set: {optim.epochs: 100}             # options of all runs
    over: points                         # the x axis: points (the default), epochs or cpu_minutes
    x: {label: m, scale: even}           # linear (the default), log, or one after another
    metrics: [knn_top1]                  # a panel for each
    lines:                               # by name in the legend
      MoCo: {option: moco.momentum, values: [0.9, 0.99]}
      mine: {points: {0.9: {moco.momentum: 0.9, optim.lr: 0.1}}, set: {moco.symmetric: true}}
    seeds: [0, 1, 2]
    note: a sentence below the figure
    paper: {source: where, metric: linear top-1, lines: {MoCo: {0.9: 55.2, 0: failed}}}

A file with `grids: [NAME, ...]` is a collection of them, with `set` for all, `first: N` to keep the
first N points of each line, and `seeds: {GRID: COUNT}`, 1 where it is not said. Its grids are no
collections. Words are read as they are written: `yes`, `off` and dates need no quotes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import yaml

from fastmoco.config import Config, ConfigError, flatten
from fastmoco.config.parsing import UNREADABLE, Words, recipe_path
from fastmoco.config.paths import spelled_out
from fastmoco.experiments.grid_fields import (
    Fields,
    X,
    named_values,
    on_axis,
    option_value,
    per_cent,
    shown,
    text,
    whole,
)

GRIDS = Path(__file__).parent / "grids"
METRICS = ("knn_top1", "pretext_top1", "pretext_top5", "loss")
SCALES = ("linear", "log", "even")
Over = Literal["points", "epochs", "cpu_minutes"]
# Every run has a seed and a directory of its own.
_OWNED = ("run.seed", "run.dir")
Options = tuple[tuple[str, str], ...]
"""Dotted names of options with their values as text, each name once."""


@dataclass(frozen=True)
class Point:
    """One place of a figure: the runs that differ by their seed only."""

    line: str
    x: X
    """A number, or a word where the axis is of words."""
    options: Options


@dataclass(frozen=True)
class Paper:
    """Published numbers to stand beside the figure."""

    source: str
    metric: str
    lines: Mapping[str, Mapping[X, float | None]]
    """In per cent, by line and x; None for a run that is said to have failed."""


@dataclass(frozen=True)
class Grid:
    """Runs and their figure."""

    name: str
    title: str
    recipe: str
    points: tuple[Point, ...]
    seeds: tuple[int, ...]
    metrics: tuple[str, ...]
    over: Over = "points"
    x_label: str = ""
    x_scale: str = "linear"
    note: str = ""
    paper: Paper | None = None

    def lines(self) -> list[str]:
        """Names in order."""
        return list(dict.fromkeys(point.line for point in self.points))

    def varied(self) -> set[str]:
        """Options that not all points share."""
        counts = Counter(option for point in self.points for option in point.options)
        return {name for (name, _), count in counts.items() if count < len(self.points)}


def load_grids(name: str) -> list[Grid]:
    """The grids that `name` stands for: a file that ships with fastmoco, or the path of one.

    Raises `ConfigError` for a name that there is not and a file that is not a grid.
    """
    path, content = _read(name)
    if _is_collection(content):
        return _collection(Fields(content, str(path)))
    return [_grid(path.stem, Fields(content, str(path)))]


def _read(name: str) -> tuple[Path, Any]:
    file = name.endswith((".yaml", ".yml"))
    path = Path(spelled_out(name)) if file else GRIDS / f"{name}.yaml"
    try:
        if not path.is_file():
            names = ", ".join(sorted(p.stem for p in GRIDS.glob("*.yaml")))
            raise ConfigError(f"There is no grid {name}: choose one of {names}, or a YAML file.")
        return path, yaml.load(path.read_text(encoding="utf-8"), Loader=Words)
    except ConfigError:
        raise
    except UNREADABLE as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


def _is_collection(content: Any) -> bool:
    return isinstance(content, dict) and "grids" in content


def _grid(name: str, fields: Fields) -> Grid:
    shared = _options(fields.named("set", optional=True), fields.place)
    lines = fields.named("lines")
    points = [p for line, of in lines.items() for p in _line(line, of, shared, fields.place)]
    axis = Fields(fields.named("x", optional=True), f"{fields.place}, x")
    paper = fields.named("paper", optional=True)
    grid = Grid(
        name=name,
        title=fields.text("title"),
        recipe=fields.text("recipe"),
        points=tuple(points),
        seeds=fields.several("seeds", whole),
        metrics=fields.several("metrics", _metric),
        over=cast(Over, fields.one_of("over", get_args(Over), "points")),
        x_label=axis.text("label", ""),
        x_scale=axis.one_of("scale", SCALES, "linear"),
        note=fields.text("note", ""),
        paper=_paper(Fields(paper, f"{fields.place}, paper")) if paper else None,
    )
    fields.end()
    axis.end()
    _check(grid, fields.place)
    return grid


def _check(grid: Grid, place: str) -> None:
    """Raises `ConfigError` for entries that are sound one by one, but do not fit together."""
    try:
        recipe_path(grid.recipe)
    except (ConfigError, OSError) as error:  # the latter of a name that no file can have
        raise ConfigError(f"{place}, recipe: {error}") from error
    words = {isinstance(point.x, str) for point in grid.points}
    places = {(point.line, point.x) for point in grid.points}
    if (grid.over == "points" and len(words) > 1) or len(places) < len(grid.points):
        raise ConfigError(f"{place}: points must be all numbers or all words, each once.")
    published = grid.paper.lines if grid.paper else {}
    for line in published:
        if line not in grid.lines():
            raise ConfigError(f"{place}, paper: {line} is no line of the grid.")
    every = [point.x for point in grid.points] + [x for xs in published.values() for x in xs]
    if grid.x_scale == "log" and not all(isinstance(x, float) and x > 0 for x in every):
        raise ConfigError(f"{place}, x: scale log is for numbers above 0: choose another.")


def _metric(value: Any, place: str) -> str:
    if value not in METRICS:
        raise ConfigError(f"{place}: {shown(value)} is none of {', '.join(METRICS)}.")
    return str(value)


def _line(name: Any, content: Any, shared: Options, place: str) -> list[Point]:
    line = text(name, f"{place}, lines")
    place = f"{place}, {line}"
    fields = Fields(content, place)
    own = _options(fields.named("set", optional=True), place)
    if "points" in fields:
        given = [
            (on_axis(x, f"{place}, points"), _options(options, f"{place}, {shown(x)}"))
            for x, options in fields.named("points").items()
        ]
    else:
        option = fields.text("option")
        values = fields.several("values", text)
        given = [
            (on_axis(value, f"{place}, values"), _options({option: value}, place))
            for value in values
        ]
    fields.end()
    return [Point(line, x, merged(shared, own, options)) for x, options in given]


def _options(values: Any, place: str) -> Options:
    fields = Fields(values, place)
    known = flatten(Config())
    for name in values:
        if name not in known:
            raise ConfigError(f"{place}: there is no option {shown(name)}.")
        if name in _OWNED:
            raise ConfigError(f"{place}: {name} is set by the experiment: leave it out.")
    return tuple(
        (name, option_value(fields.take(name), f"{place}, {name}")) for name in list(values)
    )


def merged(*parts: Options) -> Options:
    """All options; of one that is there twice the last value."""
    return tuple(dict(option for part in parts for option in part).items())


def _paper(fields: Fields) -> Paper:
    source, metric = fields.text("source"), fields.text("metric")
    lines: dict[str, dict[X, float | None]] = {}
    for name, values in fields.named("lines").items():
        line = text(name, f"{fields.place}, lines")
        place = f"{fields.place}, {line}"
        lines[line] = {
            on_axis(x, place): per_cent(y, f"{place}, {shown(x)}")
            for x, y in named_values(values, place).items()
        }
    fields.end()
    return Paper(source, metric, lines)


def _collection(fields: Fields) -> list[Grid]:
    names = fields.several("grids", text)
    shared = _options(fields.named("set", optional=True), f"{fields.place}, set")
    first = whole(fields.take("first", 1 << 30), f"{fields.place}, first", 1)
    counts = fields.named("seeds", optional=True)
    fields.end()
    for name in counts:
        if name not in names:
            told = f"{shown(name)} is none of {', '.join(names)}"
            raise ConfigError(f"{fields.place}, seeds: {told}.")
    found: list[Grid] = []
    for name in names:
        grid = _member(name, f"{fields.place}, grids")
        if grid.name in {other.name for other in found}:
            raise ConfigError(f"{fields.place}: two grids have the name {grid.name}: rename one.")
        seeds = whole(counts.get(name, 1), f"{fields.place}, seeds", 1)
        if seeds > len(grid.seeds):
            told = f"{name} has {len(grid.seeds)} seeds, not {seeds}"
            raise ConfigError(f"{fields.place}, seeds: {told}.")
        points = tuple(
            replace(point, options=merged(shared, point.options))
            for line in grid.lines()
            for point in [p for p in grid.points if p.line == line][:first]
        )
        found.append(replace(grid, points=points, seeds=grid.seeds[:seeds]))
    return found


def _member(name: str, place: str) -> Grid:
    """A grid of a collection, which is no collection: so none can hold itself."""
    try:
        path, content = _read(name)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error
    if _is_collection(content):
        raise ConfigError(f"{place}: {name} is a collection itself: name its grids instead.")
    return _grid(path.stem, Fields(content, str(path)))
