"""A detection data set: pictures, and what is on them, in the words of COCO.

n objects, H and W of a picture, C classes, K keypoints.

Every layout is turned into COCO's dictionary first, so that there is one way from annotations to
targets, and `pycocotools` can score all of them.
"""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastmoco.config import ConfigError
from fastmoco.transfer.datasets.pictures import PictureFiles

Target = dict[str, Any]
THINNEST = 1e-5
"""Pixels: a box of no larger side encloses nothing, as in Detectron2's `filter_empty_instances`."""
SIGMA = 0.05
"""How far apart people annotate a keypoint, in square roots of area, unless a person's 17."""
PERSON_SIGMAS = (26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89)
"""In thousandths, from pycocotools."""


def pycocotools() -> Any:
    """The package with its modules `coco`, `cocoeval` and `mask`, an extra of this one.

    Raises `ConfigError` with the command that installs it.
    """
    try:
        import pycocotools.coco
        import pycocotools.cocoeval
        import pycocotools.mask
    except ImportError as error:
        raise ConfigError(
            "Detection data is read and scored by pycocotools: pip install 'fastmoco[transfer]'."
        ) from error
    return pycocotools


class Parts(NamedTuple):
    """What targets hold besides boxes and labels."""

    masks: bool = False
    keypoints: bool = False


class Detections(Dataset[tuple[Tensor, Target]]):
    """Item i is `(image, target)`: uint8 (3, H, W), and a dictionary with

    - `boxes`: float32 (n, 4), x1 y1 x2 y2 in pixels, clipped to the picture, none of them empty
    - `labels`: int64 (n,), 1 to C
    - `image_id`: int, the one of the annotation file
    - `area`: float32 (n,), as annotated
    - `iscrowd`: int64 (n,), 1 where a box stands for a group; not to be trained on
    - `difficult`: bool (n,), VOC's flag; trained on, not scored
    - `masks`: uint8 (n, H, W) of 0 and 1, and `keypoints`: float32 (n, K, 3) of x, y and visibility
      (0: not annotated, all zero), if the data set was made with these parts

    A picture without objects has n = 0. Objects whose clipped box is empty are in no target (COCO
    itself has a few); `coco` keeps them, because the reference scores them.

    Raises `ConfigError` for a picture that cannot be used; see `PictureFiles`.
    """

    def __init__(
        self,
        name: str,
        content: dict[str, Any],
        picture: Callable[[int], Tensor],
        *,
        parts: Parts = Parts(),  # noqa: B008  (a tuple: nobody can change it)
        style: Literal["coco", "voc"] = "coco",
    ) -> None:
        """content: COCO's dictionary, without what `check_content` refuses. picture: of item i.

        style: `voc` where VOC's own metrics are computed as well.
        """
        categories = sorted(content["categories"], key=lambda category: category["id"])
        self.name, self.parts, self.style = name, parts, style
        self.classes: list[str] = [category["name"] for category in categories]
        self.category_ids: list[int] = [category["id"] for category in categories]
        """The annotation file's id of the class with label i + 1."""
        self.coco = indexed(content)
        """What `pycocotools` knows of the set."""
        self.image_ids: list[int] = [image["id"] for image in content["images"]]
        self.keypoint_names: list[str] = next(
            (category["keypoints"] for category in categories if category.get("keypoints")), []
        )
        self.paths = picture.paths if isinstance(picture, PictureFiles) else []
        """The file of each picture; empty where they are drawn."""
        self._picture = picture
        self._label = {category: i + 1 for i, category in enumerate(self.category_ids)}
        self.empty = 0
        """Number of objects that are in no target, because their clipped box is empty."""
        # Reader processes share memory until they count a reference: each of them would end with
        # dictionaries of its own, gigabytes of COCO. They read these bytes instead.
        records = [self._record(image_id) for image_id in self.image_ids]
        self._ends = np.cumsum([0, *map(len, records)])
        self._records = b"".join(records)

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, number: int) -> tuple[Tensor, Target]:
        return self._picture(number), self.target(number)

    @property
    def keypoint_sigmas(self) -> list[float]:
        """The K tolerances of object keypoint similarity."""
        count = len(self.keypoint_names)
        if count == len(PERSON_SIGMAS):
            return [sigma / 1000 for sigma in PERSON_SIGMAS]
        return [SIGMA] * count

    def with_objects(self, *, difficult: bool = True) -> list[int]:
        """Numbers of the pictures that a detector can learn objects from, also difficult ones."""
        objects = (self._read(i)[2] for i in range(len(self)))
        return [
            i
            for i, some in enumerate(objects)
            if any(not one["iscrowd"] and (difficult or not one["difficult"]) for one in some)
        ]

    def target(self, number: int) -> Target:
        """The target of item `number`, without its picture."""
        width, height, objects = self._read(number)
        boxes = [one["bbox"] for one in objects]
        target: Target = {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": _integers(self._label[one["category_id"]] for one in objects),
            "image_id": self.image_ids[number],
            "area": torch.tensor([one["area"] for one in objects], dtype=torch.float32),
            "iscrowd": _integers(one["iscrowd"] for one in objects),
            "difficult": torch.tensor([one["difficult"] for one in objects], dtype=torch.bool),
        }
        if self.parts.masks:
            masks = np.zeros((len(objects), height, width), np.uint8)
            for mask, one in zip(masks, objects, strict=True):
                mask[:] = drawn_mask(one["segmentation"], width, height)
            target["masks"] = torch.from_numpy(masks)
        if self.parts.keypoints:
            points = [one["keypoints"] for one in objects]
            shape = (len(objects), len(self.keypoint_names), 3)
            target["keypoints"] = torch.tensor(points, dtype=torch.float32).reshape(shape)
        return target

    def _record(self, image_id: int) -> bytes:
        """Width and height of a picture, and its objects as targets need them."""
        image = self.coco.imgs[image_id]
        names = ["category_id", "area", "iscrowd", *("segmentation",) * self.parts.masks]
        names += ["keypoints"] * self.parts.keypoints
        objects = []
        for one in self.coco.imgToAnns.get(image_id, []):
            box = clipped(one["bbox"], image["width"], image["height"])
            if is_empty(box):
                self.empty += 1
            else:
                flags = {"difficult": bool(one.get("difficult")), "bbox": box}
                objects.append({name: one[name] for name in names} | flags)
        return pickle.dumps((image["width"], image["height"], objects))

    def _read(self, number: int) -> tuple[int, int, list[dict[str, Any]]]:
        start, end = self._ends[number : number + 2]
        record: tuple[int, int, list[dict[str, Any]]] = pickle.loads(self._records[start:end])
        return record


