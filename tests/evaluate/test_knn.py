"""The weighted vote against a float64 loop and against votes worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastmoco.evaluate import knn
from fastmoco.evaluate.knn import knn_accuracies, knn_accuracy, nearest
from fastmoco.machine.ranks import World
from tests.support.ranks import Ranks


def unit(angle_degrees: float) -> list[float]:
    angle = math.radians(angle_degrees)
    return [math.cos(angle), math.sin(angle)]


def vote(bank_angles: Sequence[float], bank_labels: list[int], k: int, temperature: float) -> int:
    """The label that a query at angle 0 receives, found by asking for each of three labels."""
    bank = torch.tensor([unit(a) for a in bank_angles])
    query = torch.tensor([unit(0.0)])
    won = [
        knn_accuracy(
            bank,
            torch.tensor(bank_labels),
            query,
            torch.tensor([label]),
            k=k,
            temperature=temperature,
            num_classes=3,
        )
        for label in range(3)
    ]
    assert sorted(won) == [0.0, 0.0, 1.0]
    return won.index(1.0)


def test_one_near_neighbour_outweighs_two_far_ones_only_at_low_temperature() -> None:
    # cosines 0.985, 0.5, 0.5. At T = 0.1 the votes are e^9.85 against 2 e^5; at T = 10 they are
    # 1.10 against 2.10.
    assert vote([10, 60, -60], [1, 2, 2], k=3, temperature=0.1) == 1
    assert vote([10, 60, -60], [1, 2, 2], k=3, temperature=10.0) == 2


def test_only_the_k_nearest_vote() -> None:
    angles, labels = [5, 10, 20, 25, 30], [0, 0, 1, 1, 1]
    assert vote(angles, labels, k=3, temperature=10.0) == 0
    assert vote(angles, labels, k=5, temperature=10.0) == 1
    assert vote(angles, labels, k=500, temperature=10.0) == 1


def test_equal_votes_go_to_the_lowest_label() -> None:
    assert vote([40, 40], [2, 1], k=2, temperature=0.07) == 1
    assert vote([40, 40], [1, 2], k=2, temperature=0.07) == 1


def test_tiny_temperature_neither_overflows_nor_loses_the_nearest() -> None:
    assert vote([10, 11, -11], [1, 2, 2], k=3, temperature=1e-4) == 1


def reference_accuracy(
    bank: Tensor, bank_labels: Tensor, features: Tensor, labels: Tensor, k: int, temperature: float
) -> float:
    """One query at a time in float64, with a full sort."""
    bank_rows, queries = bank.double().numpy(), features.double().numpy()
    hits = 0
    for query, label in zip(queries, labels.tolist(), strict=True):
        cosines = bank_rows @ query
        votes: dict[int, float] = {}
        for i in np.argsort(-cosines)[:k]:
            name = int(bank_labels[i])
            votes[name] = votes.get(name, 0.0) + math.exp(cosines[i] / temperature)
        hits += max(votes, key=lambda name: votes[name]) == label
    return hits / len(queries)


@pytest.mark.parametrize("k", [1, 7, 200])
@pytest.mark.parametrize("rows", [1 << 26, 1000])
def test_agrees_with_float64(k: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(k)
    centres = torch.randn(5, 16, generator=generator)
    bank_labels = torch.randint(5, (333,), generator=generator)
    labels = torch.randint(5, (101,), generator=generator)

    def cloud(of: Tensor) -> Tensor:
        noise = 1.7 * torch.randn(len(of), 16, generator=generator)
        return torch.nn.functional.normalize(centres[of] + noise, dim=1)

    bank, features = cloud(bank_labels), cloud(labels)
    expected = reference_accuracy(bank, bank_labels, features, labels, k, 0.07)
    assert 0.3 < expected < 0.95, "the oracle would not tell right from wrong"
    monkeypatch.setattr(knn, "SIMILARITIES", rows)  # 1000: three queries at a time
    found = knn_accuracy(bank, bank_labels, features, labels, k=k, temperature=0.07, num_classes=5)
    assert found == pytest.approx(expected, abs=1e-9)


def test_similarities_held_at_a_time_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    topk = torch.Tensor.topk

    def counted(self: Tensor, k: int, dim: int) -> object:
        held.append(self.numel())
        return topk(self, k, dim)

    monkeypatch.setattr(knn, "SIMILARITIES", 500)
    monkeypatch.setattr(torch.Tensor, "topk", counted)
    ones = torch.ones(100, 4) / 2
    zeros = torch.zeros(100, dtype=torch.int64)
    assert knn_accuracy(ones, zeros, ones, zeros, k=3, temperature=0.1, num_classes=1) == 1.0
    assert held == [500] * 20


@pytest.mark.parametrize("bank_rows", [50, 1 << 16])
def test_a_bank_in_parts_and_on_ranks_is_the_whole_bank(
    bank_rows: int, two_ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(5)
    bank, queries = (
        torch.nn.functional.normalize(torch.randn(n, 8, generator=generator)) for n in (233, 40)
    )
    cosines = queries.double() @ bank.double().T
    expected = cosines.argsort(dim=1, descending=True)[:, :120]
    for similar, number in two_ranks.run(nearest_of_share, bank, queries, 120, bank_rows):
        assert torch.equal(number, expected)
        torch.testing.assert_close(similar.double(), cosines.gather(1, expected))
    monkeypatch.setattr(knn, "BANK_ROWS", bank_rows)
    assert torch.equal(nearest(bank, 0, queries, 120)[1], expected)


def nearest_of_share(
    world: World, bank: Tensor, queries: Tensor, k: int, bank_rows: int
) -> tuple[Tensor, Tensor]:
    """A share of 3 samples on rank 0, fewer than k, and of 230 on rank 1."""
    knn.BANK_ROWS = bank_rows
    first, stop = ((0, 3), (3, len(bank)))[world.rank]
    return nearest(bank[first:stop], first, queries, k, world)


def test_several_k_are_each_k_by_itself() -> None:
    generator = torch.Generator().manual_seed(6)
    bank, queries = (
        torch.nn.functional.normalize(torch.randn(n, 4, generator=generator)) for n in (90, 50)
    )
    labels, wanted = torch.arange(90) % 3, torch.arange(50) % 3
    rest: dict[str, Any] = {"temperature": 0.5, "num_classes": 3}
    many = knn_accuracies(bank, labels, queries, wanted, ks=[1, 9, 90], **rest)
    assert many == [knn_accuracy(bank, labels, queries, wanted, k=k, **rest) for k in (1, 9, 90)]
    assert len(set(many)) > 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bank": torch.ones(4, 3)}, r"\(4, 3\)"),
        ({"bank": torch.ones(0, 2), "bank_labels": torch.zeros(0)}, "at least one bank sample"),
        ({"features": torch.ones(0, 2), "labels": torch.zeros(0)}, "one query"),
        ({"labels": torch.zeros(5)}, r"query labels \(5,\)"),
        ({"bank_labels": torch.full((4,), 2)}, r"bank labels outside of \[0, 2\)"),
        ({"k": 0}, "k must be at least 1"),
        ({"temperature": 0.0}, "temperature positive"),
    ],
)
def test_refuses_arguments_without_an_answer(change: dict[str, Tensor], words: str) -> None:
    arguments: dict[str, object] = {
        "bank": torch.ones(4, 2),
        "bank_labels": torch.zeros(4, dtype=torch.int64),
        "features": torch.ones(3, 2),
        "labels": torch.zeros(3, dtype=torch.int64),
        "k": 2,
        "temperature": 0.07,
        "num_classes": 2,
    }
    with pytest.raises(ValueError, match=words):
        knn_accuracy(**(arguments | change))  # type: ignore[arg-type]
