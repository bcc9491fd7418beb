"""What the runs of a grid ended with: the numbers of its figure, and rows that keep them."""

from __future__ import annotations

import json
import math
import statistics
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastmoco.config import ConfigError
from fastmoco.experiments.grid import Grid, Point
from fastmoco.experiments.runs import Plan, Run
from fastmoco.machine import durable
from fastmoco.run.record import METRICS, Record, read_metrics, series

PER_CENT = ("knn_top1", "pretext_top1", "pretext_top5")


@dataclass(frozen=True)
class Result:
    """One run with what it has recorded."""

    point: Point
    seed: int
    run: Run
    ended: bool
    failure: str
    """A sentence; empty unless the run has failed."""
    records: list[Record]

    def curve(self, metric: str) -> tuple[list[float], list[float]]:
        """Epochs and values, in per cent except for the loss."""
        kind = "knn" if metric == "knn_top1" else "train"
        scale = 100 if metric in PER_CENT else 1
        epochs, values = series(self.records, kind, metric)
        return epochs, [scale * value for value in values]

    def cpu_minutes(self, epochs: Sequence[float]) -> list[float]:
        """Processor time of training and its loader until each of these epochs, in minutes.

        Evaluation does not count. Empty where the records do not tell (before 2026-11-27).
        """
        spent, done, minutes, at = 0.0, 0, [0.0], [0.0]
        for record in self.records:
            if record.kind == "train" and "cpu_ms_per_step" in record.values:
                spent += (record.step - done) * record.values["cpu_ms_per_step"] / 60e3
                done = record.step
                minutes.append(spent)
                at.append(record.epoch)
        return [minutes[bisect_right(at, epoch) - 1] for epoch in epochs] if done else []

    def final(self, metric: str) -> float | None:
        """The last value of a run that did not fail, None where there is none."""
        values = self.curve(metric)[1]
        return values[-1] if values and self.ended and not self.failure else None

    def untrained(self) -> float | None:
        """kNN accuracy of the untrained encoder in per cent."""
        marks = [r.values for r in self.records if r.kind == "knn_baseline"]
        return 100 * marks[0]["untrained"] if marks and "untrained" in marks[0] else None


def results(grid: Grid, plan: Plan) -> list[Result]:
    """One for every point and seed, also of runs that failed or have not begun."""
    found = []
    for point in grid.points:
        for seed in grid.seeds:
            run = plan.runs[grid.name, point.line, point.x, seed]
            ended = run.ended()
            code, told = (ended or {}).get("code", 0), (ended or {}).get("sentence", "")
            failure = (str(told) or f"exit code {code}") if code else ""
            try:
                records = read_metrics(run.folder / METRICS)
            except ConfigError:
                records = []
            found.append(Result(point, seed, run, ended is not None, failure, records))
    return found


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and standard deviation over seeds (divided by n - 1); nan where there are too few."""
    if not values:
        return math.nan, math.nan
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def write_rows(grid: Grid, found: Sequence[Result], file: Path) -> None:
    """One JSON object per run: place in the grid, last metrics, failure, and what it ran on."""
    rows = []
    for result in found:
        place = {"grid": grid.name, "line": result.point.line, "x": result.point.x}
        numbers: dict[str, object] = {m: result.final(m) for m in ("loss", *PER_CENT)}
        numbers["untrained_knn_top1"] = result.untrained()
        steps = max((record.step for record in result.records), default=0)
        last = max((record.epoch for record in result.records), default=0.0)
        if spent := result.cpu_minutes([last]):
            numbers["cpu_minutes"] = round(spent[0], 2)
        row = {**place, "seed": result.seed, "steps": steps, **numbers}
        rows.append(json.dumps({**row, **(result.run.ended() or {"code": None})}) + "\n")
    durable.replace(file, lambda partial: partial.write_text("".join(rows), encoding="utf-8"))


def table(grid: Grid, found: Sequence[Result]) -> list[str]:
    """A line per point: mean and spread of each metric, and how many runs failed or are missing."""
    lines = []
    for point in grid.points:
        here = [result for result in found if result.point == point]
        parts = []
        for metric in grid.metrics:
            values = [v for r in here if (v := r.final(metric)) is not None]
            mean, spread = mean_and_spread(values)
            parts.append(f"{metric} " + (f"{mean:.2f}" if values else "-"))
            if len(values) > 1:
                parts[-1] += f" +- {spread:.2f}"
        x = f"{point.x:g}" if isinstance(point.x, float) else point.x
        failed, open_ = sum(bool(r.failure) for r in here), sum(not r.ended for r in here)
        parts += [f"{failed} of {len(here)} FAILED"] * bool(failed)
        parts += [f"{open_} of {len(here)} not ended"] * bool(open_)
        lines.append(f"  {point.line:22s} {x:>12s}  {', '.join(parts)}")
    return lines
