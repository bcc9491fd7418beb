"""`fastmoco experiment` as a user runs it: real runs, stopped and gone on, failures shown."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from fastmoco.experiments import __main__ as command
from fastmoco.experiments.__main__ import main
from fastmoco.experiments.runs import LOG, RESULT

ROOT = Path(__file__).resolve().parents[2]
GRID: dict[str, Any] = {
    "title": "Learning rates",
    "recipe": "demo",
    "x": {"label": "lr", "scale": "log"},
    "metrics": ["knn_top1"],
    "set": {
        **{"data.source": "folder", "data.backend": "array", "data.workers": 1},
        **{"augment.image_size": 32, "model.width": 0.125, "model.dim": 8, "run.device": "cpu"},
        **{"moco.queue_size": 16, "moco.bn_group_size": 4, "optim.global_batch_size": 8},
        **{"optim.epochs": 2, "knn.every": 1, "knn.k": 3, "run.log_every": 1},
    },
    "lines": {"MoCo": {"option": "optim.lr", "values": [0.01, 1e30]}},
    "seeds": [0],
}


def pictures(folder: Path, count: int) -> None:
    generator = np.random.default_rng(count)
    for index in range(count):
        where = folder / ("red" if index % 2 else "green")
        where.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 120, (32, 32, 3), dtype=np.uint8)
        pixels[..., index % 2] += 120
        Image.fromarray(pixels).save(where / f"{index}.png")


def prepared(folder: Path, **change: Any) -> list[str]:
    pictures(folder / "data" / "train", 24)
    pictures(folder / "data" / "test", 8)
    (folder / "mine.yaml").write_text(yaml.safe_dump({**GRID, **change}))
    place = [f"--data.root={folder / 'data'}", f"--out={folder / 'out'}"]
    return [str(folder / "mine.yaml"), *place]


def test_a_failed_run_is_shown_and_no_run_is_repeated(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """lr 1e30 diverges. The second call starts nothing."""
    arguments, out = prepared(tmp_path), tmp_path / "out"
    assert main(arguments) == 1
    told = capfd.readouterr().out
    assert "2/2 mine/MoCo-1e+30-seed0: FAILED: The loss or its gradient is not finite in" in told
    assert "1 of 1 FAILED" in told
    rows = [json.loads(line) for line in (out / "mine.jsonl").read_text().splitlines()]
    assert [row["code"] for row in rows] == [0, 1]
    assert rows[0]["command"].startswith("fastmoco train --config ")
    assert {"torch", "processor", "date", "sentence"} <= rows[0].keys()
    assert (out / "mine.png").stat().st_size > 10_000

    written = {path: path.stat().st_mtime_ns for path in out.glob("mine/*/*")}
    assert main(arguments) == 1
    assert {path: path.stat().st_mtime_ns for path in out.glob("mine/*/*")} == written


def started(arguments: list[str]) -> subprocess.Popen[str]:
    """The experiment as a process of its own."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "fastmoco.experiments", *arguments],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )


def test_a_stopped_experiment_goes_on_where_it_was(tmp_path: Path) -> None:
    """A signal reaches the run, which saves; the same command resumes it and starts the next."""
    endless = {**GRID["set"], "optim.epochs": 100000, "run.checkpoint_every": 100000}
    lines = {"MoCo": {"option": "moco.temperature", "values": [0.1, 0.2]}}
    arguments = prepared(tmp_path, set=endless, lines=lines)
    process = started(arguments)
    first = tmp_path / "out" / "mine" / "MoCo-0.1-seed0"
    log = first / "metrics.jsonl"
    while not log.exists() or len(log.read_text()) < 1500:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 130, output
    assert "the same command goes on" in output
    assert "stopped by a signal" in (first / LOG).read_text()
    assert not (first / RESULT).exists()
    assert not (tmp_path / "out" / "mine" / "MoCo-0.2-seed0").exists()
    rows = (tmp_path / "out" / "mine.jsonl").read_text().splitlines()
    assert [json.loads(row)["code"] for row in rows] == [None, None]

    done = json.loads(log.read_text().splitlines()[-1])["step"]
    short = {**endless, "run.max_steps": done + 2}
    assert main(prepared(tmp_path, set=short, lines=lines)) == 0
    assert "resumed   after step" in (first / LOG).read_text()
    rows = (tmp_path / "out" / "mine.jsonl").read_text().splitlines()
    assert [json.loads(row)["steps"] for row in rows] == [done + 2, done + 2]


def test_a_run_that_was_stopped_before_it_could_listen_goes_on(tmp_path: Path) -> None:
    arguments = prepared(tmp_path, lines={"MoCo": {"option": "moco.temperature", "values": [0.1]}})
    process = started(arguments)
    first = tmp_path / "out" / "mine" / "MoCo-0.1-seed0"
    while not (first / LOG).exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)  # the run is still importing
    assert process.communicate()
    assert process.returncode == 130
    assert not (first / RESULT).exists()


@pytest.mark.parametrize("budget", ["nan", "inf", "0", "-1"])
def test_a_budget_that_is_no_time_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], budget: str
) -> None:
    assert main([*prepared(tmp_path), "--budget", budget]) == 2
    assert "--budget must be greater than 0" in capfd.readouterr().err


def test_a_budget_is_measured_once_and_kept(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = {n: v for n, v in GRID["set"].items() if n not in ("optim.epochs", "knn.every")}
    lines = {"MoCo": {"option": "moco.temperature", "values": [0.1, 0.2]}}
    arguments = prepared(tmp_path, set={**options, "run.log_every": 2}, lines=lines)
    # Enough for many epochs on the slowest machine; what would run is looked at instead.
    kept: list[Any] = []

    def instead(runs: Any, jobs: int, say: Any) -> bool:
        kept.append(runs)
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "run_all", instead)
        assert main([*arguments, "--budget=600"]) == 0
        first = [run.options for run in kept[-1]]
        assert main([*arguments, "--budget=600"]) == 0
        assert [run.options for run in kept[-1]] == first
        assert main([*arguments, "--budget=60"]) == 2
    assert "for a budget of 600 minutes" in capfd.readouterr().err
    file = next((tmp_path / "out").rglob("budget.json"))
    for broken in ("", "[]", "{}", '{"minutes": "many", "lengths": {}}', '{"minutes": 600}'):
        file.write_text(broken)
        assert main([*arguments, "--budget=600"]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert f"{file} does not say what was measured" in line
    (one, other) = [dict(options) for options in first]
    assert one["optim.epochs"] == other["optim.epochs"]
    assert int(one["optim.epochs"]) > 10
    assert len(list((tmp_path / "out").glob("mine-trials/trial*"))) == 1  # equal cost, one trial


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["--budget=5"], "optim.epochs is set"),
        (["--budget=0"], "greater than 0"),
        (["--optim.lr=0.1"], "sets optim.lr itself"),
        (["--run.seed", "3"], "sets run.seed itself"),
        (["--optim.speed=1"], "--optim.speed is no option"),
        (["--model.width"], "--model.width lacks a value"),
        (["--moco.temperature=-1"], "moco.temperature must be greater than 0"),
    ],
)
def test_wrong_commands_are_refused_before_anything_runs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], more: list[str], part: str
) -> None:
    assert main([*prepared(tmp_path), *more]) == 2
    told = capfd.readouterr().err
    assert part in told
    assert len(told.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_grid_without_length_needs_a_budget(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["momentum", "--data.root=x", "--out=y"]) == 2
    assert "--budget MINUTES" in capfd.readouterr().err
