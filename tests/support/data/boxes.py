"""Pictures of many sizes, boxes of them, and what PIL makes of both. S side of a view."""

from __future__ import annotations

from importlib.metadata import version

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Boxes = tuple[list[Tensor], Tensor, Tensor]
# Older ones resize the width first whatever the box, and round between: one level of difference.
PIL_OF_TODAY = int(version("pillow").partition(".")[0]) >= 13


def noise(height: int, width: int, seed: int = 0, planes: bool = True) -> Tensor:
    """uint8 (3, H, W), in memory as planes or with the colours side by side."""
    rng = np.random.default_rng(seed)
    picture = torch.from_numpy(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    picture = picture.permute(2, 0, 1)
    return picture.contiguous() if planes else picture


def drawn_boxes(pictures: int, largest: int, seed: int = 0) -> Boxes:
    """Pictures up to `largest` pixels high and wide, two boxes of each, anywhere inside."""
    rng = np.random.default_rng(seed)
    made, boxes = [], []
    for number in range(pictures):
        size = rng.integers(1, largest + 1, 2)
        height, width = size.tolist()
        made.append(noise(height, width, seed=number, planes=number % 2 == 0))
        for _ in range(2):
            box = rng.integers(1, size + 1)
            boxes.append([*rng.integers(0, size - box + 1), *box])
    return made, torch.arange(pictures).repeat_interleave(2), torch.tensor(np.array(boxes))


def resized_by_pil(pictures: list[Tensor], which: Tensor, boxes: Tensor, side: int) -> Tensor:
    """uint8 (B, S, S, 3)."""
    views = [
        one_by_pil(pictures[number].permute(1, 2, 0).numpy(), box, side)
        for number, box in zip(which.tolist(), boxes.tolist(), strict=True)
    ]
    return torch.from_numpy(np.stack(views))


def one_by_pil(pixels: NDArray[np.uint8], box: list[int], side: int) -> NDArray[np.uint8]:
    """The crop of pixels (H, W, 3), resized."""
    top, left, height, width = box
    cut = Image.fromarray(np.ascontiguousarray(pixels)).crop(
        (left, top, left + width, top + height)
    )
    return np.asarray(cut.resize((side, side), Image.Resampling.BILINEAR))


def apart(got: Tensor, want: Tensor) -> int:
    """The largest difference, less the level by which an older PIL may differ."""
    return int((got.int() - want.int()).abs().max()) - (not PIL_OF_TODAY)
