"""Accumulated metrics and throughput windows."""

from __future__ import annotations

import math

import pytest
import torch

from fastmoco.machine.ranks import World
from fastmoco.method.step import StepResult
from fastmoco.run.metrics import Clock, Metrics, Trouble
from tests.support.ranks import Ranks

ONE = World(0, 0, 1, torch.device("cpu"), "none")


MEANS = ("loss", "pretext_top1", "pretext_top5")


def result(loss: float, ranks: list[int]) -> StepResult:
    features = torch.eye(2).repeat(len(ranks) // 2, 1)[None]
    losses, bad = torch.full((len(ranks),), loss), torch.tensor(not math.isfinite(loss))
    if bad:
        features = features * math.nan
    return StepResult(torch.tensor(loss), torch.tensor(ranks), losses, features, features, bad)


def means(metrics: Metrics) -> list[float]:
    values = metrics.flush()
    return [values[name] for name in MEANS]


def test_means_over_steps_and_nothing_is_left_after_a_flush() -> None:
    metrics = Metrics(ONE, 2)
    metrics.add(result(2.0, [0, 0, 4, 5]))  # two on top, three among five
    metrics.add(result(4.0, [0, 1, 2, 3]))
    assert means(metrics) == [3.0, 0.375, 0.875]
    metrics.add(result(7.0, [9, 9]))
    values = metrics.flush()
    assert [values[name] for name in MEANS] == [7.0, 0.0, 0.0]
    assert values["features"] == 2


def test_bad_steps_are_told_and_count_in_no_mean() -> None:
    metrics, good, bad = Metrics(ONE, 2), result(2.0, [0, 0]), result(math.nan, [0, 0])
    for step in (good, bad, good, bad, bad):
        metrics.add(step)
    values = metrics.flush()
    assert metrics.trouble == Trouble(steps=3, since=4, in_a_row=2)
    assert (values["loss"], values["pretext_top1"], values["features"]) == (2.0, 1.0, 4)
    mixed = dict(values)
    for _ in range(2):
        metrics.add(good)
    assert metrics.flush() == mixed
    assert metrics.trouble == Trouble()
    for step in (bad, good, bad):
        metrics.add(step)
    metrics.flush()
    metrics.add(bad)
    assert math.isnan(metrics.flush()["loss"])
    assert metrics.trouble == Trouble(steps=1, since=1, in_a_row=2)


def flushed(world: World) -> list[float]:
    metrics = Metrics(world, 2)
    metrics.add(result(1.0 + world.rank, [world.rank] * 4))
    return means(metrics)


def test_means_over_ranks(two_ranks: Ranks) -> None:
    assert two_ranks.run(flushed) == [[1.5, 0.5, 1.0]] * 2


def test_window_counts_the_steps_it_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 10, 30 and 20 ms, then 40 ms until the flush."""
    times = iter([0.0, 0.0, 0.010, 0.040, 0.060, 0.100])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    busy = iter([7.0, 7.25])
    monkeypatch.setattr("fastmoco.run.metrics.cpu_seconds", lambda: next(busy))
    clock = Clock(torch.device("cpu"))
    for _ in range(3):
        clock.mark()
    window = clock.window()
    assert window.steps == 3
    assert window.seconds == pytest.approx(0.1)
    assert window.step_ms_p50 == pytest.approx(20.0)
    assert window.cpu_seconds == pytest.approx(0.25)
