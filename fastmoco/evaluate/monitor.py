"""The kNN monitor: what the frozen trunk is worth while it is being trained."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fastmoco.config import Config, ConfigError
from fastmoco.evaluate.features import extract_features, raw_pixel_features
from fastmoco.evaluate.knn import knn_accuracy
from fastmoco.evaluate.labelled_images import LabelledImages
from fastmoco.machine.collectives import all_reduce_mean_, gather_rows
from fastmoco.machine.precision import choose_precision
from fastmoco.machine.ranks import World
from fastmoco.method.moco import MoCo
from fastmoco.network.encoder import NormalizePixels

# Raw pixels of more images than this would not fit into memory as a kNN bank.
RAW_PIXEL_LIMIT = 200_000
# Of the weights of neighbours, as in the kNN protocol of arXiv 1805.01978.
TEMPERATURE = 0.07
# Images per forward of a frozen encoder.
BATCH = 256


class KnnMonitor:
    """kNN top-1 of the trunk of encoder_q on labelled images, computed by all ranks together."""

    def __init__(self, config: Config, world: World) -> None:
        self._config = config
        self._world = world
        knn, side = config.knn, config.augment.image_size
        if knn.resize < side:
            raise ConfigError(
                f"knn.resize {knn.resize} is smaller than augment.image_size {side}, so the centre "
                f"crop would reach beyond the image: set it to at least {side}."
            )
        self._bank = LabelledImages(
            Path(knn.train_root), resize=knn.resize, image_size=side, max_images=knn.max_bank
        )
        self._test = LabelledImages(Path(knn.test_root), resize=knn.resize, image_size=side)
        if self._bank.class_names != self._test.class_names:
            odd = sorted(set(self._bank.class_names) ^ set(self._test.class_names))[:3]
            raise ConfigError(
                f"{knn.train_root} and {knn.test_root} do not hold the same classes "
                f"(only one has {', '.join(odd)}): point both at the same class folders."
            )

    @property
    def chance(self) -> float:
        """Accuracy of the most frequent test class."""
        counts = torch.bincount(self._test.labels)
        return float(counts.max()) / len(self._test)

    def trained(self, moco: MoCo) -> float:
        """kNN top-1 of encoder_q in [0, 1], with BN statistics averaged over ranks."""
        all_reduce_mean_(moco.running_statistics(), self._world)
        encoder = moco.encoder_q
        dtype = choose_precision(self._config.run.precision, self._world.device).dtype
        normalize_pixels = NormalizePixels(self._world.device)

        def trunk(images: Tensor) -> Tensor:
            with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
                return encoder.trunk(normalize_pixels(images))

        encoder.eval()
        features = [
            self._gather(
                extract_features(
                    trunk,
                    images,
                    batch_size=BATCH,
                    device=self._world.device,
                    rank=self._world.rank,
                    world_size=self._world.size,
                )
            )
            for images in (self._bank, self._test)
        ]
        encoder.train()
        return self._accuracy(*features)

    def raw_pixels(self) -> float | None:
        """kNN top-1 of the pixels themselves; None where the bank is too large for memory."""
        if len(self._bank) > RAW_PIXEL_LIMIT:
            return None
        rank, size = self._world.rank, self._world.size
        bank, test = (
            self._gather(raw_pixel_features(images, rank=rank, world_size=size))
            for images in (self._bank, self._test)
        )
        return self._accuracy(bank, test)

    def _gather(self, features: Tensor) -> Tensor:
        return gather_rows(features, self._world)

    def _accuracy(self, bank: Tensor, test: Tensor) -> float:
        return knn_accuracy(
            bank,
            self._bank.labels,
            test,
            self._test.labels,
            k=self._config.knn.k,
            temperature=TEMPERATURE,
            num_classes=len(self._bank.class_names),
        )
