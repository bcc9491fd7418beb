"""What a budget measured is kept for what it was measured of, and survives no damage unnoticed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fastmoco.config import ConfigError
from fastmoco.experiments.budget import PLAN, lengths
from fastmoco.experiments.grid import Grid, Options, Point
from fastmoco.experiments.results import Result, write_rows
from fastmoco.experiments.runs import RESULT, Run

GRID = Grid("mine", "Mine", "demo", (Point("MoCo", 0.1, ()),), (0, 1), ("loss",))
# 12 steps of 3 epochs, so 4 in each, of 5 seconds.
METRICS = {"kind": "train", "step": 12, "epoch": 3.0, "step_ms_p50": 5000.0, "warmup": False}


class Trials:
    """Trials whose trainer writes the same records at once, and how often it was started."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.out = folder / "trials"
        self._folder = folder
        self.out.mkdir()
        self.told: list[str] = []
        (folder / "metrics").write_text(json.dumps(METRICS) + "\n")
        program = folder / "trainer"
        program.write_text(
            f'#!/bin/sh\nfor word; do last=$word; done\necho "$*" >> {folder}/started\n'
            f'cat {folder}/metrics > "${{last#--run.dir=}}/metrics.jsonl"\n'
            f"exit $(cat {folder}/code || echo 0)\n"
        )
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))

    def started(self) -> list[str]:
        return (self._folder / "started").read_text().splitlines()

    def fail(self, code: int) -> None:
        (self._folder / "code").write_text(str(code))

    def measure(self, *common: tuple[str, str], grid: Grid = GRID) -> dict[str, Options]:
        found = lengths([grid], common, self.out, 10.0, 1, self.told.append)
        assert found is not None
        return found


@pytest.fixture
def trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trials:
    return Trials(tmp_path, monkeypatch)


def test_a_trial_is_repeated_only_for_other_options(trials: Trials) -> None:
    """A budget that was refused, or killed, leaves trials without a plan; so do these."""
    (first,) = trials.measure(("model.width", "0.5"))
    assert "model.width=0.5" in first
    (trials.out / PLAN).unlink()
    trials.measure(("model.width", "0.5"))
    assert len(trials.started()) == 1
    (trials.out / PLAN).unlink()
    (second,) = trials.measure(("model.width", "0.25"))
    assert "model.width=0.25" in second
    assert ["--model.width=0.25" in line for line in trials.started()] == [False, True]


def test_a_trial_of_another_recipe_is_repeated(trials: Trials) -> None:
    trials.measure()
    (trials.out / PLAN).unlink()
    trials.measure(grid=Grid("mine", "Mine", "cifar10_r18", GRID.points, (0, 1), ("loss",)))
    assert ["cifar10_r18.yaml" in line for line in trials.started()] == [False, True]


def test_a_plan_for_another_device_is_another_plan(trials: Trials) -> None:
    (of_cpu,) = trials.measure(("run.device", "cpu"))
    (trials.out / PLAN).unlink()
    (of_gpu,) = trials.measure(("run.device", "cuda"))
    assert of_cpu != of_gpu


def test_a_trial_that_was_stopped_is_measured_from_its_start(trials: Trials) -> None:
    """The rest of a trial costs less than a trial."""
    left = trials.out / "trial0" / "checkpoint_00000008.pth"
    left.parent.mkdir()
    left.write_text("of a life before")
    trials.measure()
    assert not left.exists()
    assert (trials.out / "trial0" / RESULT).exists()


def test_a_trial_that_failed_is_one_sentence_and_is_tried_again(trials: Trials) -> None:
    trials.fail(3)
    with pytest.raises(
        ConfigError, match=r"The trial in .*trial0 failed: exit code 3; mend"
    ) as caught:
        trials.measure()
    assert "\n" not in str(caught.value)
    trials.fail(0)
    assert len(trials.measure()) == 1


