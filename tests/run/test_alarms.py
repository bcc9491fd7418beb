"""Which numbers of a run raise an alarm."""

from __future__ import annotations

import math

from fastmoco.run.alarms import alarms


def test_alarms_tell_the_two_silent_failures_apart() -> None:
    random_guess = math.log(1 + 1000)
    healthy = {"loss": 0.6 * random_guess, "pretext_top1": 0.8}
    leaking = {"loss": 0.01, "pretext_top1": 0.9995}
    stuck = {"loss": random_guess, "pretext_top1": 0.001}
    assert alarms(healthy, keys_enqueued=2000, queue_size=1000) == []
    assert "batch norm" in alarms(leaking, keys_enqueued=2000, queue_size=1000)[0]
    assert "not learning" in alarms(stuck, keys_enqueued=2000, queue_size=1000)[0]
    assert alarms(stuck, keys_enqueued=1999, queue_size=1000) == []
