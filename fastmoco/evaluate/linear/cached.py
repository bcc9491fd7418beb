"""Linear classifiers of all settings of a sweep, trained at once on stored features.

The classifiers share their batches, so one step is two matrix products for all of them:
(b, D) @ (D, S C) for the logits, (S C, b) @ (b, D) for the gradient. Each follows the path
that `torch.optim.SGD` would take with it alone.

n images, V crops of each, D feature dimension, C classes, S settings, b batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastmoco.data.order import EpochOrder
from fastmoco.evaluate.labelled_training import place_of

LEARNING_RATES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 100.0, 300.0)
WEIGHT_DECAYS = (0.0, 1e-6, 1e-4)


@dataclass(frozen=True)
class Schedule:
    """What all settings have in common; the defaults are the published protocol."""

    epochs: int = 100
    batch_size: int = 256
    milestones: tuple[int, ...] = (60, 80)
    """Epochs at which the learning rate is divided by 10."""
    momentum: float = 0.9
    seed: int = 0

    def factor(self, epoch: int) -> float:
        """Of the learning rate in this epoch."""
        return float(0.1 ** sum(epoch >= milestone for milestone in self.milestones))


@dataclass
class Classifiers:
    """S linear classifiers; they start with weights from N(0, 0.01^2), all the same, and bias 0."""

    weight: Tensor
    """(S, C, D)."""
    bias: Tensor
    """(S, C)."""
    momenta: list[Tensor] = field(default_factory=list)

    @staticmethod
    def start(settings: int, classes: int, like: Tensor, seed: int) -> Classifiers:
        """`like` (n, D) gives D, the type and the device."""
        generator = torch.Generator().manual_seed(seed)
        first = torch.randn(classes, like.shape[1], generator=generator) * 0.01
        weight = first.to(like).repeat(settings, 1, 1)
        return Classifiers(weight, weight.new_zeros(settings, classes))

    def logits(self, x: Tensor) -> Tensor:
        """(b, D) to (b, S, C)."""
        settings, classes, width = self.weight.shape
        flat = torch.addmm(self.bias.flatten(), x, self.weight.view(-1, width).T)
        return flat.view(len(x), settings, classes)

    def step(self, x: Tensor, labels: Tensor, lr: Tensor, wd: Tensor, momentum: float) -> None:
        """One step of SGD on the mean cross-entropy of (b, D), (b,); lr and wd: (S,)."""
        settings, classes, width = self.weight.shape
        error = self.logits(x).softmax(dim=2)
        error.scatter_add_(
            2,
            labels.view(-1, 1, 1).expand(-1, settings, 1),
            error.new_full((len(x), settings, 1), -1.0),
        )
        error = (error / len(x)).view(len(x), settings * classes)
        gradients = [
            (error.T @ x).view(settings, classes, width),
            error.sum(dim=0).view(settings, classes),
        ]
        if not self.momenta:
            self.momenta = [torch.zeros_like(g) for g in gradients]
        pairs = zip((self.weight, self.bias), gradients, self.momenta, strict=True)
        for parameter, gradient, velocity in pairs:
            shape = (-1,) + (1,) * (parameter.ndim - 1)
            gradient.addcmul_(parameter, wd.view(shape).expand_as(parameter))
            velocity.mul_(momentum).add_(gradient)
            parameter.sub_(velocity * lr.view(shape))

    def accuracies(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Top-1 and top-5, (S,) each: shares of the rows of (n, D) in [0, 1].

        Equal logits count against the label. A classifier that diverged to infinity has 0.
        """
        correct = torch.zeros(2, len(self.weight), dtype=torch.int64, device=x.device)
        for rows, wanted in zip(x.split(2048), labels.split(2048), strict=True):
            logits = self.logits(rows)
            place = place_of(logits, wanted[:, None].expand(-1, logits.shape[1]))
            correct += torch.stack([(place < k).sum(dim=0) for k in (1, 5)])
        finite = self.weight.flatten(1).isfinite().all(dim=1) & self.bias.isfinite().all(dim=1)
        top1, top5 = torch.where(finite, correct.double() / max(len(x), 1), 0.0)
        return top1, top5