@pytest.mark.parametrize(
    "line", ["", "{", '{"kind": "train"}', json.dumps({**METRICS, "epoch": 0.0})]
)
def test_a_trial_whose_records_are_damaged_is_measured_again(trials: Trials, line: str) -> None:
    found = trials.measure()
    (trials.out / PLAN).unlink()
    (trials.out / "trial0" / "metrics.jsonl").write_text(line)
    assert trials.measure() == found
    assert len(trials.started()) == 2


def test_a_trial_that_records_nothing_is_one_sentence(trials: Trials, tmp_path: Path) -> None:
    (tmp_path / "metrics").write_text("")
    with pytest.raises(ConfigError, match=r"The trial in .*trial0 recorded no step that"):
        trials.measure()


PLANS = {
    "empty": "",
    "cut": '{"minutes": 10.0, "lengths": {"demo": [["optim.',
    "a list": "[]",
    "deep": "[" * 100_000,
    "no lengths": '{"minutes": 10.0}',
    "lengths of nothing": '{"minutes": 10.0, "lengths": 3}',
    "no time": '{"minutes": "ten", "lengths": {}}',
    "no number": '{"minutes": NaN, "lengths": {}}',
    "half an option": '{"minutes": 10.0, "lengths": {"demo": [["optim.epochs"]]}}',
    "another option": '{"minutes": 10.0, "lengths": {"demo": [["optim.lr", "1"]]}}',
    "no options": '{"minutes": 10.0, "lengths": {"demo": []}}',
    "no length": '{"minutes": 10.0, "lengths": {"demo": [["optim.epochs", "many"]]}}',
}


@pytest.mark.parametrize("content", PLANS.values(), ids=PLANS.keys())
def test_a_damaged_plan_is_found_again_from_the_trials(trials: Trials, content: str) -> None:
    found = trials.measure()
    whole = (trials.out / PLAN).read_bytes()
    (trials.out / PLAN).write_text(content)
    assert trials.measure() == found
    assert (trials.out / PLAN).read_bytes() == whole
    assert len(trials.started()) == 1
    (sentence,) = [line for line in trials.told if "damaged" in line]
    assert str(trials.out / PLAN) in sentence


def test_a_plan_is_read_as_it_was_written(trials: Trials) -> None:
    """2 runs in 600 s, less the 60 s of the trial: 540 / (2 * 4 * 5 s) are 13.5 epochs."""
    found = trials.measure()
    assert found == {"demo": (("optim.epochs", "13"), ("knn.every", "3"))}
    assert trials.measure() == found
    assert not any("damaged" in line for line in trials.told)


def half(path: Path, text: str, *_: object, **__: object) -> None:
    """What a full disk makes of writing."""
    path.write_bytes(text[: len(text) // 2].encode())
    raise OSError(28, "No space left on device")


def test_a_plan_that_cannot_be_written_is_not_there(
    trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials.measure()
    (trials.out / PLAN).unlink()
    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space"):
        trials.measure()
    assert [path.name for path in trials.out.iterdir()] == ["trial0"]


def test_rows_that_cannot_be_written_leave_those_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Result(GRID.points[0], 0, Run(tmp_path / "run", (), "demo"), False, "", [])
    write_rows(GRID, [found], tmp_path / "rows.jsonl")
    before = (tmp_path / "rows.jsonl").read_text()
    assert json.loads(before)["line"] == "MoCo"
    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space"):
        write_rows(GRID, [found, found], tmp_path / "rows.jsonl")
    assert (tmp_path / "rows.jsonl").read_text() == before


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "null", "[" * 100_000, "{}"),
        *('{"code": "x"}', '{"code": null}', '{"code": true}', '{"code": 1, "sentence": ["x"]}'),
        *('{"code": 0, "command": "fastmoco \\"train"}', '{"code": 0, "command": 5}'),
    ],
)
def test_a_damaged_result_is_that_of_a_run_that_has_not_ended(tmp_path: Path, content: str) -> None:
    run = Run(tmp_path, (), "demo")
    (tmp_path / RESULT).write_text(content)
    assert run.ended() is None
    run.require_same()
