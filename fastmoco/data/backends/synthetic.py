"""Noise instead of images: `data.source` synthetic.

n local batch, S side of a view.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmoco.config import Config
from fastmoco.data.batch import Batch
from fastmoco.data.plan import Plan

_SYNTHETIC_BATCHES = 4


class SyntheticEngine:
    """A few batches of noise that never leave the device: the speed of training without a loader.

    Row i of the global micro-batch is a function of (seed, i), so ranks agree as on real data.
    """

    backend = "synthetic"
    description = "synthetic: no reader"

    def __init__(self, config: Config, plan: Plan, device: torch.device) -> None:
        shape = (config.augment.image_size, config.augment.image_size, config.data.channels)
        first = plan.rank * plan.local_batch
        self.pool = [
            Batch(
                im_q=_noise(plan, shape, first, 2 * number).to(device),
                im_k=_noise(plan, shape, first, 2 * number + 1).to(device),
            )
            for number in range(_SYNTHETIC_BATCHES)
        ]
        self.micro_step = 0

    def start(self, micro_step: int) -> None:
        self.micro_step = micro_step

    def next(self) -> Batch:
        self.micro_step += 1
        return self.pool[(self.micro_step - 1) % _SYNTHETIC_BATCHES]

    def close(self) -> None:
        pass


def _noise(plan: Plan, shape: tuple[int, int, int], first: int, number: int) -> Tensor:
    """uint8 (n, *shape)."""
    rows = range(first, first + plan.local_batch)
    images: list[NDArray[np.uint8]] = [
        np.random.Generator(np.random.Philox(key=[plan.seed, row << 8 | number])).integers(
            0, 256, shape, dtype=np.uint8
        )
        for row in rows
    ]
    return torch.from_numpy(np.stack(images))