def batches(n: int, batch_size: int, epoch: int, seed: int) -> list[np.ndarray]:
    """Rows of each batch of an epoch: a function of (n, seed, epoch). The last may be smaller."""
    order = EpochOrder(n, seed, 0, ()).samples(epoch, np.arange(n))
    return [order[start : start + batch_size] for start in range(0, n, batch_size)]


def train_sweep(
    crops: Tensor,
    labels: Tensor,
    *,
    classes: int,
    lr: Sequence[float],
    weight_decay: Sequence[float],
    schedule: Schedule,
    progress: bool = False,
) -> Classifiers:
    """The classifiers of S settings (lr[s], weight_decay[s]) after the whole schedule.

    crops: (V, n, D) features of V fixed crops of every image; epoch e learns from crop e mod V.
    labels: int64 (n,) in [0, classes), on the same device. Raises `ValueError` for shapes that do
    not match.
    """
    if crops.ndim != 3 or labels.shape != crops.shape[1:2] or len(lr) != len(weight_decay):
        raise ValueError(
            f"crops {tuple(crops.shape)}, labels {tuple(labels.shape)}, {len(lr)} learning rates, "
            f"{len(weight_decay)} weight decays: need (V, n, D), (n,), S and S"
        )
    model = Classifiers.start(len(lr), classes, crops[0], schedule.seed)
    rates, decays = (
        torch.tensor(x, dtype=crops.dtype).to(crops.device) for x in (lr, weight_decay)
    )
    for epoch in tqdm(range(schedule.epochs), "classifiers", unit="epoch", disable=not progress):
        now = rates * schedule.factor(epoch)
        features = crops[epoch % len(crops)]
        for rows in batches(len(labels), schedule.batch_size, epoch, schedule.seed):
            picked = torch.from_numpy(rows).to(crops.device)
            model.step(features[picked], labels[picked], now, decays, schedule.momentum)
    return model


@dataclass(frozen=True)
class Sweep:
    """The result of every setting."""

    settings: list[tuple[float, float]]
    """Learning rate and weight decay."""
    held_out: list[float]
    """Accuracy in [0, 1] on the part of the training images that chooses."""
    test: list[float]
    test_top5: list[float]

    @property
    def best(self) -> int:
        """The setting with the highest accuracy on the held-out images; the first of equal ones."""
        return max(range(len(self.settings)), key=lambda s: self.held_out[s])

    @property
    def best_without_decay(self) -> int:
        """The same among the settings without weight decay, as the full protocol is."""
        plain = [s for s, (_, decay) in enumerate(self.settings) if decay == 0]
        return max(plain, key=lambda s: self.held_out[s])

    def table(self) -> str:
        """One line per setting, the chosen one marked."""
        lines = ["      lr   weight decay   held out    test      top-5"]
        for s, (lr, wd) in enumerate(self.settings):
            mark = "  <- chosen" if s == self.best else ""
            shares = (self.held_out[s], self.test[s], self.test_top5[s])
            figures = "".join(f"{100 * share:8.2f} %" for share in shares)
            lines.append(f"{lr:8g}   {wd:12g} {figures}{mark}")
        return "\n".join(lines)


def sweep(
    train: tuple[Tensor, Tensor],
    choose: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    classes: int,
    schedule: Schedule,
    learning_rates: Sequence[float] = LEARNING_RATES,
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
    progress: bool = False,
) -> Sweep:
    """Train every pair of a learning rate and a weight decay, and measure all of them.

    train: crops (V, n, D) and labels (n,); choose and test: features (m, D) and labels (m,).
    """
    settings = list(product(learning_rates, weight_decays))
    model = train_sweep(
        *train,
        classes=classes,
        lr=[lr for lr, _ in settings],
        weight_decay=[wd for _, wd in settings],
        schedule=schedule,
        progress=progress,
    )
    chosen, _ = model.accuracies(*choose)
    top1, top5 = model.accuracies(*test)
    return Sweep(settings, chosen.tolist(), top1.tolist(), top5.tolist())