def clipped(box: Sequence[float], width: int, height: int) -> list[float]:
    """COCO's x y width height, as x1 y1 x2 y2 of float32 inside of the picture."""
    x, y, w, h = box
    corners = (x, width), (y, height), (x + w, width), (y + h, height)
    return [float(np.float32(min(max(value, 0), most))) for value, most in corners]


def is_empty(box: Sequence[float]) -> bool:
    """Whether x1 y1 x2 y2 enclose nothing."""
    return min(box[2] - box[0], box[3] - box[1]) <= THINNEST


def enclosing(boxes: Tensor) -> Tensor:
    """bool (n,): which of x1 y1 x2 y2, (n, 4), enclose something; `is_empty` is of the same rule.

    To be asked again when boxes have moved: rounding can close one that is far from the origin.
    """
    return ((boxes[:, 2:] - boxes[:, :2]) > THINNEST).all(1)


def indexed(content: dict[str, Any]) -> Any:
    """`pycocotools.coco.COCO` of a dictionary instead of a file, without its prints."""
    coco = pycocotools().coco.COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def drawn_mask(segmentation: Any, width: int, height: int) -> np.ndarray:
    """Polygons, or run lengths, as uint8 (H, W) of 0 and 1; `COCO.annToMask` does the same."""
    api = pycocotools().mask
    if isinstance(segmentation, list):
        segmentation = api.merge(api.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        segmentation = api.frPyObjects(segmentation, height, width)
    return np.asarray(api.decode(segmentation))


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """COCO's run-length encoding of a mask, (H, W) of 0 and 1, as JSON can hold it."""
    encoded = pycocotools().mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode()}


def _integers(values: Any) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64)
