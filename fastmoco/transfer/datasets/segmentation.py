"""A data set of semantic segmentation: pictures, and the class of each of their pixels."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.utils.data import Dataset

from fastmoco.config import ConfigError
from fastmoco.transfer.datasets.pictures import PictureFiles

IGNORE = 255
"""The label of a pixel that is neither trained on nor scored."""


class Segmentations(Dataset[tuple[Tensor, Tensor]]):
    """Item i is `(image, labels)`: uint8 (3, H, W) and uint8 (H, W).

    Labels are positions in `classes`, of which the first is the background, or `IGNORE`. Raises
    `ConfigError` for a picture that cannot be used, or is not of the size of its labels.
    """

    def __init__(
        self,
        name: str,
        classes: list[str],
        picture: Callable[[int], Tensor],
        labels: Callable[[int], Tensor],
        count: int,
    ) -> None:
        self.name, self.classes = name, classes
        self.paths = picture.paths if isinstance(picture, PictureFiles) else []
        """The file of each picture; empty where they are drawn."""
        self._picture, self._labels, self._count = picture, labels, count

    def __len__(self) -> int:
        return self._count

    @property
    def labelled(self) -> bool:
        """Whether any pixel has a class; labels are read up to the first one."""
        return any(bool((self._labels(i) != IGNORE).any()) for i in range(len(self)))

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        image, labels = self._picture(number), self._labels(number)
        if image.shape[1:] != labels.shape:
            raise ConfigError(
                f"{self.name}: picture {number} is {tuple(image.shape[1:])}, its labels are "
                f"{tuple(labels.shape)}."
            )
        return image, labels
