"""Which of the labelled images a classifier may learn from: shares that keep every class."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from fastmoco.config import ConfigError
from fastmoco.data.order import stream_key

_LABELS, _HELD_OUT = 11, 12  # purposes of random streams


def _shuffled(n: int, *words: int) -> Tensor:
    generator = torch.Generator().manual_seed(stream_key(*words) >> 1)
    return torch.randperm(n, generator=generator)


def choose_labels(labels: Tensor, part: str, seed: int) -> Tensor:
    """Indices, ascending int64, of the images that keep their label; the same number per class.

    labels: int64 (n,). part: `all`, a share such as `1%`, or a number such as `5-per-class`. A
    share is taken of each class by itself, at least one image of each. Raises `ConfigError` for
    another text, or a class with fewer images than asked for.
    """
    if part == "all":
        return torch.arange(len(labels))
    share = re.fullmatch(r"(\d+(?:\.\d+)?)%", part)
    number = re.fullmatch(r"(\d+)-per-class", part)
    if not (share and 0 < float(share[1]) <= 100) and not (number and int(number[1])):
        raise ConfigError(f"--labels is {part}: write all, a share such as 10%, or 5-per-class.")
    kept = []
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().flatten()
        wanted = int(number[1]) if number else 0
        if share:
            wanted = max(1, round(float(share[1]) / 100 * len(rows)))
        if wanted > len(rows):
            raise ConfigError(
                f"--labels asks for {wanted} images per class, but class number {label} has only "
                f"{len(rows)}: ask for at most {len(rows)}."
            )
        kept.append(rows[_shuffled(len(rows), seed, label, _LABELS)[:wanted]])
    return torch.cat(kept).sort().values


def hold_out(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices to train on and to choose settings on: two parts of range(n), balanced by class.

    A class of one image is trained on only. Raises `ConfigError` if nothing could be held out.
    """
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().flatten()
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        held[rows[_shuffled(len(rows), seed, label, _HELD_OUT)[:count]]] = True
    if not held.any():
        raise ConfigError(
            "One image per class leaves none to choose a learning rate on: use more --labels."
        )
    return (~held).nonzero().flatten(), held.nonzero().flatten()
