"""Linear classification to the letter of the published protocol.

Source: the official `main_lincls.py`. One difference: where ranks do not divide the last batch of
an epoch, the official sampler repeats images; here each counts once, in training and validation.

n local batch, D feature dimension, C classes.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastmoco.evaluate.labelled_images import LabelledImages
from fastmoco.evaluate.labelled_training import LabelledTraining, new_head
from fastmoco.evaluate.linear.cached import Schedule
from fastmoco.evaluate.linear.frozen import CheckedTrunk
from fastmoco.machine.collectives import all_reduce_mean_
from fastmoco.machine.ranks import World


class TrunkChangedError(RuntimeError):
    """The frozen trunk is not what it was: the accuracy would mean nothing."""


class Protocol(LabelledTraining):
    """One linear layer on the frozen trunk: lr 30, momentum 0.9, no weight decay, steps 60 and 80.

    Raises `ConfigError` for an `out` that holds another classification.
    """

    kind = "linear"

    def __init__(
        self,
        trunk: CheckedTrunk,
        train: LabelledImages,
        test: LabelledImages,
        schedule: Schedule,
        *,
        lr: float,
        out: Path,
        world: World,
        workers: int = 0,
    ) -> None:
        self.trunk, self.schedule, self.lr = trunk, schedule, lr
        self.before = trunk.fingerprint()
        super().__init__(
            train,
            test,
            epochs=schedule.epochs,
            batch_size=schedule.batch_size,
            seed=schedule.seed,
            identity=[asdict(schedule), lr, self.before],
            out=out,
            world=world,
            workers=workers,
        )
        self.fc = new_head(trunk.features, len(train.class_names), schedule.seed)
        self.fc.to(world.device)
        self.optimizer = torch.optim.SGD(
            self.fc.parameters(), lr, momentum=schedule.momentum, weight_decay=0.0
        )

    def rate(self, step: int) -> float:
        """By the epoch."""
        return self.lr * self.schedule.factor(step // self.steps_per_epoch)

    def learn(self, images: Tensor, labels: Tensor, everyone: int, step: int) -> Tensor:
        """See `LabelledTraining.learn`."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step)
        return self.step(self.trunk(images)[: len(labels)], labels, everyone)

    def step(self, features: Tensor, labels: Tensor, everyone: int) -> Tensor:
        """One step of SGD on (n, D) of every rank, `everyone` rows of all ranks together.

        n may be another on each rank, and 0. Returns (2,): this rank's sum of losses and of hits.
        """
        logits = self.fc(features)
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        self.optimizer.zero_grad()
        (loss * self.world.size / everyone).backward()  # the mean over ranks is that over rows
        gradients = [p.grad for p in self.fc.parameters() if p.grad is not None]
        all_reduce_mean_(gradients, self.world)
        self.optimizer.step()
        return torch.stack([loss.detach(), (logits.argmax(1) == labels).sum()])

    def logits(self, images: Tensor) -> Tensor:
        """See `LabelledTraining.logits`."""
        found: Tensor = self.fc(self.trunk(images))
        return found

    def check(self) -> None:
        """Raises `TrunkChangedError` unless every bit of the trunk is the original one."""
        if self.trunk.fingerprint() != self.before:
            raise TrunkChangedError("the frozen trunk has changed while its classifier learned")

    def state(self) -> dict[str, Any]:
        """The layer and its optimizer."""
        return {"fc": self.fc.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.fc.load_state_dict(state["fc"])
        self.optimizer.load_state_dict(state["optimizer"])
