"""The schedule by hand, and the weights that do not decay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastmoco.config import ConfigError
from fastmoco.config.command import CommandParser
from fastmoco.machine.ranks import World
from fastmoco.transfer.batchnorm import SyncBatchNorm2d
from fastmoco.transfer.schedule import Schedule, schedule_options


def given(*arguments: str) -> Schedule:
    parser = CommandParser()
    schedule_options(parser, iterations=10, lr=0.02, steps=(6, 8), warmup=4)
    return Schedule.of(parser.parse_args(arguments))


def test_the_rate_rises_in_a_line_from_a_thousandth_and_falls_by_ten() -> None:
    found = [given().rate(step) for step in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)]
    by_hand = [2e-5, 5.015e-3, 1.001e-2, 1.5005e-2, 2e-2, 2e-2, 2e-3, 2e-3, 2e-4, 2e-4]
    assert found == pytest.approx(by_hand)
    assert given("--warmup", "0", "--steps").rate(9) == 0.02


def test_batch_norm_does_not_decay_and_everything_else_does() -> None:
    alone = World(0, 0, 1, torch.device("cpu"), "none")
    model = nn.Sequential(nn.Conv2d(3, 4, 1), SyncBatchNorm2d(4, alone), nn.Conv2d(4, 2, 1))
    decaying, steady = given("--weight_decay", "0.5").optimizer(model).param_groups
    assert (decaying["weight_decay"], steady["weight_decay"]) == (0.5, 0)
    assert {id(p) for p in steady["params"]} == {id(p) for p in model[1].parameters()}
    assert len(decaying["params"]) == 4


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--iterations", "0"), "--iterations is 0"),
        (("--batch_size", "-2"), "--batch_size is -2"),
        (("--lr", "0"), "--lr is 0.0"),
        (("--lr", "nan"), "--lr is nan"),
        (("--weight_decay", "-1"), "--weight_decay is -1.0"),
        (("--warmup", "-1"), "--warmup is -1"),
        (("--steps", "8", "6"), "--steps 8 6 must be iterations in rising order"),
        (("--steps", "0"), "--steps 0 must be"),
    ],
)
def test_what_cannot_train_is_refused(arguments: tuple[str, ...], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        given(*arguments)
