"""The schedule of SGD for transfer: steps, warm-up, and which weights decay."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import torch
from torch import nn

from fastmoco.config import ConfigError
from fastmoco.config.command import CommandParser


@dataclass(frozen=True)
class Schedule:
    """SGD whose learning rate falls in steps."""

    iterations: int
    batch_size: int
    """Over all ranks."""
    lr: float
    steps: tuple[int, ...]
    """Iterations from which on the rate is ten times lower."""
    warmup: int
    """Iterations over which the rate rises in a line from a thousandth."""
    momentum: float = 0.9
    weight_decay: float = 1e-4

    @classmethod
    def of(cls, given: argparse.Namespace) -> Schedule:
        """Raises `ConfigError` for numbers that cannot train."""
        for name in ("iterations", "batch_size"):
            if getattr(given, name) < 1:
                raise ConfigError(f"--{name} is {getattr(given, name)}, but must be at least 1.")
        if not 0 < given.lr < math.inf:
            raise ConfigError(f"--lr is {given.lr}, but must be greater than 0.")
        if not 0 <= given.weight_decay < math.inf:
            raise ConfigError(f"--weight_decay is {given.weight_decay}, but must be 0 or more.")
        if given.warmup < 0:
            raise ConfigError(f"--warmup is {given.warmup}, but must be 0 or more.")
        steps = tuple(given.steps)
        if list(steps) != sorted(set(steps)) or any(s < 1 for s in steps):
            told = " ".join(map(str, steps))
            raise ConfigError(f"--steps {told} must be iterations in rising order, from 1 on.")
        return cls(
            given.iterations,
            given.batch_size,
            given.lr,
            steps,
            given.warmup,
            weight_decay=given.weight_decay,
        )

    def rate(self, step: int) -> float:
        """The learning rate of step number `step`, from 0, as Detectron2's WarmupMultiStepLR."""
        factor = 1.0
        if step < self.warmup:
            share = step / self.warmup
            factor = (1 - share) / 1000 + share
        return self.lr * factor * 0.1 ** sum(step >= s for s in self.steps)

    def optimizer(self, model: nn.Module) -> torch.optim.SGD:
        """Weights and biases of batch norm do not decay, as in Detectron2 (WEIGHT_DECAY_NORM 0)."""
        norms = {
            id(parameter)
            for module in model.modules()
            if isinstance(module, nn.modules.batchnorm._NormBase)
            for parameter in module.parameters(recurse=False)
        }
        own = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in own if id(p) not in norms], "weight_decay": self.weight_decay},
            {"params": [p for p in own if id(p) in norms], "weight_decay": 0.0},
        ]
        # Fused, or every step allocates all decayed gradients once more.
        return torch.optim.SGD(groups, self.lr, momentum=self.momentum, fused=True)


def schedule_options(
    parser: CommandParser, *, iterations: int, lr: float, steps: tuple[int, ...], warmup: int
) -> None:
    """The options of a `Schedule`, with these defaults."""
    add = parser.add_argument
    add("--iterations", type=int, default=iterations, help="steps of training in all")
    add("--batch_size", type=int, default=16, help="pictures of a step over all ranks")
    add("--lr", type=float, default=lr, help="learning rate behind the warm-up")
    add("--steps", type=int, nargs="*", default=steps, help="iterations at which lr falls by 10")
    add("--warmup", type=int, default=warmup, help="iterations over which lr rises in a line")
    add("--weight_decay", type=float, default=1e-4, help="of all weights but batch norm's")
