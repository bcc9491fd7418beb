"""Odd grid files: each is one sentence that says what is wrong, where, and what may stand there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fastmoco.config import ConfigError
from fastmoco.experiments.__main__ import main
from fastmoco.experiments.grid import load_grids
from fastmoco.experiments.runs import Plan

GRID: dict[str, Any] = {
    "title": "Momentum",
    "recipe": "cifar10_r18",
    "metrics": ["knn_top1"],
    "set": {"optim.epochs": 7},
    "lines": {"a": {"option": "moco.momentum", "values": [0.5, 0.9]}},
    "seeds": [4, 5],
}
PAPER: dict[str, Any] = {"source": "s", "metric": "top-1", "lines": {"a": {0.5: 60.6}}}


def line(**fields: Any) -> dict[str, Any]:
    return {"lines": {"a": fields}}


def points(**fields: Any) -> dict[str, Any]:
    return line(points=fields)


def paper(**change: Any) -> dict[str, Any]:
    return {"paper": {**PAPER, **change}}


# What is changed in the grid above, and a part of the sentence.
GRIDS: list[tuple[dict[str, Any], str]] = [
    (line(option="moco.momentum", values=[[0.9]]), "mine.yaml, a, values: [0.9] must be text that"),
    (line(option="moco.momentum", values=[{"x": 1}]), "a, values: {'x': 1} must be text that"),
    (line(option="moco.momentum", values=[None]), "a, values: None must be text that"),
    (line(option="moco.momentum", values=[]), "a: values must be a list, not empty"),
    (line(option="moco.momentum", values="0.9"), "a: values must be a list, not empty"),
    (line(option="moco.momentum", values=[0.9, "0.90"]), "each once"),
    (line(option="moco.momentum", values=[float("nan")]), "nan is no place on an axis"),
    (line(option="moco.momentum", values=["-inf", "x"]), "-inf is no place on an axis"),
    (line(option="moco.momentum", values=[10**400]), "is no place on an axis"),
    (line(option=["moco.momentum"], values=[1]), "a, option: ['moco.momentum'] must be text that"),
    (line(option="moco.momentum", values=[0.9], points={1: {}}), "option, values, unknown here"),
    (line(points={}), "a: points must hold a name with a value"),
    (line(points=[0.9]), "a, points must hold names with values"),
    (points(x=None), "a, x must hold names with values"),
    (points(x={"moco.momentum": {"a": 1}}), "moco.momentum: {'a': 1} must be text that"),
    (points(x={"optim.milestones": [[1], 2]}), "optim.milestones: [1] must be text that"),
    (points(x={"run.seed": 3}), "run.seed is set by the experiment"),
    (points(x={7: 3}), "no option 7"),
    ({"set": {"run.dir": "x"}}, "run.dir is set by the experiment"),
    ({"set": {"data.root": "a\0b"}}, "data.root: 'a\\x00b' must be text that"),
    ({"set": {"data.root": "\ud800"}}, "data.root: '\\ud800' must be text that"),
    ({"set": {"optim.lr": None}}, "optim.lr: None must be text that"),
    ({"set": ["optim.lr"]}, "set must hold names with values"),
    ({"lines": {None: GRID["lines"]["a"]}}, "lines: None must be text that"),
    ({"lines": {" ": GRID["lines"]["a"]}}, "lines: ' ' must be text that"),
    ({"lines": ["a"]}, "lines must hold names with values"),
    ({"lines": None}, "lines must hold names with values"),
    ({"title": {"a": 1}}, "title: {'a': 1} must be text that"),
    ({"recipe": ["demo"]}, "recipe: ['demo'] must be text that"),
    ({"recipe": "a\0b"}, "recipe: 'a\\x00b' must be text that"),
    ({"recipe": "a" * 300}, "mine.yaml, recipe: "),
    ({"metrics": []}, "metrics must be a list, not empty"),
    ({"metrics": "loss"}, "metrics must be a list, not empty"),
    ({"metrics": ["loss", "loss"]}, "metrics must be a list, not empty, with each once"),
    ({"metrics": [["loss"]]}, "metrics: ['loss'] is none of knn_top1"),
    ({"metrics": [{}]}, "metrics: {} is none of knn_top1"),
    ({"over": ["points"]}, "over is ['points'], none of"),
    ({"x": ["m"]}, "x must hold names with values"),
    ({"x": {"scale": 3}}, "x: scale is 3, none of"),
    ({"x": {"label": ["m"]}}, "x, label: ['m'] must be text that"),
    ({"seeds": 3}, "seeds must be a list, not empty"),
    ({"seeds": [1, 1]}, "with each once"),
    ({"seeds": [-1]}, "seeds: -1 must be a whole number between 0 and"),
    ({"seeds": [True]}, "seeds: true must be a whole number"),
    ({"seeds": ["two"]}, "seeds: two must be a whole number"),
    ({"seeds": {"a": 1}}, "seeds must be a list"),
    ({"seeds": [2**64]}, "seeds: 18446744073709551616 must be a whole number"),
    ({"note": [1]}, "note: [1] must be text that"),
    ({"paper": [1]}, "paper must hold names with values"),
    ({"paper": "none"}, "paper must hold names with values"),
    (paper(lines=[60.6]), "paper, lines must hold names with values"),
    (paper(lines={"a": [60.6]}), "paper, a must hold names with values"),
    (paper(lines={"a": {0.5: "much"}}), "paper, a, 0.5: much must be per cent from 0 to 100"),
    (paper(lines={"a": {0.5: [60.6]}}), "[60.6] must be per cent"),
    (paper(lines={"a": {0.5: None}}), "None must be per cent"),
    (paper(lines={"a": {0.5: float("nan")}}), "nan must be per cent"),
    (paper(lines={"a": {0.5: 606}}), "606 must be per cent"),
    (paper(lines={"b": {0.5: 60.6}}), "paper: b is no line of the grid"),
    (paper(source=["s"]), "paper, source: ['s'] must be text that"),
    ({"x": {"scale": "log"}, **line(option="moco.momentum", values=[0, 0.9])}, "above 0"),
    ({"x": {"scale": "log"}, **points(x={})}, "above 0"),
    ({"x": {"scale": "log"}, **paper(lines={"a": {0: 60.6}})}, "above 0"),
]


def refused(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_grids(str(path))
    told = str(caught.value)
    assert "\n" not in told
    assert str(path) in told
    assert len(told) < 1000
    return told


@pytest.mark.parametrize(("change", "part"), GRIDS, ids=[part for _, part in GRIDS])
def test_an_odd_grid(tmp_path: Path, change: dict[str, Any], part: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**GRID, **change}))
    assert part in refused(path)


COLLECTIONS: list[tuple[dict[str, Any], str]] = [
    ({"grids": ["mini"]}, "mini is a collection itself: name its grids"),
    ({"grids": ["mine.yaml"]}, "mine.yaml is a collection itself"),
    ({"grids": []}, "grids must be a list, not empty"),
    ({"grids": "momentum"}, "grids must be a list, not empty"),
    ({"grids": ["momentum", "momentum"]}, "with each once"),
    ({"grids": ["momentum", "momentum.yaml"]}, "two grids have the name momentum"),
    ({"grids": [["momentum"]]}, "grids: ['momentum'] must be text that"),
    ({"grids": [None]}, "grids: None must be text that"),
    ({"grids": ["a\0b"]}, "must be text that"),
    ({"grids": ["nothing"]}, "no grid nothing: choose one of"),
    ({"grids": ["a" * 300]}, "mine.yaml, grids: "),
    (
        {"grids": ["momentum"], "seeds": {"momentum": "two"}},
        "two must be a whole number between 1 and",
    ),
    ({"grids": ["momentum"], "seeds": {"momentum": 0}}, "0 must be a whole number between 1 and"),
    ({"grids": ["momentum"], "seeds": {"momentum": 4}}, "momentum has 3 seeds, not 4"),
    ({"grids": ["momentum"], "seeds": {"width": 1}}, "seeds: width is none of momentum"),
    ({"grids": ["momentum"], "seeds": [1]}, "seeds must hold names with values"),
    ({"grids": ["momentum"], "first": 0}, "first: 0 must be a whole number between 1 and"),
    ({"grids": ["momentum"], "first": True}, "first: true must be a whole number"),
    ({"grids": ["momentum"], "first": "two"}, "first: two must be a whole number"),
    ({"grids": ["momentum"], "set": {"optim.lr": [[1]]}}, "optim.lr: [1] must be text that"),
    ({"grids": ["momentum"], "title": "t"}, "title, unknown here"),
]


@pytest.mark.parametrize(("content", "part"), COLLECTIONS, ids=[part for _, part in COLLECTIONS])
def test_an_odd_collection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: dict[str, Any], part: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "momentum.yaml").write_text(yaml.safe_dump(GRID))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    assert part in refused(Path("mine.yaml"))


@pytest.mark.parametrize(
    "text",
    [
        *("", "3", "[]", "a: b: c", "? [a]\n: b", "<<: 3", "!!int ''", "!!timestamp x", "!!bool x"),
        *("[" * 20_000, "a: &a [*a", "!!python/object:os.system {}", "a: \x01", "title: *t"),
        *("lines: &l {a: *l}", "&g {grids: *g}"),
        *(f"lines: 0x{'f' * 5000}", f"grids: [0x{'f' * 5000}]"),
    ],
)
def test_what_is_hardly_yaml(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    refused(tmp_path / "mine.yaml")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"title: \xff\xfe\xff")
    refused(tmp_path / "mine.yaml")


def test_the_command_ends_with_the_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text("grids: [mini]")
    assert main([str(tmp_path / "mine.yaml"), f"--out={tmp_path / 'out'}", "--budget=5"]) == 2
    told = capfd.readouterr()
    assert told.err.startswith(f"fastmoco: {tmp_path / 'mine.yaml'}, grids: mini is a collection")
    assert not (tmp_path / "out").exists()


def test_words_stay_as_they_are_written(tmp_path: Path) -> None:
    """YAML has yes, off and dates for other things: here they are names, and values of options."""
    (tmp_path / "mine.yaml").write_text(
        "title: 2027-01-01\nrecipe: cifar10_r18\nmetrics: [loss]\nseeds: [0]\n"
        "note: >\n  two\n  lines\n"
        "set: {optim.epochs: 7, moco.symmetric: yes, data.mean: [0.5, 0.25, 1]}\n"
        "lines:\n  no: {option: run.cuda_graph, values: [on, off]}\n"
    )
    (grid,) = load_grids(str(tmp_path / "mine.yaml"))
    assert (grid.title, grid.note) == ("2027-01-01", "two lines")
    assert [(p.line, p.x, dict(p.options)["run.cuda_graph"]) for p in grid.points] == [
        ("no", "on", "on"),
        ("no", "off", "off"),
    ]
    options = dict(grid.points[0].options)
    assert options["data.mean"] == "[0.5, 0.25, 1]"
    assert options["moco.symmetric"] == "yes"
    root = (("data.root", "x"), ("run.cuda_graph", "off"))
    assert len(Plan([grid], tmp_path, lambda *_: root).distinct()) == 1


def test_a_line_too_long_for_a_folder_is_refused(tmp_path: Path) -> None:
    lines: dict[str, Any] = {"b" * 300: {"points": {1: {}}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**GRID, "lines": lines}))
    grids = load_grids(str(tmp_path / "mine.yaml"))
    with pytest.raises(ConfigError, match="is too long for a folder: shorten"):
        Plan(grids, tmp_path, lambda *_: (("data.root", "x"),))
