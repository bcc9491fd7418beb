"""Detection from a trunk: `torchrun -m fastmoco.transfer.detect --checkpoint FILE --data.root DIR`.

Faster, Mask and Keypoint R-CNN (`--task`) on R50-C4 or R50-FPN (`--arch`), or on a smaller trunk.
All layers learn, batch norm is tuned and synchronized over ranks. The recipes of the paper are in
`configs/transfer/`, the defaults are those of VOC: 24,000 iterations of 16 pictures.

n objects of a picture, H W its size.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from fastmoco.config import ConfigError
from fastmoco.config.command import CommandParser
from fastmoco.machine import collectives
from fastmoco.machine.ranks import World
from fastmoco.machine.stopping import StopRequest
from fastmoco.method.agreement import on_every_rank
from fastmoco.transfer.command import command, shared_options, trunk_of
from fastmoco.transfer.datasets.choose import check_apart, detection_set, learned_split
from fastmoco.transfer.datasets.detection import Detections, enclosing
from fastmoco.transfer.detector import FPN_CHANNELS, Detector, build_detector
from fastmoco.transfer.report import (
    LEAST_SCORE,
    Picture,
    beside,
    chosen,
    confident,
    draw_objects,
    write_report,
)
from fastmoco.transfer.resize import OF_OBJECTS, SHORT_SIDE
from fastmoco.transfer.samples import Key, Prepared, uniforms
from fastmoco.transfer.schedule import schedule_options
from fastmoco.transfer.scores.average_precision import (
    check_scored,
    compact,
    evaluate_boxes,
    evaluate_keypoints,
    evaluate_masks,
)
from fastmoco.transfer.training import Training
from fastmoco.weights.checksums import checksums
from fastmoco.weights.read import Weights

Target = dict[str, Any]
VOC_SIDES = tuple(range(480, 801, 32))


class Sample(NamedTuple):
    """A picture to learn from: uint8 (3, H, W)."""

    image: Tensor
    target: Target
    key: Key


Score = Callable[[list[Target], Detections], dict[str, float]]
"""From what was found in each picture of a data set to its scores in percent."""


def score_boxes(found: list[Target], data: Detections) -> dict[str, float]:
    """AP of boxes."""
    return evaluate_boxes(found, data)


def score_masks(found: list[Target], data: Detections) -> dict[str, float]:
    """AP of boxes and `mask_AP` of masks."""
    return evaluate_boxes(found, data) | _prefixed("mask_", evaluate_masks(found, data))


def score_keypoints(found: list[Target], data: Detections) -> dict[str, float]:
    """AP of boxes and `keypoint_AP` of keypoints."""
    return evaluate_boxes(found, data) | _prefixed("keypoint_", evaluate_keypoints(found, data))


def _prefixed(prefix: str, scores: dict[str, float]) -> dict[str, float]:
    return {prefix + name: value for name, value in scores.items()}


SCORES: dict[str, Score] = {
    "boxes": score_boxes,
    "masks": score_masks,
    "keypoints": score_keypoints,
}


def learnable(target: Target, difficult: str) -> Target:
    """What a detector learns of a target: no crowd, no empty box, perhaps nothing difficult.

    A box around a crowd is no object. What lies in it may be sampled as background, as in
    Detectron2.
    """
    kept = enclosing(target["boxes"])
    if "iscrowd" in target:
        kept &= target["iscrowd"] == 0
    if difficult == "ignore" and "difficult" in target:
        kept &= ~target["difficult"]
    return {name: target[name][kept] for name in OF_OBJECTS if name in target}


def mirrored_names(names: Sequence[str]) -> list[int]:
    """For each keypoint the place of the one that it becomes in a mirror: left is right there."""
    places = {name: place for place, name in enumerate(names)}
    swapped = [
        name.replace("left", "\0").replace("right", "left").replace("\0", "right") for name in names
    ]
    return [places.get(name, place) for place, name in enumerate(swapped)]


def mirrored(image: Tensor, target: Target, names: Sequence[str]) -> tuple[Tensor, Target]:
    """A picture and its target, left and right exchanged; `names` of the keypoints."""
    width = image.shape[-1]
    left, top, right, bottom = target["boxes"].unbind(1)
    flipped = {**target, "boxes": torch.stack([width - right, top, width - left, bottom], 1)}
    if "masks" in target:
        flipped["masks"] = target["masks"].flip(-1)
    if "keypoints" in target:
        points = target["keypoints"][:, mirrored_names(names)].clone()
        seen = points[..., 2] > 0
        # Keypoints are numbers of pixels, boxes are lines between them.
        points[..., 0] = torch.where(seen, width - 1 - points[..., 0], points[..., 0])
        flipped["keypoints"] = points
    return image.flip(-1), flipped


def prepare(
    item: tuple[Tensor, Target], key: Key, *, sides: Sequence[int], difficult: str, names: list[str]
) -> Sample:
    """An item of a data set as a sample: what is learnable, flipped and scaled by its key."""
    image, target = item
    target = learnable(target, difficult)
    flip, scale = uniforms(key, 2)
    if flip < 0.5:
        image, target = mirrored(image, target, names)
    return Sample(image, {**target, SHORT_SIDE: sides[int(scale * len(sides))]}, key)


def on_device(
    samples: list[Sample], device: torch.device
) -> tuple[list[Tensor], list[Target], list[Key]]:
    """What `Detector` takes: float pictures in [0, 1], targets and keys."""
    images = [one.image.to(device, non_blocking=True).float() / 255 for one in samples]
    targets = [
        {name: x.to(device) if isinstance(x, Tensor) else x for name, x in one.target.items()}
        for one in samples
    ]
    return images, targets, [one.key for one in samples]


class Detection(Training):
    """A detector on its training pictures, tested on others."""

    def __init__(
        self,
        weights: Weights,
        train: Detections,
        test: Detections,
        given: argparse.Namespace,
        world: World,
        score: Score,
    ) -> None:
        """Raises `ConfigError` for data and options that do not belong together."""
        check(given)
        usable = usable_pictures(train, test, given)
        self.test, self.score = test, score
        self.detector = build_detector(
            weights,
            world,
            arch=given.arch,
            task=given.task,
            classes=len(train.classes),
            keypoints=max(1, len(train.keypoint_names)),
            fpn_channels=given.fpn_channels,
            min_size=given.test_side,
            max_size=given.max_side,
            proposals=given.proposals,
            test_proposals=given.test_proposals,
            seed=given.seed,
        )
        names, sides = list(train.keypoint_names), tuple(given.short_sides)
        data: Dataset[Any] = Subset(train, usable)
        view = partial(prepare, sides=sides, difficult=given.difficult, names=names)
        super().__init__(
            Detector(self.detector, world),
            self.detector,
            Prepared(data, view),
            len(usable),
            partial(on_device, device=world.device),
            given,
            world,
            [
                *(given.arch, given.task, sides, given.max_side, given.proposals, given.difficult),
                *(train.name, train.classes, checksums(weights.trunk)),
                # Folders from before 2026-11-27 do not name it.
                *([given.fpn_channels] if given.fpn_channels != FPN_CHANNELS else []),
            ],
            [test.name, len(test), given.test_side, given.test_proposals],
        )

    def evaluate(self) -> dict[str, float]:
        """Scores of the test pictures, each of them passed through by itself on one rank."""
        own = range(self.world.rank, len(self.test), self.world.size)
        found = on_every_rank(partial(self.predict, own), self.world)
        parts = collectives.gather_objects(found, self.world)
        scores = {}
        if self.world.is_main:
            everything = {number: one for part in parts for number, one in part.items()}
            told = self.score([everything[n] for n in range(len(self.test))], self.test)
            scores = {name: value for name, value in told.items() if math.isfinite(value)}
        return collectives.gather_objects(scores, self.world)[0]

    @torch.no_grad()
    def predict(self, numbers: Sequence[int]) -> dict[int, Target]:
        """What is found in these test pictures, on the host."""
        self.model.eval()
        quiet = None if self.world.is_main else True  # None: where standard error is a terminal
        found: dict[int, Target] = {}
        for number in tqdm(numbers, "test", leave=False, disable=quiet):
            image, _ = self.test[number]
            with self.autocast():
                (one,) = self.detector([image.to(self.world.device).float() / 255])
            found[number] = compact(one)
        return found

    def page(self, trunk: str, options: dict[str, Any]) -> None:
        """Write the page about the run, with pictures of what was found in the test pictures."""
        drawn: list[Picture] = []
        names = self.test.classes
        for number in chosen(len(self.test)):
            image, target = self.test[number]
            (found,) = self.predict([number]).values()
            pictures = [draw_objects(image, one, names) for one in (target, confident(found))]
            told = f"annotated, and found with a score of at least {LEAST_SCORE:g}"
            drawn.append((f"Picture {number}", told, beside(pictures)))
        told = f"{trunk}; trained on {self.deliveries.samples} pictures, tested on {len(self.test)}"
        print(write_report(self.out, f"Detection: {self.test.name}", told, options, drawn))


def parser() -> CommandParser:
    """The options."""
    options = CommandParser(prog="fastmoco detect", description=__doc__ or "", allow_abbrev=False)
    shared_options(options)
    add = options.add_argument
    add("--train", default="train", help="split to learn from: train, or a list of VOC")
    add("--test", default="val", help="split to score")
    add("--arch", choices=("c4", "fpn"), default="c4")
    add("--task", choices=("boxes", "masks", "keypoints"), default="boxes")
    add("--fpn_channels", type=int, default=FPN_CHANNELS, help="width of the pyramid")
    schedule_options(options, iterations=24000, lr=0.02, steps=(18000, 22000), warmup=100)
    add("--short_sides", type=int, nargs="+", default=VOC_SIDES, help="in training; one is drawn")
    add("--test_side", type=int, default=800, help="short side of test pictures")
    add("--max_side", type=int, default=1333, help="the long side is at most so long")
    add("--proposals", type=int, default=512, help="learned from in each training picture")
    add("--test_proposals", type=int, default=1000, help="classified in each test picture")
    add(
        "--difficult",
        choices=("learn", "ignore"),
        default="learn",
        help="VOC's difficult objects in training; Detectron2 learns them; no test counts them",
    )
    return options


def check(given: argparse.Namespace) -> None:
    """Raises `ConfigError` for sizes that no picture can have."""
    smallest = 32
    for name in ("test_side", "max_side", "short_sides"):
        values = getattr(given, name)
        for value in values if isinstance(values, Sequence) else [values]:
            if value < smallest:
                raise ConfigError(f"--{name} is {value}, but must be at least {smallest} pixels.")
    for name in ("proposals", "test_proposals", "fpn_channels"):
        if getattr(given, name) < 1:
            raise ConfigError(f"--{name} is {getattr(given, name)}, but must be at least 1.")


def usable_pictures(train: Detections, test: Detections, given: argparse.Namespace) -> list[int]:
    """Numbers of the pictures to train on. Raises `ConfigError` for data that cannot be scored."""
    keypoints = given.task == "keypoints"
    if train.classes != test.classes:
        raise ConfigError(f"{train.name} and {test.name} do not hold the same classes.")
    if keypoints and train.keypoint_names != test.keypoint_names:
        raise ConfigError(f"{train.name} and {test.name} do not hold the same keypoints.")
    usable = train.with_objects()
    if not (usable if given.difficult == "learn" else train.with_objects(difficult=False)):
        rest = " besides those that --difficult ignore leaves out" if usable else ""
        raise ConfigError(
            f"{train.name} has no object to learn from in {len(train)} pictures{rest}: name other "
            "pictures in --train."
        )
    check_scored(test, keypoints)
    return usable


def _detect(given: argparse.Namespace, world: World, request: StopRequest) -> bool:
    weights, column = trunk_of(given.checkpoint, given.seed)
    train, test, score = _data(given, world)
    given.out.mkdir(parents=True, exist_ok=True)
    training = Detection(weights, train, test, given, world, score)
    if world.is_main:
        print(f"{column}: {weights.describe()}", flush=True)
    scores = training.run(request, training.evaluate)
    if scores and world.is_main:
        training.page(f"{column}: {weights.describe()}", vars(given))
    return bool(scores)


def _data(given: argparse.Namespace, world: World) -> tuple[Detections, Detections, Score]:
    """Training and test pictures, and how the task is scored. Raises `ConfigError`."""
    parts = {"masks": given.task == "masks", "keypoints": given.task == "keypoints"}
    learned, told = learned_split(given.root, given.train, given.test, "objects")
    if told and world.is_main:
        print(told, flush=True)
    train = detection_set(given.root, learned, **parts)
    test = detection_set(given.root, given.test, **parts)
    if train.empty and world.is_main:
        print(f"boxes of {train.name} that enclose nothing, not learned from: {train.empty}")
    check_apart(train, test)
    return train, test, SCORES[given.task]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 with one sentence for bad input; 75 or 130 after a signal."""
    return command(parser(), arguments, _detect)


if __name__ == "__main__":
    sys.exit(main())
