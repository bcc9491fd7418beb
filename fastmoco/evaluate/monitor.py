"""The kNN monitor: what the frozen trunk is worth while it is being trained."""

from __future__ import annotations

from pathlib import Path

from fastmoco.config import Config
from fastmoco.evaluate.features import BATCH_SIZE, FrozenTrunk
from fastmoco.evaluate.knn_task import TEMPERATURE, KnnTask
from fastmoco.machine.collectives import all_reduce_mean_
from fastmoco.machine.precision import choose_precision
from fastmoco.machine.ranks import World
from fastmoco.method.moco import MoCo


class KnnMonitor:
    """kNN top-1 of the trunk of encoder_q on labelled images, computed by all ranks together.

    Bad images are left out and named on standard error when they are found.
    """

    def __init__(self, config: Config, world: World) -> None:
        self._config, self._world = config, world
        knn = config.knn
        self._task = KnnTask(
            Path(knn.train_root),
            Path(knn.test_root),
            world,
            resize=knn.resize,
            image_size=config.augment.image_size,
            max_bank=knn.max_bank,
            max_pixels=config.data.max_pixels,
        )

    @property
    def chance(self) -> float:
        """Accuracy of the most frequent test class."""
        return self._task.chance

    def trained(self, moco: MoCo) -> float:
        """kNN top-1 of encoder_q in [0, 1], with BN statistics averaged over ranks."""
        all_reduce_mean_(moco.running_statistics(), self._world)
        dtype = choose_precision(self._config.run.precision, self._world.device).dtype
        trunk = FrozenTrunk(moco.encoder_q, dtype, self._world.device)
        (top1,) = self._task.of_trunk(
            trunk, ks=[self._config.knn.k], temperature=TEMPERATURE, batch_size=BATCH_SIZE
        )
        return top1

    def raw_pixels(self) -> float | None:
        """kNN top-1 of the pixels themselves; None where the bank is too large for memory."""
        found = self._task.of_pixels(ks=[self._config.knn.k], temperature=TEMPERATURE)
        return found[0] if found else None
