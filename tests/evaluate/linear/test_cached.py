"""Sweeps of linear classifiers against torch.optim.SGD, and shares of labels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastmoco.config import ConfigError
from fastmoco.evaluate.labelled_part import choose_labels, hold_out
from fastmoco.evaluate.linear.cached import (
    Classifiers,
    Schedule,
    Sweep,
    batches,
    sweep,
    train_sweep,
)

SHORT = Schedule(epochs=5, batch_size=8, milestones=(2, 4), seed=3)


def data(n: int = 30, crops: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(crops, n, 6, generator=generator, dtype=torch.float64)
    return features, torch.randint(0, 4, (n,), generator=generator)


@pytest.mark.parametrize("crops", [1, 2])
def test_each_setting_is_sgd_alone_in_float64(crops: int) -> None:
    features, labels = data(crops=crops)
    lr, wd = [0.1, 30.0, 2.0], [0.0, 1e-4, 0.1]
    found = train_sweep(features, labels, classes=4, lr=lr, weight_decay=wd, schedule=SHORT)
    for s in range(3):
        alone = nn.Linear(6, 4, dtype=torch.float64)
        first = Classifiers.start(1, 4, features[0], SHORT.seed)
        alone.load_state_dict({"weight": first.weight[0], "bias": first.bias[0]})
        optimizer = torch.optim.SGD(alone.parameters(), lr[s], momentum=0.9, weight_decay=wd[s])
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4], 0.1)
        for epoch in range(5):
            for rows in batches(30, 8, epoch, SHORT.seed):
                optimizer.zero_grad()
                x = features[epoch % crops][rows]
                nn.functional.cross_entropy(alone(x), labels[rows]).backward()
                optimizer.step()
            scheduler.step()
        torch.testing.assert_close(found.weight[s], alone.weight.detach(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.bias[s], alone.bias.detach(), rtol=1e-9, atol=1e-9)


def test_an_epoch_visits_every_row_once_in_an_order_of_its_own() -> None:
    first, second = batches(30, 8, 0, 1), batches(30, 8, 1, 1)
    assert [len(rows) for rows in first] == [8, 8, 8, 6]
    for epoch in (first, second):
        assert sorted(row for rows in epoch for row in rows.tolist()) == list(range(30))
    assert any(a.tolist() != b.tolist() for a, b in zip(first, second, strict=True))


def test_the_start_is_the_published_one() -> None:
    model = Classifiers.start(2, 100, torch.zeros(1, 400), 0)
    assert abs(float(model.weight.std()) - 0.01) < 2e-4
    assert torch.equal(model.weight[0], model.weight[1])
    assert not model.bias.any()


def test_schedule_divides_by_ten_at_60_and_80() -> None:
    factors = [Schedule().factor(epoch) for epoch in (0, 59, 60, 79, 80, 99)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_accuracy_counts_by_setting_and_a_diverged_classifier_has_none() -> None:
    weight = torch.tensor([[[1.0], [-1.0]], [[-1.0], [1.0]], [[float("nan")], [0.0]]])
    model = Classifiers(weight, torch.zeros(3, 2))
    x, labels = torch.tensor([[1.0], [2.0], [-1.0], [3.0]]), torch.tensor([0, 0, 1, 1])
    top1, top5 = model.accuracies(x, labels)
    assert top1.tolist() == [0.75, 0.25, 0.0]
    assert top5.tolist() == [1.0, 1.0, 0.0]


def test_top5_counts_the_five_likeliest_and_ties_count_against_the_label() -> None:
    model = Classifiers(torch.arange(7.0).view(1, 7, 1), torch.zeros(1, 7))
    x, labels = torch.ones(7, 1), torch.arange(7)
    top1, top5 = model.accuracies(x, labels)
    assert (float(top1), float(top5)) == pytest.approx((1 / 7, 5 / 7))
    top1, top5 = model.accuracies(torch.zeros(7, 1), labels)  # all classes equally likely
    assert (float(top1), float(top5)) == (0.0, 0.0)


def test_the_held_out_images_choose_and_the_test_images_do_not() -> None:
    found = Sweep([(1.0, 0.0), (2.0, 0.0), (3.0, 0.0)], [0.5, 0.7, 0.6], [0.1, 0.2, 0.9], [1.0] * 3)
    assert found.best == 1
    (line,) = [line for line in found.table().splitlines() if "chosen" in line]
    assert line.split()[:6] == ["2", "0", "70.00", "%", "20.00", "%"]
    decays = Sweep(
        [(1.0, 0.1), (2.0, 0.0), (3.0, 0.0)], [0.9, 0.5, 0.7], [0.1, 0.9, 0.2], [1.0] * 3
    )
    assert (decays.best, decays.best_without_decay) == (0, 2)


def test_a_sweep_separates_what_can_be_separated() -> None:
    features, labels = data(40)
    features[..., :4] = 5 * nn.functional.one_hot(labels, 4).double()
    part = (features[0], labels)
    found = sweep((features, labels), part, part, classes=4, schedule=SHORT)
    assert len(found.settings) == 30
    assert found.test[found.best] == 1


def test_shares_of_labels_are_balanced_and_a_function_of_the_seed() -> None:
    labels = torch.tensor([0] * 200 + [1] * 100 + [2] * 3)
    kept = choose_labels(labels, "10%", 0)
    assert torch.bincount(labels[kept]).tolist() == [20, 10, 1]
    assert torch.equal(kept, choose_labels(labels, "10%", 0))
    assert not torch.equal(kept, choose_labels(labels, "10%", 1))
    assert torch.bincount(labels[choose_labels(labels, "3-per-class", 0)]).tolist() == [3, 3, 3]
    assert len(choose_labels(labels, "all", 0)) == 303


@pytest.mark.parametrize("part", ["10", "0%", "101%", "0-per-class", "x-per-class", "4-per-class"])
def test_other_shares_are_refused(part: str) -> None:
    with pytest.raises(ConfigError, match="--labels"):
        choose_labels(torch.tensor([0] * 9 + [1] * 3), part, 0)


def test_held_out_images_are_not_trained_on() -> None:
    labels = torch.tensor([0] * 50 + [1] * 20 + [2])
    train, held = hold_out(labels, 0.1, 0)
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(71))
    assert torch.bincount(labels[held]).tolist() == [5, 2]
    with pytest.raises(ConfigError, match="more --labels"):
        hold_out(torch.tensor([0, 1, 2]), 0.1, 0)
