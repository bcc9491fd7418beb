"""Which layout a root has: that of COCO, that of PASCAL VOC, or the rendered shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fastmoco.config import ConfigError
from fastmoco.config.paths import spelled_out
from fastmoco.transfer.datasets.coco import annotation_files, read_coco
from fastmoco.transfer.datasets.detection import Detections, Parts
from fastmoco.transfer.datasets.pictures import shared
from fastmoco.transfer.datasets.rendered import SIZES, rendered_pixels, rendered_shapes
from fastmoco.transfer.datasets.segmentation import Segmentations
from fastmoco.transfer.datasets.voc import (
    MAIN,
    SEGMENTATION,
    learned_lists,
    read_voc,
    read_voc_segmentation,
    years,
)

RENDERED = "rendered"
"""The root of the shapes that are drawn while they are needed."""


def detection_set(
    root: str, split: str, *, masks: bool = False, keypoints: bool = False
) -> Detections:
    """The split `train` or `val` of a folder in the layout of COCO or VOC, or of `rendered`.

    `val` is the one to score: COCO's val, VOC's test2007. A file of COCO may also be named, as
    `train2017`, and lists of VOC, as `2007_trainval+2012_trainval`.

    Raises `ConfigError` for a folder of neither layout, a split that it does not have, annotations
    that are broken, and parts that the layout does not hold.
    """
    if root == RENDERED:
        return rendered_shapes(known(split), Parts(masks, keypoints))
    folder = Path(spelled_out(root))
    if annotation_files(folder, Parts(masks, keypoints)):
        return read_coco(folder, split, Parts(masks, keypoints))
    if years(folder):
        if masks or keypoints:
            what = "masks" if masks else "keypoints"
            raise ConfigError(
                f"{folder} has the layout of VOC, in which detection data has no {what}: give one "
                "in the layout of COCO, or detect boxes."
            )
        return read_voc(folder, split)
    raise ConfigError(_neither(folder, keypoints))


def segmentation_set(root: str, split: str) -> Segmentations:
    """The split `train` or `val` of a folder in the layout of VOC, or of `rendered`.

    A list of VOC may also be named, as `2012_trainval`. Raises `ConfigError` as `detection_set`
    does.
    """
    if root == RENDERED:
        return rendered_pixels(known(split))
    folder = Path(spelled_out(root))
    if years(folder):
        return read_voc_segmentation(folder, split)
    raise ConfigError(
        f"{folder} holds no VOC2007, VOC2012 or VOCdevkit with ImageSets: semantic segmentation is "
        "read in that layout. `rendered` needs no folder."
    )


def learned_split(
    root: str, train: str, test: str, what: Literal["objects", "pixels"]
) -> tuple[str, str]:
    """The split to learn from where `test` is scored, and a sentence if it is not as usual.

    Only `train` of a folder in the layout of VOC can become another: there trainval holds val.
    Raises `ConfigError` for lists that cannot be read, and for one rendered split as both.
    """
    if root == RENDERED:
        if train == test:
            raise ConfigError(f"--train and --test are both {train}: score another split.")
        return train, ""
    folder = Path(spelled_out(root))
    coco = what == "objects" and annotation_files(folder, Parts())
    if train != "train" or coco or not years(folder):
        return train, ""
    return learned_lists(folder, MAIN if what == "objects" else SEGMENTATION, test)


def check_apart(train: Detections | Segmentations, test: Detections | Segmentations) -> None:
    """Raises `ConfigError` where a picture would be learned from and scored."""
    if both := shared(train.paths, test.paths):
        raise ConfigError(
            f"{train.name}, to be learned from, holds {len(both)} of the {len(test)} pictures of "
            f"{test.name}, to be scored, the first is {both[0]}: name lists in --train and --test "
            "that share no picture, as train and val of one year do."
        )


def known(split: str) -> str:
    """The split, if the rendered set has it. Raises `ConfigError` if not."""
    if split not in SIZES:
        raise ConfigError(f"{RENDERED} has the splits {', '.join(SIZES)}, not {split}.")
    return split


def _neither(folder: Path, keypoints: bool) -> str:
    if not folder.is_dir():
        return f"{folder} is not a folder, so there is no detection data in it."
    file = "person_keypoints_*.json" if keypoints else "instances_*.json"
    return (
        f"{folder} holds neither annotations/{file} as COCO does, nor VOC2007, VOC2012 or "
        "VOCdevkit with ImageSets as VOC does: give the folder above one of them. `rendered` needs "
        "no folder."
    )
