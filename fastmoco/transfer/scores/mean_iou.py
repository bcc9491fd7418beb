"""Mean intersection over union, from counts of pixels: sums over pictures, and over ranks.

C classes, the background included; H and W of a picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmoco.config import ConfigError
from fastmoco.transfer.datasets.segmentation import IGNORE


class PixelCounts:
    """How many pixels of each class were taken for each class.

    `table` is int64 (C, C), rows the true class, columns the predicted one. Tables of ranks that
    saw different pictures add up.
    """

    def __init__(self, classes: int) -> None:
        self.table = torch.zeros(classes, classes, dtype=torch.int64)

    def add(self, predicted: Tensor, labels: Tensor) -> None:
        """Count pixels, but not those labelled 255. Both of any shape, integers, on any device.

        Raises `ValueError` for different shapes, and for classes that there are not.
        """
        if predicted.shape != labels.shape:
            raise ValueError(f"predicted {tuple(predicted.shape)}, labels {tuple(labels.shape)}")
        classes = len(self.table)
        scored = labels != IGNORE
        truth, guess = labels[scored].long(), predicted[scored].long()
        if truth.numel() and max(int(truth.max()), int(guess.max())) >= classes:
            raise ValueError(f"a class number above {classes - 1}")
        pairs = torch.bincount(truth * classes + guess, minlength=classes**2)
        self.table += pairs.reshape(classes, classes).to(self.table.device)

    def scores(self, names: Sequence[str]) -> dict[str, float]:
        """`mIoU`, `pixel_accuracy` and `IoU/CLASS` in percent; names: of the C classes.

        The pixels of a class that were found, over those that are of it or were taken for it; the
        mean over the classes that occur in the labels or predictions, the background included, as
        VOC's devkit has it. NaN for a class that does not occur.

        Raises `ConfigError` where no pixel has been counted.
        """
        table = self.table.double()
        if not table.sum():
            raise ConfigError("No pixel has a label other than 255, so there is nothing to score.")
        found = table.diagonal()
        each = 100 * found / (table.sum(0) + table.sum(1) - found)
        result = {
            "mIoU": float(each.nanmean()),
            "pixel_accuracy": float(100 * found.sum() / table.sum()),
        }
        return result | {
            f"IoU/{name}": float(value) for name, value in zip(names, each, strict=True)
        }
