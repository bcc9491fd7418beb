"""kNN classification with weighted votes: how well features separate classes, without training.

    python -m fastmoco.evaluate.knn --checkpoint FILE --data.root DIR

The k bank samples most similar to a query vote for their class with weight exp(cosine / T); the
class with the largest sum wins. From instance discrimination (arXiv 1805.01978), where k = 200 and
T = 0.07. The search is exact. Every rank holds a share of the bank, and looks at a part of it at a
time.

M bank samples over all ranks, n queries, D feature dimension.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from fastmoco.config import ConfigError
from fastmoco.evaluate.options import (
    Evaluation,
    command,
    evaluation_parser,
    labelled_options,
    untrained,
)
from fastmoco.machine.collectives import all_gather, gather_rows
from fastmoco.machine.ranks import World
from fastmoco.machine.stopping import exit_code

# Of the weights of neighbours, as in the paper.
TEMPERATURE = 0.07
# Similarities held at a time: 256 MiB of fp32, whatever the size of the bank.
SIMILARITIES = 1 << 26
# Bank samples compared at a time.
BANK_ROWS = 1 << 16
ALONE = World(0, 0, 1, torch.device("cpu"), "none")


def nearest(
    bank: Tensor, first: int, queries: Tensor, k: int, world: World = ALONE
) -> tuple[Tensor, Tensor]:
    """Cosines (n, k), descending, and numbers int64 (n, k) of the nearest of the whole bank.

    bank: fp32 (m, D), the share of this rank, whose first sample has the number `first`; k is at
    most M. queries: fp32 (n, D), the same on every rank. Rows of both are L2-normalized.

    Among samples exactly as similar as the k-th, those that still fit in are `torch.topk`'s choice.
    """
    similar = queries.new_zeros(len(queries), 0)
    number = torch.zeros(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(bank), BANK_ROWS):
        part = queries @ bank[start : start + BANK_ROWS].T
        cosines, places = part.topk(min(k, part.shape[1]), dim=1)
        similar, number = _best(
            torch.cat([similar, cosines], 1), torch.cat([number, places + first + start], 1), k
        )
    if world.size == 1:
        return similar, number
    missing = (0, k - similar.shape[1])
    similar = torch.nn.functional.pad(similar, missing, value=-torch.inf)
    number = torch.nn.functional.pad(number, missing)
    everywhere = [
        all_gather(x, world).view(world.size, len(queries), k).transpose(0, 1).flatten(1)
        for x in (similar, number)
    ]
    return _best(everywhere[0], everywhere[1], k)


def _best(similar: Tensor, number: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most similar of each row."""
    if similar.shape[1] <= k:
        return similar, number
    similar, places = similar.topk(k, dim=1)
    return similar, number.gather(1, places)


