"""A detection data set of a few pictures in memory: bright boxes on dark noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmoco.transfer.datasets.detection import Detections, Parts, run_lengths

POINTS = ["left_corner", "right_corner"]
ALL = Parts(masks=True, keypoints=True)


def boxes(count: int, parts: Parts = ALL, *, side: int = 64, square: bool = False) -> Detections:
    """Picture i holds i % 3 objects of two classes and a crowd; `square`, or in sizes that differ.

    The classes are those of objects on the left and on the right.
    """
    categories = [
        {"id": number, "name": name, "keypoints": POINTS}
        for number, name in enumerate(("left", "right"), 1)
    ]
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
    pictures: list[Tensor] = []
    for number in range(count):
        draw = torch.Generator().manual_seed(number)
        height, width = side, side
        if not square:
            height, width = height - 8 * (number % 2), width + 8 * (number % 3)
        image = torch.randint(0, 100, (3, height, width), generator=draw, dtype=torch.uint8)
        content["images"].append({"id": number + 1, "width": width, "height": height})
        corners = 8 + torch.randint(0, side // 2 - 8, (number % 3 + 1, 2), generator=draw)
        for place, (left, top) in enumerate(corners.tolist()):
            edge = side // 3
            mask = torch.zeros(height, width, dtype=torch.uint8)
            mask[top : top + edge, left : left + edge] = 1
            image += 50 * mask
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": number + 1,
                    "category_id": 1 + (left > side / 5),
                    "bbox": [left, top, edge, edge],
                    "area": edge**2,
                    "iscrowd": int(place == number % 3),
                    "segmentation": run_lengths(mask.numpy()),
                    "keypoints": [left + 2, top + 2, 2, left + edge - 3, top + edge - 3, 2],
                    "num_keypoints": 2,
                }
            )
        pictures.append(image)
    return Detections("boxes", content, pictures.__getitem__, parts=parts)
