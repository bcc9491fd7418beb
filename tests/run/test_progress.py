"""What a user is told about the time that a run will take."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch

from fastmoco.config import Config, parse
from fastmoco.data.bad_samples import BadSamples
from fastmoco.machine.ranks import World
from fastmoco.method.step import StepResult
from fastmoco.run.logbook import Logbook
from fastmoco.run.metrics import Window
from fastmoco.run.progress import Progress, in_words, why_so_long
from fastmoco.run.record import WARMUP_STEPS, read_metrics

ONE = World(0, 0, 1, torch.device("cpu"), "none")
FINE = torch.tensor(False)
LOADER = mock.Mock(wait_s=0.0, bad_samples=BadSamples(Config(), None, 0))


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "1 s"),
        (89, "89 s"),
        (90, "2 min"),
        (3599, "1 h 00 min"),
        (3600 * 3 + 301, "3 h 05 min"),
        (3600 * 52, "2 days 4 h"),
    ],
)
def test_durations_for_people(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


@pytest.mark.parametrize(
    ("wait", "load", "reason"),
    [
        (80.0, 9.0, "80 % of the time the step waits for images"),
        (10.0, 9.0, "other processes want the 2 cores too (load average 9)"),
        (10.0, 2.5, "the step is slow on the 2 cores"),
        (10.0, None, "the step is slow on the 2 cores"),
    ],
)
def test_a_long_demo_says_why(wait: float, load: float | None, reason: str) -> None:
    sentence = why_so_long(7200, wait, load, 2)
    assert reason in sentence
    assert "2 h 00 min instead of five minutes" in sentence
    assert "--optim.epochs 4" in sentence


def progress_of(folder: Path, log: Logbook, world: World = ONE) -> Progress:
    """Of a run of ten steps in `folder`."""
    config = parse(["--data.source", "synthetic", "--run.dir", str(folder), "--model.dim", "2"])
    return Progress(config, world, log, torch.zeros(512, 2), range(10), 100)


def test_the_gpu_is_read_at_every_flush_until_it_fails(tmp_path: Path) -> None:
    readings = [{"power_w": 300.0}, RuntimeError("NVML went away"), {"power_w": 1.0}]
    build = mock.Mock(return_value=mock.Mock(side_effect=readings))
    one = torch.ones(1, 1, 2) / 2**0.5
    with (
        mock.patch("fastmoco.run.progress.build_meter", build),
        Logbook(tmp_path, enabled=True, done=0, total=10) as log,
    ):
        progress = progress_of(tmp_path, log)
        for done in (1, 2, 3):
            loss, rank = torch.tensor(6.0), torch.tensor([0])
            progress.add(StepResult(loss, rank, torch.ones(1), one, one, FINE))
            progress.flush(done, 0.1, LOADER)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r.values.get("power_w") for r in records] == [300.0, None, None]


def test_a_report_that_fails_is_a_warning_of_the_main_rank(tmp_path: Path) -> None:
    said: list[str] = []
    with (
        Logbook(tmp_path, enabled=True, done=0, total=10) as log,
        mock.patch.object(log, "say", said.append),
        mock.patch("fastmoco.run.progress.write_report", side_effect=OSError("full")),
    ):
        other = World(1, 1, 2, torch.device("cpu"), "none")
        progress_of(tmp_path, log, other).draw_report(10)
        progress_of(tmp_path, log).draw_report(9)  # no checkpoint is due
        assert said == []
        progress_of(tmp_path, log).draw_report(10)
    assert said == ["WARNING: report.html was not renewed (OSError: full)."]


def told(folder: Path, source: str, step_s: float, stop: int = 1000) -> list[str]:
    """Lines about time that a run of `stop` steps prints by step 10."""
    config = parse(["--data.source", source, "--moco.queue_size", "512"])
    lines: list[str] = []
    one = torch.nn.functional.normalize(torch.ones(1, 1, config.model.dim), dim=2)
    result = StepResult(torch.tensor(6.0), torch.tensor([0]), torch.tensor([6.0]), one, one, FINE)
    with (
        Logbook(folder, enabled=True, done=0, total=stop) as log,
        mock.patch.object(log, "say", lines.append),
    ):
        progress = Progress(config, ONE, log, torch.zeros(512, 2), range(stop), 100)
        for done in range(1, min(stop, 10) + 1):
            progress.add(result)
            if progress.due(done):
                steps = WARMUP_STEPS
                window = Window(steps, steps * step_s, 1e3 * step_s, 0.0)
                with mock.patch.object(progress._clock, "window", return_value=window):
                    progress.flush(done, 0.1, LOADER)
    return [line for line in lines if line.startswith(("duration", "WARNING: The demo"))]


def test_the_duration_is_told_once_after_the_warm_up(tmp_path: Path) -> None:
    assert told(tmp_path, "demo", 0.5) == ["duration  about 8 min for the 994 steps that are left"]


def test_only_a_long_demo_is_warned_of(tmp_path: Path) -> None:
    first, warning = told(tmp_path, "demo", 6.0)
    assert "1 h 39 min" in first
    assert "1 h 39 min instead of five minutes" in warning
    assert len(told(tmp_path, "synthetic", 6.0)) == 1


def test_a_run_that_is_over_by_then_estimates_nothing(tmp_path: Path) -> None:
    assert told(tmp_path, "demo", 6.0, stop=2 * WARMUP_STEPS) == []
