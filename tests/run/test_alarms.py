"""Which numbers of a run raise an alarm."""

from __future__ import annotations

import math

import pytest

from fastmoco.config import Config, MocoConfig, OptimConfig
from fastmoco.config.fields import Mechanism
from fastmoco.run.alarms import alarms
from fastmoco.run.record import Record


def told(mechanism: Mechanism, step: int, loss: float, top1: float, epoch: float = 0) -> str:
    moco = MocoConfig(mechanism=mechanism, queue_size=1000)
    config = Config(moco=moco, optim=OptimConfig(global_batch_size=100))
    values = {"loss": loss, "pretext_top1": top1}
    return " ".join(alarms(Record("train", values, step, epoch), config))


def test_alarms_tell_the_two_silent_failures_apart() -> None:
    random_guess = math.log(1 + 1000)
    assert told("queue", 20, 0.6 * random_guess, 0.8) == ""
    assert "batch norm" in told("queue", 20, 0.01, 0.9995)
    assert "not learning" in told("queue", 20, random_guess, 0.001)
    assert told("queue", 19, random_guess, 0.001) == ""


@pytest.mark.parametrize(("mechanism", "negatives"), [("end_to_end", 99), ("memory_bank", 1000)])
def test_a_random_guess_is_that_of_the_mechanism(mechanism: Mechanism, negatives: int) -> None:
    """A dictionary of the batch is never old; a bank is random until every image was seen."""
    random_guess = math.log(1 + negatives)
    assert "not learning" in told(mechanism, 40, random_guess, 0.01, epoch=2)
    assert told(mechanism, 40, 0.9 * random_guess, 0.01, epoch=2) == ""
    old_enough = mechanism == "end_to_end"
    assert bool(told(mechanism, 40, random_guess, 0.01, epoch=1.9)) == old_enough
