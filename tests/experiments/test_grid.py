"""Grids: those that ship are sound, and a wrong one is refused with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fastmoco.config import ConfigError
from fastmoco.experiments.grid import GRIDS, Grid, load_grids, merged
from fastmoco.experiments.runs import Plan, configuration

NAMES = sorted(path.stem for path in GRIDS.glob("*.yaml"))
SMALL: dict[str, Any] = {
    "title": "Momentum",
    "recipe": "cifar10_r18",
    "x": {"label": "m"},
    "metrics": ["knn_top1"],
    "set": {"optim.epochs": 7, "moco.symmetric": True},
    "lines": {
        "a": {"option": "moco.momentum", "values": ["0", 0.9]},
        "b": {
            "points": {0.5: {"optim.epochs": 9}},
            "set": {"moco.temperature": 0.3, "optim.epochs": 8},
        },
    },
    "seeds": [4, 5],
}


def written(folder: Path, **change: Any) -> str:
    content = {name: value for name, value in {**SMALL, **change}.items() if value is not None}
    (folder / "mine.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "mine.yaml")


def test_points_have_the_options_of_all_of_their_line_and_their_own(tmp_path: Path) -> None:
    (grid,) = load_grids(written(tmp_path))
    common = {"optim.epochs": "7", "moco.symmetric": "true"}
    assert [(p.line, p.x, dict(p.options)) for p in grid.points] == [
        ("a", 0.0, {**common, "moco.momentum": "0"}),
        ("a", 0.9, {**common, "moco.momentum": "0.9"}),
        ("b", 0.5, {**common, "optim.epochs": "9", "moco.temperature": "0.3"}),
    ]
    assert grid.varied() == {"moco.momentum", "optim.epochs", "moco.temperature"}
    assert (grid.lines(), grid.seeds) == (["a", "b"], (4, 5))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"title": None}, "lacks title"),
        ({"titel": "x"}, "titel, unknown here"),
        ({"recipe": "nothing"}, "nothing.yaml is not part"),
        ({"seeds": [0.5]}, "0.5 must be a whole number"),
        ({"seeds": []}, "seeds must be a list, not empty"),
        ({"seeds": [0, -1]}, "between 0 and 18446744073709551615"),
        ({"seeds": [2**64, 1]}, "between 0 and 18446744073709551615"),
        ({"metrics": ["accuracy"]}, "accuracy is none of knn_top1"),
        ({"over": "time"}, "over is time, none of points, epochs, cpu_minutes"),
        ({"set": {"moco.mass": 1}}, "no option moco.mass"),
        ({"lines": {"a": {"option": "moco.mass", "values": [1]}}}, "mine.yaml, a: there is no"),
        ({"lines": {"a": {"values": [1]}}}, "a lacks option"),
        ({"lines": {"a": 3}}, "must hold names"),
        ({"lines": {}}, "lines must hold a name"),
        ({"lines": {"a": {"points": {"x": {}, 1: {}}}}}, "all numbers or all words"),
        ({"lines": {"a": {"points": {"1": {}, 1: {}}}}}, "all words, each once"),
        ({"paper": {"source": "s", "lines": {}}}, "paper lacks metric"),
    ],
)
def test_a_wrong_grid_is_one_sentence(tmp_path: Path, change: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_grids(written(tmp_path, **change))
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_lists_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"no grid momentun: choose one of .*momentum"):
        load_grids("momentun")


@pytest.mark.parametrize("name", NAMES)
def test_every_grid_that_ships_can_train(name: str, tmp_path: Path) -> None:
    grids = load_grids(name)
    plan = Plan(grids, tmp_path, lambda *_: (("data.root", "x"),) if name != "mini" else ())
    for grid in grids:
        assert len(plan.runs) >= len(grid.points) * len(grid.seeds)
        if name == "mini":
            continue
        assert len(grid.seeds) >= 3
        published = grid.paper.lines if grid.paper else {}
        assert set(published) <= set(grid.lines())


def test_the_papers_numbers_are_those_of_the_papers() -> None:
    """Written out once more, from the tables of arXiv 1911.05722 and 2003.04297."""
    papers = {name: load_grids(name)[0].paper for name in NAMES if name != "mini"}
    found = {name: dict(paper.lines) for name, paper in papers.items() if paper}
    mlp = {0.07: 62.9, 0.1: 64.9, 0.2: 66.2, 0.3: 65.7, 0.4: 65.0, 0.5: 64.3}
    assert found == {
        "momentum": {"MoCo": {0.0: None, 0.9: 55.2, 0.99: 57.8, 0.999: 59.0, 0.9999: 58.9}},
        "queue_size": {"MoCo": {65536.0: 60.6}},
        "mechanism": {"MoCo": {65536.0: 60.6}, "memory bank": {65536.0: 58.0}},
        "temperature": {"MoCo with MLP head": mlp},
        "head": {"MoCo": {"linear": 60.6, "mlp": 66.2}},
        "versions": {"MoCo": {"v1": 60.6, "+ MLP": 66.2, "+ views": 63.4, "both": 67.3}},
        "width": {"MoCo": {1.0: 60.6, 2.0: 65.4, 4.0: 68.6}},
    }


def test_mini_draws_every_other_grid_and_repeats_no_equal_run(tmp_path: Path) -> None:
    grids = load_grids("mini")
    assert {grid.name for grid in grids} == set(NAMES) - {"mini"}
    plan = Plan(grids, tmp_path, lambda *_: ())
    runs = plan.distinct()
    assert len(runs) < len(plan.runs)
    assert len({configuration(run.recipe, run.options) for run in runs}) == len(runs)
    assert all(configuration(r.recipe, r.options).run.max_steps <= 10 for r in runs)
    mine = Plan(grids, tmp_path, lambda *_: (("run.max_steps", "2"),)).distinct()
    assert {configuration(r.recipe, r.options).run.max_steps for r in mine} == {2}


def test_the_last_of_two_options_holds() -> None:
    assert merged((("a", "1"), ("b", "1")), (("a", "2"),)) == (("a", "2"), ("b", "1"))


def test_points_of_one_directory_are_refused(tmp_path: Path) -> None:
    lines = {"a b": {"points": {1: {}}}, "a-b": {"points": {1: {"optim.epochs": 8}}}}
    grids: list[Grid] = load_grids(written(tmp_path, lines=lines))
    with pytest.raises(ConfigError, match="same name"):
        Plan(grids, tmp_path, lambda *_: (("data.root", "x"),))
