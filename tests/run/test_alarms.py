"""Which numbers of a run raise an alarm."""

from __future__ import annotations

import math

import pytest

from fastmoco.config import Config, MocoConfig, OptimConfig
from fastmoco.config.fields import Mechanism
from fastmoco.run.alarms import Watch
from fastmoco.run.record import Record


def told(mechanism: Mechanism, step: int, loss: float, top1: float, epoch: float = 0) -> str:
    moco = MocoConfig(mechanism=mechanism, queue_size=1000)
    config = Config(moco=moco, optim=OptimConfig(global_batch_size=40))
    values = {"loss": loss, "pretext_top1": top1}
    found = Watch(config).see(Record("train", values, step, epoch))
    return " ".join(alarm.sentence for alarm in found)


def test_alarms_tell_the_two_silent_failures_apart() -> None:
    random_guess = math.log(1 + 1000)
    assert told("queue", 50, 0.6 * random_guess, 0.8) == ""
    assert "batch norm" in told("queue", 50, 0.01, 0.9995)
    assert "not learning" in told("queue", 50, random_guess, 0.001)
    assert told("queue", 49, random_guess, 0.001) == ""


@pytest.mark.parametrize(("mechanism", "negatives"), [("end_to_end", 39), ("memory_bank", 1000)])
def test_a_random_guess_is_that_of_the_mechanism(mechanism: Mechanism, negatives: int) -> None:
    """A dictionary of the batch is never old; a bank is random until every image was seen."""
    random_guess = math.log(1 + negatives)
    assert "not learning" in told(mechanism, 50, random_guess, 0.01, epoch=2)
    assert told(mechanism, 50, 0.9 * random_guess, 0.01, epoch=2) == ""
    old_enough = mechanism == "end_to_end"
    assert bool(told(mechanism, 50, random_guess, 0.01, epoch=1.9)) == old_enough


def kinds(*records: Record, warmup_epochs: int = 0) -> list[list[str]]:
    """Kinds of alarm at each record of a run of 100 epochs and two turnovers by step 50."""
    optim = OptimConfig(global_batch_size=40, epochs=100, warmup_epochs=warmup_epochs)
    watch = Watch(Config(moco=MocoConfig(queue_size=1000), optim=optim))
    return [[alarm.kind for alarm in watch.see(record)] for record in records]


def train(step: int, epoch: float, rank: float, top1: float = 0.5, loss: float = 3.0) -> Record:
    values = {"loss": loss, "pretext_top1": top1, "effective_rank_q": rank, "features": 120.0}
    return Record("train", {**values, "std_even": 128**-0.5}, step, epoch)


MARKS = Record("knn_baseline", {"untrained": 0.4, "chance": 0.1})
START = train(3, 0.1, rank=50)


def knn(top1: float) -> Record:
    return Record("knn", {"knn_top1": top1}, 100, 4)


def test_easy_is_alarming_only_early_and_where_nothing_is_learned() -> None:
    assert kinds(START, train(200, 10, 50, top1=0.91)) == [[], ["leak"]]
    assert kinds(START, train(200, 10, 50, top1=0.89)) == [[], []]
    assert kinds(START, train(200, 10, 60, top1=0.91)) == [[], []]  # the rank has grown
    assert kinds(START, train(400, 11, 50, top1=0.91)) == [[], []]
    assert kinds(START, train(400, 11, 60, top1=0.9999)) == [[], ["leak"]]


def test_with_labels_knn_decides_instead_of_the_rank() -> None:
    easy, poor = train(200, 10, 20, top1=0.95), train(400, 20, 20)
    assert kinds(MARKS, START, knn(0.41), easy, poor) == [[], [], [], ["leak"], []]
    assert kinds(MARKS, START, knn(0.60), easy, poor) == [[], [], [], [], []]
    assert kinds(START, poor) == [[], ["below_untrained"]]
    assert kinds(MARKS, START, poor) == [[], [], []]  # kNN is still to come


def test_knn_below_the_untrained_encoder() -> None:
    assert kinds(MARKS, knn(0.39), knn(0.4)) == [[], ["below_untrained"], []]


def test_small_windows_and_the_first_tenth_tell_nothing_of_the_rank() -> None:
    poor = train(400, 20, 20)
    few = Record("train", poor.values | {"features": 100.0}, 400, 20)
    assert kinds(START, few, train(200, 10, 20), poor) == [[], [], [], ["below_untrained"]]
    two = poor.values | {"effective_rank_q": 1.5}
    assert kinds(Record("train", two, 400, 20)) == [["collapse"]]
    assert kinds(Record("train", two | {"features": 16.0}, 400, 20)) == [[]]
    assert kinds(Record("train", two | {"std_even": 0.5}, 400, 20)) == [[]]  # of four dimensions


def test_a_loss_is_no_news_while_the_learning_rate_warms_up() -> None:
    guess = train(400, 4, 60, loss=math.log(1001))
    assert kinds(guess) == [["stuck"]]
    assert kinds(guess, warmup_epochs=5) == [[]]
