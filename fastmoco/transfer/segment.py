"""Segmentation from a trunk: `torchrun -m fastmoco.transfer.segment --checkpoint FILE ...`.

A fully convolutional network as in the paper (see `segmenter`), trained on crops of pictures that
are scaled by 0.5 to 2 and flipped, tested on whole pictures. The defaults are those of VOC: 30,000
iterations of 16 crops of 513 pixels.

H W of a picture, C classes with the background.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from fastmoco.config import ConfigError
from fastmoco.config.command import CommandParser
from fastmoco.machine import collectives
from fastmoco.machine.ranks import World
from fastmoco.machine.stopping import StopRequest
from fastmoco.method.agreement import on_every_rank
from fastmoco.transfer.command import command, shared_options, trunk_of
from fastmoco.transfer.datasets.choose import check_apart, learned_split, segmentation_set
from fastmoco.transfer.datasets.segmentation import IGNORE, Segmentations
from fastmoco.transfer.report import Picture, beside, chosen, draw_classes, write_report
from fastmoco.transfer.samples import Key, Prepared, uniforms
from fastmoco.transfer.schedule import schedule_options
from fastmoco.transfer.scores.mean_iou import PixelCounts
from fastmoco.transfer.segmenter import STRIDE, SegmentationLoss, Segmenter
from fastmoco.transfer.training import Training
from fastmoco.weights.checksums import checksums
from fastmoco.weights.read import Weights

SCALES = 0.5, 2.0
"""A picture is enlarged by a factor between them in training."""


class Crop(NamedTuple):
    """What a step learns from: uint8 (3, side, side) and (side, side)."""

    image: Tensor
    labels: Tensor


def prepare(item: tuple[Tensor, Tensor], key: Key, *, side: int, fill: Tensor) -> Crop:
    """A picture scaled, flipped and cropped by its key.

    What lies outside of the picture has the colour `fill`, uint8 (3,), and no label.
    """
    image, labels = item
    scale, flip, down, across = uniforms(key, 4)
    factor = SCALES[0] + scale * (SCALES[1] - SCALES[0])
    size = [max(1, round(length * factor)) for length in labels.shape]
    scaled = functional.interpolate(
        image[None].float(), size, mode="bilinear", align_corners=False, antialias=True
    )[0]
    image = scaled.round().clamp(0, 255).byte()
    labels = functional.interpolate(labels[None, None].float(), size, mode="nearest")[0, 0].byte()
    if flip < 0.5:
        image, labels = image.flip(-1), labels.flip(-1)
    top, left = (
        int(share * (max(0, length - side) + 1))
        for share, length in zip((down, across), size, strict=True)
    )
    image, labels = (x[..., top : top + side, left : left + side] for x in (image, labels))
    height, width = labels.shape
    canvas = fill[:, None, None].expand(3, side, side).clone()
    canvas[:, :height, :width] = image
    return Crop(canvas, functional.pad(labels, (0, side - width, 0, side - height), value=IGNORE))


def on_device(crops: list[Crop], device: torch.device) -> tuple[Tensor, Tensor]:
    """What `SegmentationLoss` takes."""
    images = torch.stack([one.image for one in crops]).to(device)
    return images, torch.stack([one.labels for one in crops]).to(device).long()


class Segmentation(Training):
    """A segmenter on its training pictures, tested on others."""

    def __init__(
        self,
        weights: Weights,
        train: Segmentations,
        test: Segmentations,
        given: argparse.Namespace,
        world: World,
    ) -> None:
        """Raises `ConfigError` for data and options that do not belong together."""
        if given.crop < 2 * STRIDE:
            raise ConfigError(f"--crop is {given.crop}, but must be at least {2 * STRIDE} pixels.")
        if train.classes != test.classes:
            raise ConfigError(f"{train.name} and {test.name} do not hold the same classes.")
        for one, what in ((train, "learn from"), (test, "score")):
            if not one.labelled:
                raise ConfigError(
                    f"{one.name} has no pixel to {what}: in its {len(one)} pictures none has a "
                    f"label other than {IGNORE}."
                )
        self.test = test
        self.segmenter = Segmenter(weights, world, len(train.classes), given.seed)
        fill = self.segmenter.mean.flatten().round().byte()
        super().__init__(
            SegmentationLoss(self.segmenter, world),
            self.segmenter,
            Prepared(train, partial(prepare, side=given.crop, fill=fill)),
            len(train),
            partial(on_device, device=world.device),
            given,
            world,
            [given.crop, train.name, train.classes, checksums(weights.trunk)],
            [test.name, len(test)],
        )

    def evaluate(self) -> dict[str, float]:
        """Scores of the test pictures, each of them passed through by itself on one rank."""
        own = on_every_rank(self.count, self.world)
        counts = PixelCounts(len(self.test.classes))
        for table in collectives.gather_objects(own, self.world):
            counts.table += table
        scores = counts.scores(self.test.classes)
        return {name: value for name, value in scores.items() if math.isfinite(value)}

    def count(self) -> Tensor:
        """The table of `PixelCounts` of this rank's pictures."""
        own = range(self.world.rank, len(self.test), self.world.size)
        quiet = None if self.world.is_main else True  # None: where standard error is a terminal
        counts = PixelCounts(len(self.test.classes))
        for number in tqdm(own, "test", leave=False, disable=quiet):
            image, labels = self.test[number]
            counts.add(self.predict(image), labels)
        return counts.table

    @torch.no_grad()
    def predict(self, image: Tensor) -> Tensor:
        """The class of each pixel of a picture, uint8 (3, H, W): uint8 (H, W).

        The picture is padded to a multiple of the stride with the mean colour.
        """
        height, width = image.shape[1:]
        rows, columns = (-(-length // STRIDE) * STRIDE for length in (height, width))
        picture = image[None].to(self.world.device).float()
        padded = self.segmenter.mean.expand(1, 3, rows, columns).clone()
        padded[..., :height, :width] = picture
        self.model.eval()
        with self.autocast():
            scores: Tensor = self.segmenter(padded)
        return scores[0, :, :height, :width].argmax(0).byte().cpu()

    def page(self, trunk: str, options: dict[str, Any]) -> None:
        """Write the page about the run, with pictures of the classes of test pictures."""
        drawn: list[Picture] = []
        for number in chosen(len(self.test)):
            image, labels = self.test[number]
            pictures = [draw_classes(image, one) for one in (labels, self.predict(image))]
            told = "annotated, and found; white has no label"
            drawn.append((f"Picture {number}", told, beside(pictures)))
        told = f"{trunk}; trained on {self.deliveries.samples} pictures, tested on {len(self.test)}"
        print(write_report(self.out, f"Segmentation: {self.test.name}", told, options, drawn))


def parser() -> CommandParser:
    """The options."""
    options = CommandParser(prog="fastmoco segment", description=__doc__ or "", allow_abbrev=False)
    shared_options(options)
    add = options.add_argument
    add("--train", default="train", help="split to learn from: train, or a list of VOC")
    add("--test", default="val", help="split to score")
    schedule_options(options, iterations=30000, lr=0.003, steps=(21000, 27000), warmup=0)
    add("--crop", type=int, default=513, help="side of a training crop in pixels")
    return options


def _segment(given: argparse.Namespace, world: World, request: StopRequest) -> bool:
    weights, column = trunk_of(given.checkpoint, given.seed)
    learned, told = learned_split(given.root, given.train, given.test, "pixels")
    if told and world.is_main:
        print(told, flush=True)
    train, test = (segmentation_set(given.root, split) for split in (learned, given.test))
    check_apart(train, test)
    given.out.mkdir(parents=True, exist_ok=True)
    training = Segmentation(weights, train, test, given, world)
    if world.is_main:
        print(f"{column}: {weights.describe()}", flush=True)
    scores = training.run(request, training.evaluate)
    if scores and world.is_main:
        training.page(f"{column}: {weights.describe()}", vars(given))
    return bool(scores)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 with one sentence for bad input; 75 or 130 after a signal."""
    return command(parser(), arguments, _segment)


if __name__ == "__main__":
    sys.exit(main())
