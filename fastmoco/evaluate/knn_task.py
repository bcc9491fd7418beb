"""kNN on two folders of labelled images: what the monitor and the command have in common.

`run` is the command `python -m fastmoco.evaluate.knn`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fastmoco.config import ConfigError
from fastmoco.evaluate.features import (
    FrozenTrunk,
    extract_features,
    raw_pixel_features,
    without_bad,
)
from fastmoco.evaluate.knn import knn_accuracies
from fastmoco.evaluate.labelled_images import LabelledImages
from fastmoco.evaluate.options import (
    Evaluation,
    command,
    evaluation_parser,
    labelled_options,
    untrained,
)
from fastmoco.machine.collectives import gather_rows
from fastmoco.machine.ranks import World

# Raw pixels of more images than this would not fit into memory as a kNN bank.
RAW_PIXEL_LIMIT = 200_000
# Of the weights of neighbours, as in the kNN protocol of arXiv 1805.01978.
TEMPERATURE = 0.07


class KnnTask:
    """A bank and test images of the same classes, evaluated by all ranks together.

    Bad images are left out on all ranks alike, and named on standard error when they are found.

    Raises `ConfigError` for folders that hold no classes, or not the same ones.
    """

    def __init__(
        self,
        train_root: Path,
        test_root: Path,
        world: World,
        *,
        resize: int,
        image_size: int,
        max_pixels: int,
        max_bank: int = 0,
    ) -> None:
        if resize < image_size:
            raise ConfigError(
                f"knn.resize {resize} is smaller than augment.image_size {image_size}, so the "
                f"centre crop would reach beyond the image: set it to at least {image_size}."
            )
        self.bank = LabelledImages(
            train_root,
            resize=resize,
            image_size=image_size,
            max_images=max_bank,
            max_pixels=max_pixels,
        )
        self.test = LabelledImages(
            test_root, resize=resize, image_size=image_size, max_pixels=max_pixels
        )
        self._world = world
        self._told: dict[int, int] = {}  # bad images of each set that the user has heard of
        if self.bank.class_names != self.test.class_names:
            odd = sorted(set(self.bank.class_names) ^ set(self.test.class_names))[:3]
            raise ConfigError(
                f"{train_root} and {test_root} do not hold the same classes "
                f"(only one has {', '.join(odd)}): point both at the same class folders."
            )

    @property
    def chance(self) -> float:
        """Accuracy of the most frequent class among the test images that are not known as bad."""
        counts = torch.bincount(self.test.labels[self.test.good(range(len(self.test)))])
        return float(counts.max()) / float(counts.sum())

    def of_trunk(
        self, trunk: FrozenTrunk, *, ks: Sequence[int], temperature: float, batch_size: int
    ) -> list[float]:
        """kNN top-1 in [0, 1] for each k."""
        world = self._world
        bank, test = (
            extract_features(
                trunk,
                images,
                batch_size=batch_size,
                device=world.device,
                rank=world.rank,
                world_size=world.size,
            )
            for images in (self.bank, self.test)
        )
        return self._accuracies(bank, test, ks, temperature)

    def of_pixels(self, *, ks: Sequence[int], temperature: float) -> list[float]:
        """The same of the pixels themselves; empty where the bank is too large for memory."""
        if len(self.bank) > RAW_PIXEL_LIMIT:
            return []
        world = self._world
        bank, test = (
            raw_pixel_features(images, rank=world.rank, world_size=world.size).to(world.device)
            for images in (self.bank, self.test)
        )
        return self._accuracies(bank, test, ks, temperature)

    def _accuracies(
        self, bank: Tensor, test: Tensor, ks: Sequence[int], temperature: float
    ) -> list[float]:
        kept = [self._without_bad(bank, self.bank), self._without_bad(test, self.test)]
        (bank, bank_labels), (test, labels) = kept
        return knn_accuracies(
            bank,
            bank_labels,
            gather_rows(test, self._world),
            labels,
            ks=ks,
            temperature=temperature,
            num_classes=len(self.bank.class_names),
            world=self._world,
        )

    def _without_bad(self, features: Tensor, images: LabelledImages) -> tuple[Tensor, Tensor]:
        """Features of the good images of this rank's share, labels of those of all ranks."""
        shared = without_bad(features, images, self._world)
        if not len(shared.kept):
            raise ConfigError(f"No image can be used: {images.bad_sentence('kNN images')}")
        if self._world.is_main and len(images.bad) > self._told.get(id(images), 0):
            tqdm.write(f"WARNING: {images.bad_sentence('kNN images')}", file=sys.stderr)
            self._told[id(images)] = len(images.bad)
        return shared.features, images.labels[shared.kept]


def table(rows: Sequence[tuple[str, Sequence[float]]], ks: Sequence[int]) -> str:
    """Top-1 in per cent: a line per encoder, a column per k."""
    lines = ["kNN top-1".ljust(20) + "".join(f"k = {k}".rjust(10) for k in ks)]
    for name, found in rows:
        figures = "".join(f"{100 * x:8.2f} %" for x in found)
        lines.append(name.ljust(20) + (figures or "  bank too large"))
    return "\n".join(lines)


def run(arguments: Sequence[str] | None) -> int:
    """The command; exit code."""
    options = evaluation_parser("fastmoco knn", "kNN top-1 of a frozen encoder on class folders.")
    labelled_options(options)
    options.add_argument("--k", type=int, nargs="+", default=[200], help="neighbours that vote")
    options.add_argument("--temperature", type=float, default=TEMPERATURE)
    options.add_argument("--max_bank", type=int, default=0, help="at most so many; 0 takes all")
    return command(options, arguments, _evaluate)


def _evaluate(given: argparse.Namespace, world: World) -> None:
    if min(given.k) < 1 or not given.temperature > 0 or given.max_bank < 0:
        raise ConfigError("--k must be at least 1, --temperature above 0, --max_bank 0 or more.")
    evaluation = Evaluation.of(given, world)
    train_root, test_root = evaluation.labelled_roots(given)
    task = KnnTask(
        train_root,
        test_root,
        world,
        resize=evaluation.resize,
        image_size=evaluation.image_size,
        max_pixels=given.max_pixels,
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
