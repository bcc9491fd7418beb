"""Fine-tuning: the whole network learns from labels, the trunk slowly and the new head fast.

`torchrun -m fastmoco.evaluate.finetune --checkpoint FILE --data.root DIR`: SGD with momentum 0.9,
and a learning rate of their own for trunk and head. The defaults are those of SwAV's script for
10 % of ImageNet's labels (eval_semisup.py: 0.01 and 0.2 at batch 256, 20 epochs, no weight decay),
with a cosine in place of its steps. `--layer_decay` lowers the rate of every stage below the last.

n local batch, C classes.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmoco.config import ConfigError
from fastmoco.config.command import CommandParser
from fastmoco.evaluate.features import trunk_of
from fastmoco.evaluate.labelled_images import LabelledImages
from fastmoco.evaluate.labelled_part import both_folders, check_numbers, labelled_parser
from fastmoco.evaluate.labelled_training import LabelledTraining, keep_result, new_head
from fastmoco.evaluate.options import View, command
from fastmoco.machine.collectives import average_gradients, averaged
from fastmoco.machine.precision import choose_precision
from fastmoco.machine.ranks import World
from fastmoco.machine.stopping import exit_code
from fastmoco.network.encoder import NormalizePixels, pixel_statistics
from fastmoco.weights import files
from fastmoco.weights.checksums import checksums
from fastmoco.weights.read import Weights, read

STAGES = ("layer1", "layer2", "layer3", "layer4")


class Classifier(nn.Module):
    """The trunk of a file and a `new_head`: images as in `Batch` to logits (n, C) in fp32."""

    def __init__(self, weights: Weights, classes: int, seed: int, device: torch.device) -> None:
        super().__init__()
        self.network = trunk_of(weights)
        self.network.add_module("fc", new_head(weights.features, classes, seed))
        self.normalize_pixels = NormalizePixels(device, pixel_statistics(weights.pixels))
        self.to(device)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.network(self.normalize_pixels(images))
        return logits.float()


def stage_rates(
    network: nn.Module, lr: float, head_lr: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups of SGD, from the stem to the head, each with its `peak` learning rate.

    The last stage has lr, each one below it layer_decay times the rate of the one above, and the
    stem (conv1, bn1) layer_decay times that of the first; the head has head_lr.
    """
    groups: list[list[nn.Parameter]] = [[] for _ in range(len(STAGES) + 2)]
    for name, parameter in network.named_parameters():
        first = name.partition(".")[0]
        place = len(groups) - 1 if first == "fc" else 0
        if first in STAGES:
            place = 1 + STAGES.index(first)
        groups[place].append(parameter)
    rates = [lr * layer_decay ** (len(STAGES) - place) for place in range(len(STAGES) + 1)]
    return [
        {"params": parameters, "lr": rate, "peak": rate}
        for parameters, rate in zip(groups, [*rates, head_lr], strict=True)
    ]


def cosine(step: int, warm: int, total: int) -> float:
    """Of the peak rate: linear over the first `warm` steps, then a half cosine towards 0."""
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(total - warm, 1)))