@torch.no_grad()
def knn_accuracies(
    bank: Tensor,
    bank_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    *,
    ks: Sequence[int],
    temperature: float,
    num_classes: int,
    world: World = ALONE,
) -> list[float]:
    """For each k the share of the queries, in [0, 1], whose weighted vote falls on their label.

    bank: (m, D), features: (n, D), L2-normalized, of any float type on the device of this rank:
        its share of the bank, and all queries. Similarities and votes are fp32.
    bank_labels: (M,), labels: (n,), integers in [0, num_classes), of all ranks.
    k larger than M counts as M.

    Among classes with exactly equal votes the lowest label wins, right or wrong; for equally
    similar samples see `nearest`.

    Raises `ValueError`, with shapes, for shapes that do not match, an empty bank, no queries,
    k < 1, temperature <= 0, or labels out of range.
    """
    counts = gather_rows(torch.tensor([[len(bank)]], device=bank.device), world)[:, 0].tolist()
    total, first = sum(counts), sum(counts[: world.rank])
    _check(bank, total, bank_labels, features, labels, ks, temperature, num_classes)
    bank = bank.float()
    bank_labels = bank_labels.to(bank.device, torch.int64)
    labels = labels.to(bank.device, torch.int64)
    rows = max(1, SIMILARITIES // max(min(total, BANK_ROWS), num_classes))
    correct = torch.zeros(len(ks), dtype=torch.int64, device=bank.device)
    for start in range(0, len(features), rows):
        queries, wanted = features[start : start + rows].float(), labels[start : start + rows]
        similar, neighbours = nearest(bank, first, queries, min(max(ks), total), world)
        # Relative to the nearest neighbour: the same winner, and exp cannot overflow for small T.
        weights = ((similar - similar[:, :1]) / temperature).exp()
        voters = bank_labels[neighbours]
        for at, k in enumerate(ks):
            votes = torch.zeros(len(queries), num_classes, device=bank.device)
            votes.scatter_add_(1, voters[:, :k], weights[:, :k])
            correct[at] += (votes.argmax(dim=1) == wanted).sum()
    return [hits / len(features) for hits in correct.tolist()]


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
    """`knn_accuracies` for one k on one rank."""
    (found,) = knn_accuracies(
        bank,
        bank_labels,
        features,
        labels,
        ks=[k],
        temperature=temperature,
        num_classes=num_classes,
    )
    return found


def _check(
    bank: Tensor,
    total: int,
    bank_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    ks: Sequence[int],
    temperature: float,
    num_classes: int,
) -> None:
    """Raise `ValueError` for arguments that have no answer."""
    shapes = f"bank {tuple(bank.shape)}, features {tuple(features.shape)}"
    if bank.ndim != 2 or features.ndim != 2 or bank.shape[1] != features.shape[1]:
        raise ValueError(f"features need the shape (n, D) of the bank (M, D): {shapes}")
    if not total or not len(features):
        raise ValueError(f"kNN needs at least one bank sample and one query: {shapes}")
    for name, given, rows in (("bank", bank_labels, total), ("query", labels, len(features))):
        if given.shape != (rows,):
            raise ValueError(f"{name} labels {tuple(given.shape)} do not match: {shapes}")
        if given.min() < 0 or given.max() >= num_classes:
            raise ValueError(f"{name} labels outside of [0, {num_classes})")
    if not ks or min(ks) < 1 or temperature <= 0:
        raise ValueError(
            f"k must be at least 1 and temperature positive: {list(ks)}, {temperature}"
        )


def table(rows: Sequence[tuple[str, Sequence[float]]], ks: Sequence[int]) -> str:
    """Top-1 in per cent: a line per encoder, a column per k."""
    lines = ["kNN top-1".ljust(20) + "".join(f"k = {k}".rjust(10) for k in ks)]
    for name, found in rows:
        figures = "".join(f"{100 * x:8.2f} %" for x in found)
        lines.append(name.ljust(20) + (figures or "  bank too large"))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit code 2 with one sentence for input that cannot be evaluated."""
    options = evaluation_parser("fastmoco knn", "kNN top-1 of a frozen encoder on class folders.")
    labelled_options(options)
    options.add_argument("--k", type=int, nargs="+", default=[200], help="neighbours that vote")
    options.add_argument("--temperature", type=float, default=TEMPERATURE)
    options.add_argument("--max_bank", type=int, default=0, help="at most so many; 0 takes all")
    return command(options, arguments, _evaluate)


def _evaluate(given: argparse.Namespace, world: World) -> None:
    if min(given.k) < 1 or not given.temperature > 0 or given.max_bank < 0:
        raise ConfigError("--k must be at least 1, --temperature above 0, --max_bank 0 or more.")
    # Imported here: the monitor stands on this file.
    from fastmoco.evaluate.monitor import KnnTask

    evaluation = Evaluation.of(given, world)
    train_root, test_root = evaluation.labelled_roots(given)
    task = KnnTask(
        train_root,
        test_root,
        world,
        resize=evaluation.view.resize,
        image_size=evaluation.view.image_size,
        rule=evaluation.view.rule,
        any_name=given.any_name == "true",
        max_bank=given.max_bank,
    )
    votes = {"ks": given.k, "temperature": given.temperature}
    trained, fresh = (
        task.of_trunk(trunk, **votes, batch_size=given.batch_size)
        for trunk in (evaluation.trunk, untrained(evaluation, world))
    )
    pixels = task.of_pixels(**votes)
    if world.is_main:
        good = [len(images) - len(images.bad) for images in (task.bank, task.test)]
        print(evaluation.describe())
        print(f"{good[0]} bank and {good[1]} test images, {len(task.bank.class_names)} classes")
        rows = [("trained encoder", trained), ("raw pixels", pixels), ("untrained encoder", fresh)]
        print(table([*rows, ("chance", [task.chance] * len(given.k))], given.k), flush=True)


if __name__ == "__main__":
    sys.exit(exit_code(main))
