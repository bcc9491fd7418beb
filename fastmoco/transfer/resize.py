"""From pictures of any size to one batch, the same on any number of ranks.

H and W of a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.models.detection.transform import (
    GeneralizedRCNNTransform,
    resize_boxes,
    resize_keypoints,
)

from fastmoco.machine.collectives import all_gather
from fastmoco.machine.ranks import World
from fastmoco.transfer.datasets.detection import enclosing

SHORT_SIDE = "short_side"
"""Key of a target: the short side that its picture gets in training, an int."""
OF_OBJECTS = ("boxes", "labels", "masks", "keypoints")
"""Keys of a target that have a row for each object."""


def resized(height: int, width: int, short: int, longest: int) -> tuple[int, int]:
    """Height and width with the short side `short`, unless the long one would pass `longest`."""
    scale = min(short / min(height, width), longest / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


class AgreedResize(GeneralizedRCNNTransform):
    """torchvision's transform, without its own random numbers, and of equal padding on all ranks.

    Pictures shrink with an antialiasing filter, as Pillow's do in Detectron2. In training a
    picture's short side is the one that its target names, else the last of `min_size`; in
    evaluation it is always the last. Padding takes part in batch norm and in the choice of anchors:
    so in training it is that of the largest picture on any rank.
    """

    def __init__(self, like: GeneralizedRCNNTransform, world: World) -> None:
        super().__init__(
            like.min_size, like.max_size, like.image_mean, like.image_std, like.size_divisible
        )
        self.world = world

    def resize(
        self, image: Tensor, target: dict[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, Any] | None]:
        """(3, H, W) to (3, H', W'), and the target with it, without boxes that became empty.

        torchvision ends at such a box.
        """
        before = (image.shape[-2], image.shape[-1])
        short: int = tuple(self.min_size)[-1]  # type: ignore[arg-type]
        short = short if target is None else target.get(SHORT_SIDE, short)
        after = resized(*before, short, self.max_size)
        if after != before:
            image = functional.interpolate(
                image[None], after, mode="bilinear", align_corners=False, antialias=True
            )[0]
        if target is None:
            return image, None
        changed = {"boxes": resize_boxes(target["boxes"], list(before), list(after))}
        if "keypoints" in target:
            points = resize_keypoints(target["keypoints"], list(before), list(after))
            changed["keypoints"] = points
        if "masks" in target:
            masks = target["masks"][:, None].float()
            changed["masks"] = functional.interpolate(masks, after, mode="nearest")[:, 0].byte()
        moved = {**target, **changed}
        kept = enclosing(moved["boxes"])
        if not kept.all():
            rows = [name for name in OF_OBJECTS if name in moved]
            moved |= {name: moved[name][kept] for name in rows}
        return image, moved

    def batch_images(self, images: Sequence[Tensor], size_divisible: int = 32) -> Tensor:
        """(n, 3, H, W) in channels-last memory, padded with zeros at the bottom and on the right.

        Zero is the mean colour: pictures are normalized before.
        """
        sizes = torch.tensor([image.shape[-2:] for image in images], device=images[0].device)
        largest = sizes.amax(0)
        if self.training:
            largest = all_gather(largest[None], self.world).amax(0)
        height, width = (-(-side // size_divisible) * size_divisible for side in largest.tolist())
        batch = torch.zeros(
            len(images),
            3,
            height,
            width,
            dtype=images[0].dtype,
            device=images[0].device,
        ).contiguous(memory_format=torch.channels_last)
        for row, image in zip(batch, images, strict=True):
            row[:, : image.shape[1], : image.shape[2]] = image
        return batch