class Finetuning(LabelledTraining):
    """All of the network, on several ranks by DDP. Batch norm counts on each rank for itself.

    Raises `ConfigError` for an `out` that holds another fine-tuning.
    """

    kind = "finetune"

    def __init__(
        self,
        weights: Weights,
        train: LabelledImages,
        test: LabelledImages,
        given: argparse.Namespace,
        world: World,
    ) -> None:
        self.precision = choose_precision(given.precision, world.device).dtype
        if self.precision == torch.float16:  # would need a scaler of the loss
            self.precision = torch.float32
        rates = [given.lr, given.head_lr, given.layer_decay]
        recipe = [*rates, given.weight_decay, given.warmup_epochs, str(self.precision)]
        super().__init__(
            train,
            test,
            epochs=given.epochs,
            batch_size=given.batch_size,
            seed=given.seed,
            identity=[*recipe, checksums(weights.trunk)],
            out=given.out,
            world=world,
            workers=given.workers,
        )
        model = Classifier(weights, len(train.class_names), given.seed, world.device)
        groups = stage_rates(model.network, *rates)
        self.optimizer = torch.optim.SGD(
            groups, given.lr, momentum=0.9, weight_decay=given.weight_decay, fused=True
        )
        self.warm = given.warmup_epochs * self.steps_per_epoch
        self.model = model
        self.parallel = average_gradients(model, world)

    def rate(self, step: int) -> float:
        """That of the last stage of the trunk."""
        return self._factor(step) * float(self.optimizer.param_groups[-2]["peak"])

    def _factor(self, step: int) -> float:
        return cosine(step, self.warm, self.epochs * self.steps_per_epoch)

    def learn(self, images: Tensor, labels: Tensor, everyone: int, step: int) -> Tensor:
        """See `LabelledTraining.learn`. Images without a label take part in batch norm alone."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self._factor(step)
        self.model.train()
        logits = self._forward(self.parallel, images)[: len(labels)]
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        self.optimizer.zero_grad()
        (loss * self.world.size / everyone).backward()  # the mean over ranks is that over rows
        self.optimizer.step()
        return torch.stack([loss.detach(), (logits.argmax(1) == labels).sum()])

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """See `LabelledTraining.logits`."""
        self.model.eval()
        return self._forward(self.model, images)

    def _forward(self, model: nn.Module, images: Tensor) -> Tensor:
        on = self.precision != torch.float32
        with torch.autocast(self.world.device.type, self.precision, enabled=on):
            found: Tensor = model(images)
        return found

    def validate(self) -> tuple[float, float]:
        """See `LabelledTraining.validate`; with the batch norm statistics averaged over ranks."""
        with averaged(self._statistics(), self.world):
            return super().validate()

    def _statistics(self) -> list[Tensor]:
        return [b for b in self.model.network.buffers() if b.dtype == torch.float32]

    def state(self) -> dict[str, Any]:
        """The network, of torchvision's names, and its optimizer."""
        with averaged(self._statistics(), self.world):
            network = {name: x.clone() for name, x in self.model.network.state_dict().items()}
        return {"state_dict": network, "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.model.network.load_state_dict(state["state_dict"])
        self.optimizer.load_state_dict(state["optimizer"])


def parser() -> CommandParser:
    """The options."""
    options = labelled_parser("fastmoco finetune", __doc__ or "")
    add = options.add_argument
    add("--lr", type=float, default=0.01, help="peak learning rate of the last stage of the trunk")
    add("--head_lr", type=float, default=0.2, help="peak learning rate of the head")
    add("--layer_decay", type=float, default=1.0, help="rate of a stage over that of the next one")
    add("--weight_decay", type=float, default=0.0)
    add("--epochs", type=int, default=20)
    add("--warmup_epochs", type=int, default=0)
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    return options


def check(given: argparse.Namespace) -> None:
    """Raises `ConfigError` for numbers that cannot train."""
    check_numbers(given)
    for name in ("lr", "head_lr", "layer_decay"):
        if not 0 < getattr(given, name) < math.inf:
            raise ConfigError(f"--{name} is {getattr(given, name)}, but must be greater than 0.")
    if not 0 <= given.weight_decay < math.inf:
        raise ConfigError(f"--weight_decay is {given.weight_decay}, but must be 0 or more.")
    if not 0 <= given.warmup_epochs < given.epochs:
        raise ConfigError(
            f"--warmup_epochs is {given.warmup_epochs}, but must be less than --epochs "
            f"{given.epochs}, and not negative."
        )


def _finetune(given: argparse.Namespace, world: World) -> None:
    check(given)
    weights = read(given.checkpoint)
    if given.out is None:
        given.out = weights.path.parent / "finetune"
    train, test = both_folders(given, View.of(given, weights))
    training = Finetuning(weights, train, test, given, world)
    if world.is_main:
        print(weights.describe(), flush=True)
    result = training.run()
    if not world.is_main:
        return
    # `state` would be a collective; this is rank 0's own copy of what the last epoch saved.
    saved = files.load(given.out / "finetune.pth.tar")["state_dict"]
    files.write_torch(given.out / "classifier.pth", saved)
    recipe = {name: getattr(given, name) for name in ("lr", "head_lr", "layer_decay", "labels")}
    keep_result(given.out, {**result, **recipe, "seed": given.seed})
    print(
        f"fine-tuned top-1 {100 * training.last:.2f} % after the last epoch (best "
        f"{100 * training.best:.2f} %); the network of the last epoch, in torchvision's format "
        f"with {len(train.class_names)} classes, is {given.out / 'classifier.pth'}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 with one sentence for input that cannot be evaluated."""
    return command(parser(), arguments, _finetune)


if __name__ == "__main__":
    sys.exit(exit_code(main))
