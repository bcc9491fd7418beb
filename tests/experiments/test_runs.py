"""Trainers of an experiment: those of an earlier one are waited for, and ends are written down."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fastmoco.experiments.runs import LOG, RESULT, Run, run_all
from fastmoco.machine.owner import Mark, Owner, Watch, read_mark
from tests.support.runs.experiments import GRID, prepared, started


def instead_of_training(folder: Path, monkeypatch: pytest.MonkeyPatch, *lives: str) -> Run:
    """A run whose n-th trainer is the n-th of these shell scripts."""
    for number, life in enumerate(lives):
        (folder / f"life{number}").write_text(life)
    program = folder / "trainer"
    program.write_text(
        f"#!/bin/sh\ncd {folder}\nnumber=$(cat lived 2>/dev/null || echo 0)\n"
        "echo $((number + 1)) > lived\n. ./life$number\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    return Run(folder / "run", (), "demo")


def lives(run: Run) -> int:
    return int((run.folder.parent / "lived").read_text())


def ended(run: Run) -> tuple[Any, Any]:
    result = json.loads((run.folder / RESULT).read_text())
    return result["code"], result["sentence"]


def test_the_sentence_of_a_failure_is_of_the_last_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first was stopped after a sentence of its own, the second crashes without one."""
    first = "echo 'fastmoco: a sentence of then'\nexit 75"
    run = instead_of_training(tmp_path, monkeypatch, first, "echo 'MemoryError: now'\nexit 1")
    assert run_all([run], 1, print)
    assert not (run.folder / RESULT).exists()
    assert run_all([run], 1, print)
    assert ended(run) == (1, "MemoryError: now")
    assert "a sentence of then" in (run.folder / LOG).read_text()


def test_a_life_that_said_nothing_has_its_exit_code_for_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = instead_of_training(tmp_path, monkeypatch, "echo 'fastmoco: then'\nexit 75", "exit 1")
    assert run_all([run], 1, print)
    assert run_all([run], 1, print)
    assert ended(run) == (1, "exit code 1")


def test_a_refusal_by_an_owner_that_has_ended_by_now_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = f"fastmoco: {tmp_path}/run belongs to process 1 on h, which has been at work there"
    run = instead_of_training(tmp_path, monkeypatch, f"echo '{refusal}'\nexit 2", "exit 0")
    assert run_all([run], 1, print)
    assert ended(run) == (0, "")
    assert lives(run) == 2


def test_a_failure_beside_a_living_owner_is_no_failure_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen by nobody at the start, as a trainer that is still importing; then it owns the folder.

    It is waited for and told of once, although it is asked for many times.
    """
    run = instead_of_training(tmp_path, monkeypatch, "exit 2", "exit 0")
    asked, seen, told = [0], Watch.owner, list[str]()
    theirs = Owner(run.folder)
    run.folder.mkdir()

    def owner(watch: Watch) -> Mark | None:
        asked[0] += 1
        if asked[0] == 1:
            return None
        if asked[0] == 8:
            theirs.__exit__()
        return seen(watch)

    monkeypatch.setattr(Watch, "owner", owner)
    with theirs:
        assert run_all([run], 1, told.append)
    assert ended(run) == (0, "")
    assert lives(run) == 2
    assert len(told) == 2
    assert f"process {os.getpid()} " in told[0]
    assert "waiting for its end" in told[0]
    assert told[1].startswith("1/1 ")


def test_a_run_that_its_own_experiment_ended_meanwhile_is_not_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = instead_of_training(tmp_path, monkeypatch, "exit 1")
    run.folder.mkdir()

    def say(line: str) -> None:
        if "waiting" in line:
            (run.folder / RESULT).write_text(json.dumps({"code": 0, "sentence": ""}))

    with Owner(run.folder):
        assert run_all([run], 1, say)
    assert ended(run) == (0, "")
    assert not (tmp_path / "lived").exists()


def test_a_trainer_that_outlives_its_experiment_is_waited_for(tmp_path: Path) -> None:
    """The experiment is killed. The next one lets the trainer end, and records its run as done."""
    longer = {**GRID["set"], "optim.epochs": 20, "knn.every": 20}
    lines = {"MoCo": {"option": "moco.temperature", "values": [0.1]}}
    arguments = prepared(tmp_path, set=longer, lines=lines)
    run = tmp_path / "out" / "mine" / "MoCo-0.1-seed0"
    killed = started(arguments)
    while not (run / "metrics.jsonl").exists():
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.02)
    mark = read_mark(run)
    assert mark is not None
    os.kill(mark.process, signal.SIGSTOP)  # it lives, and cannot end too early for the test
    killed.kill()
    killed.wait()
    try:
        again = started(arguments)
        assert again.stdout is not None
        told = again.stdout.readline()
        assert f"mine/MoCo-0.1-seed0: process {mark.process} " in told
        assert again.poll() is None
    finally:
        os.kill(mark.process, signal.SIGCONT)
    output, _ = again.communicate()
    assert again.returncode == 0, output
    assert "1/1 mine/MoCo-0.1-seed0: done" in output
    assert "waiting" not in output  # it was said once
    log = (run / LOG).read_text()
    assert "belongs to process" not in log
    assert log.count("done: step 60;") == 2  # of the trainer, and of who looked whether it is done
    rows = [json.loads(line) for line in (tmp_path / "out" / "mine.jsonl").read_text().splitlines()]
    assert [(row["code"], row["steps"]) for row in rows] == [(0, 60)]
