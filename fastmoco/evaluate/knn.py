"""kNN classification with weighted votes: how well features separate classes, without training.

The k bank samples most similar to a query vote for their class with weight exp(cosine / T); the
class with the largest sum wins. From instance discrimination (arXiv 1805.01978), where k = 200 and
T = 0.07.

M bank samples, n queries, D feature dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Similarities held at a time: 256 MiB of fp32, whatever the size of the bank.
SIMILARITIES = 1 << 26


@torch.no_grad()
def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    *,
    k: int,
    temperature: float,
    num_classes: int,
) -> float:
    """Share of the queries, in [0, 1], whose weighted vote falls on their own label.

    bank: (M, D), features: (n, D), L2-normalized, of any float type on one device; similarities
        and votes are fp32.
    bank_labels: (M,), labels: (n,), integers in [0, num_classes); moved to the features' device.
    k larger than M counts as M.

    Ties: among classes with exactly equal votes the lowest label wins, right or wrong. Among bank
    samples exactly as similar as the k-th, those that still fit into the k are `torch.topk`'s
    choice, which is not specified; with k = M there is no such choice.

    Raises `ValueError`, with shapes, for shapes that do not match, an empty bank, no queries,
    k < 1, temperature <= 0, or labels out of range.
    """
    _check(bank, bank_labels, features, labels, k, temperature, num_classes)
    k = min(k, len(bank))
    bank = bank.float()
    bank_labels = bank_labels.to(bank.device, torch.int64)
    labels = labels.to(bank.device, torch.int64)
    rows = max(1, SIMILARITIES // max(len(bank), num_classes))
    correct = torch.zeros((), dtype=torch.int64, device=bank.device)
    for start in range(0, len(features), rows):
        queries, wanted = features[start : start + rows], labels[start : start + rows]
        similar, neighbours = (queries.float() @ bank.T).topk(k, dim=1)
        # Relative to the nearest neighbour: the same winner, and exp cannot overflow for small T.
        weights = ((similar - similar[:, :1]) / temperature).exp()
        votes = torch.zeros(len(queries), num_classes, device=bank.device)
        votes.scatter_add_(1, bank_labels[neighbours], weights)
        correct += (votes.argmax(dim=1) == wanted).sum()
    return correct.item() / len(features)


def _check(
    bank: Tensor,
    bank_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    k: int,
    temperature: float,
    num_classes: int,
) -> None:
    """Raise `ValueError` for arguments that have no answer."""
    shapes = f"bank {tuple(bank.shape)}, features {tuple(features.shape)}"
    if bank.ndim != 2 or features.ndim != 2 or bank.shape[1] != features.shape[1]:
        raise ValueError(f"features need the shape (n, D) of the bank (M, D): {shapes}")
    if not len(bank) or not len(features):
        raise ValueError(f"kNN needs at least one bank sample and one query: {shapes}")
    for name, given, rows in (("bank", bank_labels, bank), ("query", labels, features)):
        if given.shape != (len(rows),):
            raise ValueError(f"{name} labels {tuple(given.shape)} do not match: {shapes}")
        if given.min() < 0 or given.max() >= num_classes:
            raise ValueError(f"{name} labels outside of [0, {num_classes})")
    if k < 1 or temperature <= 0:
        raise ValueError(f"k must be at least 1 and temperature positive: {k}, {temperature}")
