"""The rendered shapes as data sets: boxes, masks, keypoints and classes of pixels, all exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmoco.transfer.datasets.detection import Detections, Parts, run_lengths
from fastmoco.transfer.datasets.scenes import DIFFICULT, Layout, layout, picture
from fastmoco.transfer.datasets.segmentation import Segmentations
from fastmoco.transfer.datasets.shapes import KEYPOINTS, SHAPES

SIZES = {"train": 600, "val": 200}
CLASSES = list(SHAPES)


class ScenePictures:
    """Calls with a number give that scene as uint8 (3, H, W); each is drawn once."""

    def __init__(
        self, layouts: list[Layout], split: str, seed: int, photographs: list[Path]
    ) -> None:
        self._layouts = layouts
        self._of = split, seed
        self._photographs = photographs
        self._drawn: dict[int, Tensor] = {}

    def __call__(self, number: int) -> Tensor:
        if number not in self._drawn:
            split, seed = self._of
            pixels = picture(self._layouts[number], split, seed, number, self._photographs)
            self._drawn[number] = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        return self._drawn[number]


class SceneLabels:
    """Calls with a number give the class of each pixel, uint8 (H, W), 0 where no shape is."""

    def __init__(self, layouts: list[Layout]) -> None:
        self._layouts = layouts

    def __call__(self, number: int) -> Tensor:
        return torch.from_numpy(pixel_classes(self._layouts[number]))


def pixel_classes(what: Layout) -> np.ndarray:
    """uint8 (H, W): 0, or 1 + the place of a shape in `CLASSES`."""
    labels = np.zeros((what.height, what.width), np.uint8)
    for one in what.shapes:
        labels[one.mask] = 1 + CLASSES.index(one.name)
    return labels


def layouts_of(split: str, seed: int, count: int) -> list[Layout]:
    """The layouts of the first `count` scenes of a split."""
    return [layout(split, seed, index) for index in range(count)]


def coco_content(layouts: list[Layout]) -> dict[str, Any]:
    """COCO's dictionary of scenes that are named `000000.jpg` and so on."""
    content: dict[str, Any] = {
        "info": {"description": "shapes rendered by fastmoco"},
        "images": [],
        "annotations": [],
        "categories": [
            {"id": i, "name": name, "supercategory": "shape", "keypoints": list(KEYPOINTS)}
            for i, name in enumerate(CLASSES, start=1)
        ],
    }
    for number, what in enumerate(layouts):
        size = {"width": what.width, "height": what.height}
        content["images"].append({"id": number + 1, "file_name": f"{number:06d}.jpg", **size})
        for place, one in enumerate(what.shapes):
            x1, y1, x2, y2 = one.box
            points = what.keypoints(place)
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": number + 1,
                    "category_id": 1 + CLASSES.index(one.name),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": int(one.mask.sum()),
                    "iscrowd": 0,
                    "difficult": one.visible < DIFFICULT,
                    "segmentation": run_lengths(one.mask),
                    "keypoints": points.round(2).flatten().tolist(),
                    "num_keypoints": int((points[:, 2] > 0).sum()),
                }
            )
    return content


def rendered_shapes(
    split: str,
    parts: Parts = Parts(),  # noqa: B008
    *,
    seed: int = 0,
    count: int = 0,
    photographs: list[Path] | None = None,
) -> Detections:
    """`count` scenes of the split `train` or `val`, by default 600 and 200."""
    layouts = layouts_of(split, seed, count or SIZES[split])
    pictures = ScenePictures(layouts, split, seed, photographs or [])
    return Detections(f"shapes {split}", coco_content(layouts), pictures, parts=parts)


def rendered_pixels(split: str, *, seed: int = 0, count: int = 0) -> Segmentations:
    """The same scenes with the class of each pixel."""
    layouts = layouts_of(split, seed, count or SIZES[split])
    pictures, labels = ScenePictures(layouts, split, seed, []), SceneLabels(layouts)
    classes = ["background", *CLASSES]
    return Segmentations(f"shapes {split}", classes, pictures, labels, len(layouts))
