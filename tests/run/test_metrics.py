"""Accumulated metrics and throughput windows."""

from __future__ import annotations

import pytest
import torch

from fastmoco.machine.ranks import World
from fastmoco.run.metrics import Clock, Metrics
from fastmoco_kernels import InfoNCE
from tests.support.ranks import Ranks

ONE = World(0, 0, 1, torch.device("cpu"), "none")


def result(loss: float, ranks: list[int]) -> InfoNCE:
    return InfoNCE(torch.tensor(loss), torch.tensor(ranks), torch.full((len(ranks),), loss))


def test_means_over_steps_and_nothing_is_left_after_a_flush() -> None:
    metrics = Metrics(ONE)
    metrics.add(result(2.0, [0, 0, 4, 5]))  # two on top, three among five
    metrics.add(result(4.0, [0, 1, 2, 3]))
    values = metrics.flush()
    assert values == {"loss": 3.0, "pretext_top1": 0.375, "pretext_top5": 0.875}
    metrics.add(result(7.0, [9, 9]))
    assert metrics.flush() == {"loss": 7.0, "pretext_top1": 0.0, "pretext_top5": 0.0}


def flushed(world: World) -> dict[str, float]:
    metrics = Metrics(world)
    metrics.add(result(1.0 + world.rank, [world.rank] * 4))
    return metrics.flush()


def test_means_over_ranks(two_ranks: Ranks) -> None:
    expected = {"loss": 1.5, "pretext_top1": 0.5, "pretext_top5": 1.0}
    assert two_ranks.run(flushed) == [expected, expected]


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
