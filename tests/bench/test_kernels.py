"""The races of the kernels let nobody in who computes something else."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from bench.harness import race
from bench.kernels import enqueue_race, sgd_ema_race

CPU = torch.device("cpu")


def test_all_contenders_of_the_update_move_parameters_and_averages() -> None:
    shapes = [torch.Size(sizes) for sizes in ([5, 3], [7], [2, 2, 3], [4])]
    with mock.patch("bench.kernels.resnet50_shapes", return_value=shapes):
        (_, _, right), (_, _, wrong) = sgd_ema_race(CPU), sgd_ema_race(CPU)
    assert len(race(right, CPU, rounds=1)) == 3
    averages_stay = mock.patch("bench.kernels.ema_")
    with averages_stay, pytest.raises(ValueError, match="foreach SGD, ema_: error"):
        race(wrong, CPU, rounds=1)


def test_both_contenders_of_the_enqueue_write_the_keys() -> None:
    _, _, contenders = enqueue_race(4, 8, 16, CPU)
    assert len(race(contenders, CPU, rounds=1)) == 2
    assert contenders[0].error(torch.zeros(16, 8)) > 0
