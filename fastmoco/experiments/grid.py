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
first N points of each line, and `seeds: {GRID: COUNT}`, 1 where it is not said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from fastmoco.config import Config, ConfigError, flatten
from fastmoco.config.checks import MOST_SEED
from fastmoco.config.parsing import recipe_path
from fastmoco.config.paths import spelled_out

GRIDS = Path(__file__).parent / "grids"
METRICS = ("knn_top1", "pretext_top1", "pretext_top5", "loss")
SCALES = ("linear", "log", "even")
OVER = ("points", "epochs", "cpu_minutes")
X = float | str
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
    over: Literal["points", "epochs", "cpu_minutes"] = "points"
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
    path = Path(spelled_out(name)) if name.endswith((".yaml", ".yml")) else GRIDS / f"{name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in GRIDS.glob("*.yaml")))
        raise ConfigError(f"There is no grid {name}: choose one of {names}, or a YAML file.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if isinstance(content, dict) and "grids" in content:
        return _collection(_Fields(content, str(path)))
    return [_grid(path.stem, _Fields(content, str(path)))]


class _Fields:
    """A mapping of a file, whose entries are taken one by one; what is left over is unknown."""

    def __init__(self, content: Any, place: str) -> None:
        if not isinstance(content, dict):
            raise ConfigError(f"{place} must hold names with values, but is {content!r}.")
        self._left, self.place = dict(content), place

    def take(self, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """The entry, which must be there unless it has a default, and be of this kind."""
        if name not in self._left:
            if default is None:
                raise ConfigError(f"{self.place} lacks {name}.")
            return default
        value = self._left.pop(name)
        if not isinstance(value, kind):
            raise ConfigError(f"{self.place}: {name} cannot be {value!r}.")
        return value

    def end(self) -> None:
        """Raises `ConfigError` if anything is left."""
        if self._left:
            raise ConfigError(f"{self.place} has {', '.join(map(str, self._left))}, unknown here.")


def _grid(name: str, fields: _Fields) -> Grid:
    shared = _options(fields.take("set", dict, {}), fields.place)
    lines = fields.take("lines", dict)
    points = [p for line, of in lines.items() for p in _line(str(line), of, shared, fields.place)]
    axis = _Fields(fields.take("x", dict, {}), f"{fields.place}, x")
    paper = fields.take("paper", dict, {})
    grid = Grid(
        name=name,
        title=fields.take("title", str),
        recipe=fields.take("recipe", str),
        points=tuple(points),
        seeds=tuple(fields.take("seeds", list)),
        metrics=tuple(fields.take("metrics", list)),
        over=fields.take("over", str, "points"),
        x_label=axis.take("label", str, ""),
        x_scale=axis.take("scale", str, "linear"),
        note=fields.take("note", str, ""),
        paper=_paper(_Fields(paper, f"{fields.place}, paper")) if paper else None,
    )
    fields.end()
    axis.end()
    recipe_path(grid.recipe)
    for metric in grid.metrics:
        if metric not in METRICS:
            raise ConfigError(f"{fields.place}: {metric} is none of {', '.join(METRICS)}.")
    if grid.over not in OVER:
        raise ConfigError(f"{fields.place}: over is {grid.over}, none of {', '.join(OVER)}.")
    if grid.x_scale not in SCALES:
        raise ConfigError(f"{axis.place}: scale is {grid.x_scale}, none of {', '.join(SCALES)}.")
    words = {isinstance(point.x, str) for point in points}
    places = {(point.line, point.x) for point in points}
    if not points or (grid.over == "points" and len(words) > 1) or len(places) < len(points):
        raise ConfigError(f"{fields.place}: points must be there, all numbers or all words, once.")
    if not grid.seeds or not all(type(s) is int for s in grid.seeds):
        raise ConfigError(f"{fields.place}: seeds must be whole numbers.")
    if not 0 <= min(grid.seeds) <= max(grid.seeds) <= MOST_SEED:
        raise ConfigError(f"{fields.place}: seeds must lie between 0 and {MOST_SEED}.")
    return grid


def _line(line: str, content: Any, shared: Options, place: str) -> list[Point]:
    place = f"{place}, {line}"
    fields = _Fields(content, place)
    own = _options(fields.take("set", dict, {}), place)
    if isinstance(content, dict) and "points" in content:
        given = fields.take("points", dict)
    else:
        option = fields.take("option", str)
        given = {value: {option: value} for value in fields.take("values", list)}
    fields.end()
    return [
        Point(line, _x(x), merged(shared, own, _options(options, place)))
        for x, options in given.items()
    ]


def _x(value: Any) -> X:
    """A number for what reads as one."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value)


def _options(values: Any, place: str) -> Options:
    if not isinstance(values, dict):
        raise ConfigError(f"{place}: {values!r} should be options with values.")
    known = flatten(Config())
    for name in values:
        if name not in known:
            raise ConfigError(f"{place}: there is no option {name}.")
    return tuple((str(name), _text(value)) for name, value in values.items())


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def merged(*parts: Options) -> Options:
    """All options; of one that is there twice the last value."""
    return tuple(dict(option for part in parts for option in part).items())


def _paper(fields: _Fields) -> Paper:
    lines: dict[str, dict[X, float | None]] = {
        str(line): {_x(x): None if y == "failed" else float(y) for x, y in values.items()}
        for line, values in fields.take("lines", dict).items()
    }
    paper = Paper(fields.take("source", str), fields.take("metric", str), lines)
    fields.end()
    return paper


def _collection(fields: _Fields) -> list[Grid]:
    names: Sequence[Any] = fields.take("grids", list)
    shared = _options(fields.take("set", dict, {}), fields.place)
    first, counts = fields.take("first", int, 1 << 30), fields.take("seeds", dict, {})
    fields.end()
    found = []
    for name in names:
        (grid,) = load_grids(str(name))
        points = tuple(
            replace(point, options=merged(shared, point.options))
            for line in grid.lines()
            for point in [p for p in grid.points if p.line == line][:first]
        )
        found.append(replace(grid, points=points, seeds=grid.seeds[: counts.get(name, 1)]))
    return found
