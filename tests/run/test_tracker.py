"""Trackers get the records of metrics.jsonl; stand-ins have the interfaces of the packages."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fastmoco.config import Config, ConfigError, RunConfig, check
from fastmoco.run.record import Record
from fastmoco.run.tracker import tracked

Calls = list[tuple[str, Any]]


def wandb_like(calls: Calls) -> dict[str, Any]:
    """`wandb.init` and the run it returns, by their published signatures."""

    def init(
        *, project: str, name: str, config: dict[str, Any], id: str | None = None, resume: str
    ) -> SimpleNamespace:
        calls.append(("init", (project, name, id, resume, config["run.seed"])))
        return SimpleNamespace(
            id=id or "abc",
            log=lambda data, step=None, commit=None: calls.append(("log", (data, step))),
            finish=lambda exit_code=None, quiet=None: calls.append(("finish", exit_code)),
        )

    return {"init": init}


def trackio_like(calls: Calls) -> dict[str, Any]:
    def init(
        project: str, name: str | None = None, config: Any = None, resume: str = "never"
    ) -> SimpleNamespace:
        calls.append(("init", (project, name, None, resume, config["run.seed"])))
        return SimpleNamespace(
            log=lambda metrics, step=None: calls.append(("log", (metrics, step))),
            finish=lambda: calls.append(("finish", 0)),
        )

    return {"init": init}


def mlflow_like(calls: Calls) -> dict[str, Any]:
    def start_run(run_id: str | None = None, run_name: str | None = None) -> SimpleNamespace:
        calls.append(("init", ("fastmoco", run_name, run_id, "allow", "3")))
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "abc"))

    return {
        "set_experiment": lambda experiment_name: None,
        "start_run": start_run,
        "log_params": lambda given: calls.append(("params", len(given))),
        "log_metrics": lambda metrics, step=None: calls.append(("log", (metrics, step))),
        "end_run": lambda status="FINISHED": calls.append(("finish", int(status != "FINISHED"))),
    }


STAND_INS = {"wandb": wandb_like, "trackio": trackio_like, "mlflow": mlflow_like}


@pytest.fixture(params=STAND_INS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def calls(kind: str, monkeypatch: pytest.MonkeyPatch) -> Calls:
    made: Calls = []
    module = ModuleType(kind)
    vars(module).update(STAND_INS[kind](made))
    monkeypatch.setitem(sys.modules, kind, module)
    return made


def config(folder: Path, kind: str) -> Config:
    return Config(run=RunConfig(dir=str(folder), seed=3, tracker=kind))  # type: ignore[arg-type]


def train(step: int, **values: float) -> Record:
    return Record("train", values, step=step)


def test_records_arrive_by_step_and_a_second_start_goes_on_in_the_same_place(
    tmp_path: Path, kind: str, calls: Calls
) -> None:
    said: list[str] = []
    with tracked(config(tmp_path, kind), said.append, lambda: True, enabled=True) as send:
        send(train(20, loss=3.5, lr=0.1))
        send(train(40, loss=float("nan"), lr=0.2))
    first = [call for call in calls if call[0] != "params"]
    assert first[0] == ("init", ("fastmoco", tmp_path.name, None, "allow", "3"))
    assert first[1:] == [
        ("log", ({"loss": 3.5, "lr": 0.1}, 20)),
        ("log", ({"lr": 0.2}, 40)),
        ("finish", 0),
    ]
    calls.clear()
    with tracked(config(tmp_path, kind), said.append, lambda: True, enabled=True) as send:
        send(train(60, loss=3.0))
    known = tmp_path.name if kind == "trackio" else "abc"
    assert json.loads((tmp_path / "tracker.json").read_text()) == {"tracker": kind, "id": known}
    if kind == "trackio":
        assert calls[0][1][1] == known
    else:
        assert calls[0][1][2] == known
    assert [name for name, _ in calls] == ["init", "log", "finish"]
    assert not said


@pytest.mark.parametrize("kind", ["wandb"])
@pytest.mark.parametrize("when", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_a_warning_and_gets_no_more(
    tmp_path: Path, kind: str, calls: Calls, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, said = sys.modules[kind], list[str]()
    init = module.init

    def broken(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto host")

    def with_fault(**given: Any) -> Any:
        run = init(**given)
        if when == "init":
            broken()
        setattr(run, when, broken)
        return run

    monkeypatch.setattr(module, "init", with_fault)
    with tracked(config(tmp_path, kind), said.append, lambda: True, enabled=True) as send:
        send(train(1, loss=1.0))
        send(train(2, loss=1.0))
    (sentence,) = said
    assert sentence.startswith("run.tracker wandb failed")
    assert "no route to host" in sentence
    assert len([name for name, _ in calls if name == "log"]) == (2 if when == "finish" else 0)


def test_an_error_of_the_run_passes_and_the_tracker_hears_of_it(
    tmp_path: Path, kind: str, calls: Calls
) -> None:
    with (
        pytest.raises(RuntimeError, match="of the run"),
        tracked(config(tmp_path, kind), print, lambda: True, enabled=True),
    ):
        raise RuntimeError("of the run")
    assert calls[-1] == ("finish", 0 if kind == "trackio" else 1)


def test_a_run_that_was_stopped_is_not_told_to_be_finished(
    tmp_path: Path, kind: str, calls: Calls
) -> None:
    with tracked(config(tmp_path, kind), print, lambda: False, enabled=True):
        pass  # a signal: the loop ends without an error
    assert calls[-1] == ("finish", 0 if kind == "trackio" else 1)


@pytest.mark.parametrize("kind", ["wandb"])
def test_other_ranks_and_runs_without_a_tracker_are_silent(
    tmp_path: Path, kind: str, calls: Calls
) -> None:
    for which, enabled in ((kind, False), ("none", True)):
        with tracked(config(tmp_path, which), print, lambda: True, enabled=enabled) as send:
            send(train(1, loss=1.0))
    assert not calls
    assert not (tmp_path / "tracker.json").exists()


def test_a_package_that_is_not_there_is_one_sentence_before_the_start() -> None:
    tracker = next(name for name in STAND_INS if name not in sys.modules)
    asked = replace(Config().run, tracker=tracker)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"pip install {tracker}, or set run.tracker to none"):
        check(replace(Config(), run=asked), 1)
