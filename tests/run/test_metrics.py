"""Accumulated metrics, throughput windows and alarms."""

from __future__ import annotations

import math

import pytest
import torch

from fastmoco.machine.ranks import World
from fastmoco.run.metrics import Clock, Metrics, alarms
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


def flushed(world: World) -> dict[str, object]:
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


def test_alarms_tell_the_two_silent_failures_apart() -> None:
    random_guess = math.log(1 + 1000)
    healthy = {"loss": 0.6 * random_guess, "pretext_top1": 0.8}
    leaking = {"loss": 0.01, "pretext_top1": 0.9995}
    stuck = {"loss": random_guess, "pretext_top1": 0.001}
    late = {"keys_enqueued": 2000, "queue_size": 1000}
    assert alarms(healthy, **late) == []  # type: ignore[arg-type]
    assert "batch norm" in alarms(leaking, **late)[0]  # type: ignore[arg-type]
    assert "not learning" in alarms(stuck, **late)[0]  # type: ignore[arg-type]
    assert alarms(stuck, keys_enqueued=1999, queue_size=1000) == []  # type: ignore[arg-type]
