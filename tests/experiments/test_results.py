"""The numbers of a figure, computed by hand, and what a figure shows of runs that failed."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from fastmoco.config import ConfigError
from fastmoco.experiments.budget import Cost, affordable, length
from fastmoco.experiments.figure import caption, draw, positions
from fastmoco.experiments.grid import Grid, Paper, Point
from fastmoco.experiments.results import mean_and_spread, results, table, write_rows
from fastmoco.experiments.runs import RESULT, Plan, Run


def test_spread_is_the_standard_deviation_of_a_sample() -> None:
    mean, spread = mean_and_spread([50.0, 52.0, 57.0])
    assert mean == 53.0
    assert spread == pytest.approx(math.sqrt((9 + 1 + 16) / 2))
    assert mean_and_spread([4.0])[0] == 4.0
    assert math.isnan(mean_and_spread([4.0])[1])
    assert math.isnan(mean_and_spread([])[0])


POINTS = (Point("MoCo", 0.0, ()), Point("MoCo", 0.9, ()), Point("MoCo", 0.99, ()))
GRID = Grid(
    name="momentum",
    title="Momentum",
    recipe="demo",
    points=POINTS,
    seeds=(0, 1),
    metrics=("knn_top1", "pretext_top1"),
    x_label="m",
    paper=Paper("arXiv 1911.05722", "linear top-1", {"MoCo": {0.0: None, 0.9: 55.2}}),
)


def record(run: Run, knn: list[float], code: int | None = 0, sentence: str = "") -> None:
    """As a training run leaves it; `code` None: it has not ended."""
    run.folder.mkdir(parents=True)
    rows = [{"kind": "knn_baseline", "untrained": 0.25, "chance": 0.1}]
    for epoch, top1 in enumerate(knn, 1):
        place = {"step": 10 * epoch, "epoch": float(epoch)}
        rows.append({"kind": "train", **place, "loss": 5.0 - epoch, "pretext_top1": 0.5})
        rows.append({"kind": "knn", **place, "knn_top1": top1})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run.folder / "metrics.jsonl").write_text(text)
    if code is not None:
        ended = {"code": code, "sentence": sentence, "command": "fastmoco train", "date": "today"}
        (run.folder / RESULT).write_text(json.dumps(ended))


def plan_with_a_failure(out: Path) -> Plan:
    """m = 0 fails with one seed, m = 0.99 has ended with one seed only."""
    plan = Plan([GRID], out, lambda grid, point: (("moco.momentum", f"{point.x}"),))
    at = {(x, seed): run for (_, _, x, seed), run in plan.runs.items()}
    record(at[0.0, 0], [0.2, 0.9], 1, "The loss became nan")
    record(at[0.0, 1], [0.2, 0.25])
    record(at[0.9, 0], [0.3, 0.50])
    record(at[0.9, 1], [0.3, 0.54])
    record(at[0.99, 0], [0.5], None)
    return plan


def test_the_table_has_mean_spread_and_every_failure(tmp_path: Path) -> None:
    lines = table(GRID, results(GRID, plan_with_a_failure(tmp_path)))
    spread = math.sqrt(8)
    words = [" ".join(line.split()) for line in lines]
    assert words[0] == "MoCo 0 knn_top1 25.00, pretext_top1 50.00, 1 of 2 FAILED"
    assert words[1] == f"MoCo 0.9 knn_top1 52.00 +- {spread:.2f}, pretext_top1 50.00 +- 0.00"
    assert words[2] == "MoCo 0.99 knn_top1 -, pretext_top1 -, 2 of 2 not ended"


def test_a_directory_with_a_run_of_other_options_is_refused(tmp_path: Path) -> None:
    """Its numbers would be drawn as if they were those that were asked for."""

    def planned(epochs: int) -> Run:
        options = (("optim.epochs", str(epochs)),)
        return Plan([GRID], tmp_path, lambda *_: options).distinct()[0]

    run = planned(3)
    record(run, [0.5])
    ended = {"code": 0, "sentence": "", "command": run.command()}
    (run.folder / RESULT).write_text(json.dumps(ended))
    planned(3).require_same()
    moved = ended | {"command": run.command().replace(str(tmp_path), "elsewhere")}
    (run.folder / RESULT).write_text(json.dumps(moved))
    planned(3).require_same()
    with pytest.raises(ConfigError, match=r"with other options .*epochs=3.*another --out"):
        planned(4).require_same()


def test_rows_keep_every_run_with_its_command(tmp_path: Path) -> None:
    found = results(GRID, plan_with_a_failure(tmp_path))
    write_rows(GRID, found, tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(r["x"], r["seed"], r["code"], r["knn_top1"]) for r in rows] == [
        *((0.0, 0, 1, None), (0.0, 1, 0, 25.0)),
        *((0.9, 0, 0, 50.0), (0.9, 1, 0, 54.0)),
        *((0.99, 0, None, None), (0.99, 1, None, None)),
    ]
    assert rows[0]["sentence"] == "The loss became nan"
    assert rows[2]["command"] == "fastmoco train"
    assert [r["steps"] for r in rows] == [20, 20, 20, 20, 10, 0]
    assert rows[2]["untrained_knn_top1"] == 25.0


def drawn(grid: Grid, plan: Plan, out: Path) -> tuple[list[str], list[list[float]]]:
    """Texts of the figure and the y values of its crosses and of its dots."""
    kept: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *arguments: object, **options: object) -> None:
        kept.append(figure)
        save(figure, *arguments, **options)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", keep)
        draw(grid, results(grid, plan), out)
    axes = kept[0].axes[0]
    texts = [text.get_text() for text in axes.texts]
    lines = [[float(y) for y in np.asarray(line.get_ydata())] for line in axes.lines]
    return texts, lines


def test_a_failed_run_is_a_cross_and_its_numbers_are_not_in_the_mean(tmp_path: Path) -> None:
    plan = plan_with_a_failure(tmp_path)
    texts, lines = drawn(GRID, plan, tmp_path / "figure.png")
    assert "1 of 2 failed" in texts
    assert [25.0, 52.0] in lines  # the means; 0.99 has no run that has ended
    assert not any(90.0 in line for line in lines)
    with Image.open(tmp_path / "figure.png") as image:
        assert image.width > 1000
    told = caption(GRID, results(GRID, plan), 200)
    assert "1 of 6 runs FAILED (crosses), the first MoCo-0-seed0: The loss became nan" in told
    assert "2 of 6 runs have not ended" in told
    assert "mean and standard deviation of 2 seeds" in told


@pytest.mark.parametrize("over", ["points", "epochs"])
def test_names_that_are_no_formula_are_drawn(over: Any, tmp_path: Path) -> None:
    r"""`$\frac$` is a formula that matplotlib cannot draw."""
    odd = r"_$\frac$"
    paper = Paper(odd, odd, {odd: {odd: 55.2}})
    grid = replace(GRID, points=(Point(odd, odd, ()),), title=odd, x_label=odd, note=odd)
    grid = replace(grid, paper=paper, over=over, x_scale="even")
    plan = Plan([grid], tmp_path, lambda _grid, _point: ())
    for run in plan.distinct():
        record(run, [0.2, 0.3], 1, odd)
    draw(grid, results(grid, plan), tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as image:
        assert image.width > 1000


def test_curves_show_where_a_run_failed(tmp_path: Path) -> None:
    grid = replace(GRID, over="epochs", paper=None)
    _, lines = drawn(grid, plan_with_a_failure(tmp_path), tmp_path / "figure.png")
    assert [90.0] in lines  # the last value of the failed run, as a cross
    assert [25.0, 25.0] in lines  # the untrained encoder, across the panel


def test_a_curve_over_processor_time_adds_up_what_training_took(tmp_path: Path) -> None:
    """10 steps of 3 s, 10 of 6 s: 0.5 and 1.5 minutes; the other seed took twice as long."""
    grid = replace(GRID, points=POINTS[:1], over="cpu_minutes", metrics=("knn_top1",), paper=None)
    plan = Plan([grid], tmp_path, lambda _grid, _point: ())
    for factor, run in enumerate(plan.distinct(), 1):
        lines = [
            {"kind": "train", "step": 10, "epoch": 1.0, "cpu_ms_per_step": factor * 3e3},
            {"kind": "knn", "step": 10, "epoch": 1.0, "knn_top1": 0.3 * factor},
            {"kind": "train", "step": 20, "epoch": 2.0, "cpu_ms_per_step": factor * 6e3},
            {"kind": "knn", "step": 20, "epoch": 2.0, "knn_top1": 0.4 * factor},
        ]
        run.folder.mkdir(parents=True)
        (run.folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        (run.folder / RESULT).write_text(json.dumps({"code": 0, "sentence": ""}))
    first, second = results(grid, plan)
    assert first.cpu_minutes([0.0, 1.0, 2.0]) == pytest.approx([0.0, 0.5, 1.5])
    write_rows(grid, [first, second], tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["cpu_minutes"] for row in rows] == [1.5, 3.0]
    axes: list[list[float]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, out, **_: axes.extend(_xs(figure, out)))
        draw(grid, [first, second], tmp_path / "figure.png")
    assert axes == [pytest.approx(x) for x in ([0.5, 1.5], [1.0, 3.0], [0.75, 2.25])]


def _xs(figure: Figure, out: Path) -> list[list[float]]:
    out.write_bytes(b"drawn")
    return [list(map(float, line.get_xdata())) for line in figure.axes[0].lines]  # type: ignore[arg-type]


def test_runs_of_before_processor_time_was_recorded_have_none(tmp_path: Path) -> None:
    (first, *_) = results(GRID, plan_with_a_failure(tmp_path))
    assert first.cpu_minutes([1.0]) == []


def test_words_stand_one_after_another_and_numbers_at_themselves() -> None:
    def grid(*xs: float | str) -> Grid:
        return replace(GRID, points=tuple(Point("a", x, ()) for x in xs))

    assert positions(replace(grid("all", "none"), paper=None)) == {"all": 0, "none": 1}
    alone = replace(grid(0.9, 0.99), paper=None)
    assert positions(alone) == {0.9: 0.9, 0.99: 0.99}
    assert positions(replace(alone, x_scale="even")) == {0.9: 0, 0.99: 1}
    assert positions(replace(grid(0.99), x_scale="even")) == {0.99: 0, 0.0: 1, 0.9: 2}


def test_a_budget_gives_every_run_the_same_epochs() -> None:
    """Two kinds: 3 runs of 4 s + 10 steps of 2 s an epoch, 1 of 8 s + 20 of 1 s; 12 + 8 + 80 E."""
    costs = {"a": Cost(4.0, 2.0, 10), "b": Cost(8.0, 1.0, 20)}
    epochs = affordable(costs, {"a": 3, "b": 1}, 220.0)
    assert epochs == pytest.approx(2.5)
    assert dict(length(costs["a"], epochs)) == {"optim.epochs": "2", "knn.every": "1"}
    assert dict(length(costs["a"], 20.0)) == {"optim.epochs": "20", "knn.every": "4"}
    assert dict(length(costs["b"], 0.42)) == {
        **{"optim.epochs": "1", "knn.every": "1", "run.max_steps": "8"}
    }
    with pytest.raises(ConfigError, match="at least 2 minutes more"):
        affordable(costs, {"a": 30, "b": 1}, 100.0)
