"""kNN on two folders of labelled images: the monitor of a run, and the task of the command."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fastmoco.config import Config, ConfigError
from fastmoco.data.pixels.rule import PixelRule
from fastmoco.evaluate.features import (
    BATCH_SIZE,
    FrozenTrunk,
    extract_features,
    raw_pixel_features,
    without_bad,
)
from fastmoco.evaluate.knn import TEMPERATURE, knn_accuracies
from fastmoco.evaluate.labelled_images import LabelledImages
from fastmoco.machine.collectives import averaged, gather_rows
from fastmoco.machine.precision import choose_precision
from fastmoco.machine.ranks import World
from fastmoco.method.moco import MoCo
from fastmoco.network.encoder import pixel_statistics

# Raw pixels of more images than this would not fit into memory as a kNN bank.
RAW_PIXEL_LIMIT = 200_000


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
        rule: PixelRule,
        max_bank: int = 0,
        any_name: bool = False,
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
            rule=rule,
            any_name=any_name,
        )
        self.test = LabelledImages(
            test_root, resize=resize, image_size=image_size, rule=rule, any_name=any_name
        )
        if world.is_main:
            for sentence in dict.fromkeys(self.bank.warnings + self.test.warnings):
                tqdm.write(f"WARNING: kNN: {sentence}", file=sys.stderr)
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
        kept = [self.good_features(bank, self.bank), self.good_features(test, self.test)]
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

    def good_features(self, features: Tensor, images: LabelledImages) -> tuple[Tensor, Tensor]:
        """Features of the good images of this rank's share, labels of those of all ranks."""
        shared = without_bad(features, images, self._world)
        if not len(shared.kept):
            raise ConfigError(f"No image can be used: {images.bad_sentence('kNN images')}")
        if self._world.is_main and len(images.bad) > self._told.get(id(images), 0):
            tqdm.write(f"WARNING: {images.bad_sentence('kNN images')}", file=sys.stderr)
            self._told[id(images)] = len(images.bad)
        return shared.features, images.labels[shared.kept]


class KnnMonitor:
    """kNN top-1 of the trunk of encoder_q on labelled images, computed by all ranks together.

    Bad images are left out and named on standard error when they are found.
    """

    def __init__(self, config: Config, world: World) -> None:
        self._config, self._world = config, world
        self._statistics = pixel_statistics(config.data)
        knn = config.knn
        self._task = KnnTask(
            Path(knn.train_root),
            Path(knn.test_root),
            world,
            resize=knn.resize,
            image_size=config.augment.image_size,
            max_bank=knn.max_bank,
            rule=PixelRule.of(config.data),
            any_name=config.data.any_name,
        )

    @property
    def chance(self) -> float:
        """Accuracy of the most frequent test class."""
        return self._task.chance

    def due(self, done: int, per_epoch: int, stop: int) -> bool:
        """Whether to evaluate after `done` steps: regularly at an epoch's end, and at the end."""
        epoch, within = divmod(done, per_epoch)
        return done == stop or (not within and epoch % self._config.knn.every == 0)

    def trained(self, moco: MoCo) -> float:
        """kNN top-1 of encoder_q in [0, 1], with BN statistics averaged over ranks."""
        dtype = choose_precision(self._config.run.precision, self._world.device).dtype
        with averaged(moco.running_statistics(), self._world):
            trunk = FrozenTrunk(moco.encoder_q, dtype, self._world.device, self._statistics)
            (top1,) = self._task.of_trunk(
                trunk, ks=[self._config.knn.k], temperature=TEMPERATURE, batch_size=BATCH_SIZE
            )
        return top1

    def raw_pixels(self) -> float | None:
        """kNN top-1 of the pixels themselves; None where the bank is too large for memory."""
        found = self._task.of_pixels(ks=[self._config.knn.k], temperature=TEMPERATURE)
        return found[0] if found else None
