"""Accumulated metrics and throughput windows."""

from __future__ import annotations

import pytest
import torch

from fastmoco.machine.ranks import World
from fastmoco.method.step import StepResult
from fastmoco.run.metrics import Clock, Metrics
from tests.support.ranks import Ranks

ONE = World(0, 0, 1, torch.device("cpu"), "none")


MEANS = ("loss", "pretext_top1", "pretext_top5")


def result(loss: float, ranks: list[int]) -> StepResult:
    features = torch.eye(2).repeat(len(ranks) // 2, 1)[None]
    losses = torch.full((len(ranks),), loss)
    return StepResult(torch.tensor(loss), torch.tensor(ranks), losses, features, features)


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
    clock = Clock(torch.device("cpu"))
    for _ in range(3):
        clock.mark()
    window = clock.window()
    assert window.steps == 3
    assert window.seconds == pytest.approx(0.1)
    assert window.step_ms_p50 == pytest.approx(20.0)
