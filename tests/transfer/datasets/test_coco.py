"""COCO's layout: read as pycocotools and torchvision's reference read it, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco.config import ConfigError
from fastmoco.transfer import detect
from fastmoco.transfer.datasets.choose import detection_set
from fastmoco.transfer.datasets.coco_checks import run_sums
from fastmoco.transfer.datasets.detection import run_lengths

coco_api = pytest.importorskip("pycocotools.coco", reason="the extra transfer is not installed")
from pycocotools import mask as coco_mask  # noqa: E402

Content = dict[str, Any]
POINTS = ["head", "tail"]


def content() -> Content:
    """Three pictures: objects and a crowd; nothing; boxes that reach out or enclose nothing."""
    crowd = np.zeros((30, 40), np.uint8)
    crowd[5:20, 10:35] = 1
    return {
        "images": [
            {"id": 7, "file_name": "a.jpg", "width": 40, "height": 30},
            {"id": 3, "file_name": "b.jpg", "width": 32, "height": 32},
            {"id": 9, "file_name": "c.png", "width": 20, "height": 24},
        ],
        "categories": [
            {"id": 18, "name": "dog", "keypoints": POINTS},
            {"id": 2, "name": "bicycle"},
        ],
        "annotations": [
            {
                **{"id": 0, "image_id": 7, "category_id": 18, "iscrowd": 0, "area": 90.5},
                **{"bbox": [2.25, 3.5, 10, 12], "segmentation": [[2, 3, 12, 3, 12, 15, 2, 15]]},
                "keypoints": [4, 5, 2, 0, 0, 0],
            },
            {
                **{"id": 4, "image_id": 7, "category_id": 2, "iscrowd": 1, "area": 375},
                **{"bbox": [10, 5, 25, 15], "segmentation": run_lengths(crowd)},
            },
            {
                **{"id": 5, "image_id": 9, "category_id": 2, "iscrowd": 0, "area": 80},
                **{"bbox": [-2, 4, 30, 5], "segmentation": {"size": [24, 20], "counts": [400, 80]}},
            },
            {
                **{"id": 6, "image_id": 9, "category_id": 2, "iscrowd": 0, "area": 0},
                **{"bbox": [6, 7, 5, 0], "segmentation": [[6, 7, 11, 7, 11, 7]]},
            },
        ],
    }


def write(root: Path, what: Content) -> str:
    """The layout of COCO with a split val2017."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "val2017").mkdir(exist_ok=True)
    file = root / "annotations" / "instances_val2017.json"
    file.write_text(json.dumps(what))
    rng = np.random.default_rng(0)
    for image in content()["images"]:
        pixels = rng.integers(0, 255, (image["height"], image["width"], 3)).astype(np.uint8)
        Image.fromarray(pixels).save(root / "val2017" / image["file_name"])
    return str(root)


def test_targets_are_those_of_pycocotools(tmp_path: Path) -> None:
    root = write(tmp_path, content())
    data = detection_set(root, "val", masks=True, keypoints=True)
    oracle = coco_api.COCO(str(tmp_path / "annotations" / "instances_val2017.json"))
    assert data.classes == ["bicycle", "dog"]
    assert data.category_ids == sorted(oracle.cats) == [2, 18]
    assert len(data) == len(oracle.imgs) == 3

    image, target = data[0]
    path = tmp_path / "val2017" / "a.jpg"
    assert torch.equal(image, torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1))
    assert image.dtype == torch.uint8
    annotations = oracle.imgToAnns[7]
    boxes = [[x, y, x + w, y + h] for x, y, w, h in (one["bbox"] for one in annotations)]
    assert target["boxes"].dtype == torch.float32
    assert target["boxes"].tolist() == boxes
    assert target["labels"].tolist() == [2, 1]
    assert target["labels"].dtype == target["iscrowd"].dtype == torch.int64
    assert target["iscrowd"].tolist() == [0, 1]
    assert target["image_id"] == 7
    assert target["area"].tolist() == [90.5, 375.0]
    assert target["difficult"].tolist() == [False, False]
    masks = np.stack([oracle.annToMask(one) for one in annotations])
    assert np.array_equal(target["masks"].numpy(), masks)
    assert target["masks"].dtype == torch.uint8
    assert target["keypoints"].tolist() == [[[4, 5, 2], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]]]


def test_a_picture_without_objects_has_an_empty_target(tmp_path: Path) -> None:
    data = detection_set(write(tmp_path, content()), "val2017", masks=True, keypoints=True)
    image, target = data[1]
    assert image.shape == (3, 32, 32)
    assert target["boxes"].shape == (0, 4)
    assert target["masks"].shape == (0, 32, 32)
    assert target["keypoints"].shape == (0, 2, 3)
    assert target["labels"].shape == target["area"].shape == (0,)
    assert data.with_objects() == [0, 2]


def test_boxes_are_clipped_and_those_that_enclose_nothing_are_in_no_target(tmp_path: Path) -> None:
    data = detection_set(write(tmp_path, content()), "val")
    target = data.target(2)
    assert target["boxes"].tolist() == [[0, 4, 20, 9]]
    assert "masks" not in target
    assert "keypoints" not in target
    assert len(data.coco.imgToAnns[9]) == 2, "the reference scores both"
    assert data.empty == 1


def test_a_crowd_alone_is_nothing_to_learn_from(tmp_path: Path) -> None:
    what = content()
    what["annotations"] = what["annotations"][1:2]
    assert detection_set(write(tmp_path, what), "val").with_objects() == []


def test_targets_need_none_of_the_dictionaries_that_processes_would_copy(tmp_path: Path) -> None:
    data = detection_set(write(tmp_path, content()), "val", masks=True, keypoints=True)
    whole = [data.target(i) for i in range(3)]
    data.coco = None
    for target, again in zip(whole, map(data.target, range(3)), strict=True):
        assert target.keys() == again.keys()
        names = [name for name in target if name != "image_id"]
        assert all(torch.equal(target[name], again[name]) for name in names)


def test_defaults_are_those_of_the_box(tmp_path: Path) -> None:
    what = content()
    del what["annotations"][0]["area"], what["annotations"][0]["iscrowd"]
    target = detection_set(write(tmp_path, what), "val").target(0)
    assert target["area"].tolist() == [120.0, 375.0]
    assert target["iscrowd"].tolist() == [0, 1]


def change(path: str, value: Any) -> Callable[[Content], None]:
    """`annotations.0.bbox` of the content becomes the value; None removes it."""

    def apply(what: Any) -> None:
        *way, last = path.split(".")
        for step in way:
            what = what[int(step) if step.isdigit() else step]
        if value is None:
            del what[last]
        else:
            what[int(last) if last.isdigit() else last] = value

    return apply


BROKEN = {
    "negative width": ("annotations.0.bbox", [2, 3, -4, 5], "annotation 0 of image 7 (a.jpg)"),
    "NaN": ("annotations.0.bbox", [2, float("nan"), 4, 5], "four finite numbers"),
    "infinite": ("annotations.0.bbox", [2, 3, float("inf"), 5], "four finite numbers"),
    "huge": ("annotations.0.bbox", [2, 3, 10**400, 5], "four finite numbers"),
    "three numbers": ("annotations.0.bbox", [2, 3, 4], "four finite numbers"),
    "no box": ("annotations.0.bbox", None, "bbox None"),
    "outside": ("annotations.0.bbox", [41, 3, 4, 5], "outside of its picture of 40 x 30"),
    "above": ("annotations.0.bbox", [4, -9, 4, 5], "outside of its picture of 40 x 30"),
    "unknown category": ("annotations.0.category_id", 5, "category 5, and the file lists 2, 18"),
    "category a list": ("annotations.0.category_id", [5], "category [5]"),
    "unknown image": ("annotations.0.image_id", 8, "image 8 is about an image that"),
    "crowd two": ("annotations.0.iscrowd", 2, "iscrowd 2"),
    "area": ("annotations.0.area", -1, "area -1"),
    "double annotation": ("annotations.0.id", 4, "two of annotation 4"),
    "double image": ("images.0.id", 9, "two of image 9"),
    "double category": ("categories.0.id", 2, "two of category 2"),
    "double name": ("categories.0.name", "bicycle", "name 'bicycle'; give each its own"),
    "id a text": ("images.0.id", "x7", "'x7' of an image is no integer"),
    "keypoints a number": ("categories.0.keypoints", 17, "category 18 (dog) has the keypoints 17"),
    "keypoints a text": ("categories.0.keypoints", "head", "keypoints 'head'; write a list"),
    "keypoints numbers": ("categories.0.keypoints", [1, 2], "keypoints [1, 2]; write a list"),
    "no name": ("images.0.file_name", None, "image 7 has no file_name"),
    "no size": ("images.0.width", None, "image 7 (a.jpg) has the width None"),
    "no images": ("images", [], "lists no images"),
    "no lists": ("annotations", None, "lists of objects named images, annotations, categories"),
    "polygon of 4": ("annotations.0.segmentation", [[1, 2, 3, 4]], "three or more pairs"),
    "odd polygon": ("annotations.0.segmentation", [[1, 2, 3, 4, 5, 6, 7]], "three or more pairs"),
    "polygon far away": ("annotations.0.segmentation", [[1, 2, 3, 4, 5e9, 6]], "far outside"),
    "NaN polygon": (
        "annotations.0.segmentation",
        [[1, 2, float("nan"), 4, 5, 6]],
        "three or more pairs",
    ),
    "text polygon": ("annotations.0.segmentation", [[1, 2, "3", 4, 5, 6]], "three or more pairs"),
    "no polygon": ("annotations.0.segmentation", [], "give polygons or run lengths"),
    "run size": ("annotations.2.segmentation.size", [20, 24], "size [20, 24]"),
    "run sum": ("annotations.2.segmentation.counts", [400, 81], "481 pixels, and its picture 480"),
    "run text": ("annotations.1.segmentation.counts", "0", "0 pixels, and its picture 1200"),
    "run garbage": ("annotations.1.segmentation.counts", "\u00ff", "-1 pixels"),
    "keypoints": ("annotations.0.keypoints", [1, 2, 2], "needs 2 keypoints"),
    "visibility": ("annotations.0.keypoints", [1, 2, 2, 3, 4, 3], "not 0, 1 or 2"),
    "missing picture": ("images.1.file_name", "z.jpg", "z.jpg: unpack them"),
    "missing first picture": ("images.0.file_name", "z.jpg", "in none of"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_annotations_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    path, value, part = BROKEN[kind]
    what = content()
    change(path, value)(what)
    root = write(tmp_path, what)
    with pytest.raises(ConfigError) as refusal:
        detection_set(root, "val", masks=True, keypoints=True)
    assert part in str(refusal.value)
    assert "instances_val2017.json" in str(refusal.value)


def test_segmentations_are_looked_at_for_masks_only(tmp_path: Path) -> None:
    what = content()
    what["annotations"][0] |= {"segmentation": [], "keypoints": [1]}
    assert len(detection_set(write(tmp_path, what), "val").target(0)["boxes"]) == 2


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    root = write(tmp_path, content())
    file = tmp_path / "annotations" / "instances_val2017.json"
    file.write_text(file.read_text()[:-40])
    with pytest.raises(ConfigError, match=r"instances_val2017\.json is not valid JSON .*cut off"):
        detection_set(root, "val")
    file.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match="is not valid JSON"):
        detection_set(root, "val")
    file.write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="is not valid JSON"):
        detection_set(root, "val")


def test_pictures_are_refused_by_name(tmp_path: Path) -> None:
    root = write(tmp_path, content())
    data = detection_set(root, "val")
    folder = tmp_path / "val2017"
    (folder / "a.jpg").write_bytes((folder / "a.jpg").read_bytes()[:300])
    with pytest.raises(ConfigError, match=r"a\.jpg cannot be decoded .*repair it"):
        data[0]
    (folder / "a.jpg").unlink()
    with pytest.raises(ConfigError, match=r"a\.jpg cannot be read: No such file"):
        data[0]
    Image.new("RGB", (40, 31)).save(folder / "a.jpg")
    with pytest.raises(ConfigError, match=r"40 x 31 pixels, its annotations are about 40 x 30"):
        data[0]
    Image.new("RGB", (30, 40)).save(folder / "a.jpg")
    with pytest.raises(ConfigError, match="if EXIF turns it, store it turned"):
        data[0]


def test_pixels_are_those_stored_whatever_exif_says(tmp_path: Path) -> None:
    """As torchvision reads them, and pycocotools' boxes and masks are about these."""
    root = write(tmp_path, content())
    path = tmp_path / "val2017" / "a.jpg"
    exif = Image.Exif()
    exif[274] = 3
    with Image.open(path) as image:
        image.load()
        image.save(path, exif=exif, quality=95)
    stored = np.array(Image.open(path).convert("RGB"))
    assert np.array_equal(detection_set(root, "val")[0][0].permute(1, 2, 0).numpy(), stored)


def test_splits_that_are_not_there_or_several_are_named(tmp_path: Path) -> None:
    root = write(tmp_path, content())
    with pytest.raises(ConfigError, match=r"splits val2017: none is train"):
        detection_set(root, "train")
    annotations = tmp_path / "annotations"
    (annotations / "instances_val2014.json").write_bytes(b"{}")
    with pytest.raises(ConfigError, match=r"val2014, val2017: more than one is val"):
        detection_set(root, "val")
    assert len(detection_set(root, "val2017")) == 3
    what = content()
    what["annotations"] = []
    (annotations / "person_keypoints_val2017.json").write_text(json.dumps(what))
    assert len(detection_set(root, "val2017").coco.anns) == 4
    assert len(detection_set(root, "val2017", keypoints=True).coco.anns) == 0


def test_pictures_that_are_scored_are_not_learned_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Numbers and names may be those of other pictures: every set may count from 1."""
    write(tmp_path, content())
    annotations = tmp_path / "annotations"
    whole = (annotations / "instances_val2017.json").read_text()
    for name in ("train2017", "train2014"):
        (annotations / f"instances_{name}.json").write_text(whole)
        (tmp_path / name).mkdir()
        for image in content()["images"]:
            picture, size = image["file_name"], (image["width"], image["height"])
            if (name, picture) == ("train2014", "b.jpg"):  # a copy of that of val2017
                data = (tmp_path / "val2017" / picture).read_bytes()
                (tmp_path / name / picture).write_bytes(data)
            else:
                Image.new("RGB", size, (9, 9, 9)).save(tmp_path / name / picture)
    given = ["--checkpoint", "random:resnet18", "--data.root", str(tmp_path), "--device", "cpu"]
    given += ["--out", str(tmp_path / "out"), "--batch_size", "0"]
    for train, part in (
        ("train2017", "--batch_size is 0"),
        ("train2014", "train2014, to be learned from, holds 1 of the 3 pictures of COCO val2017"),
        ("val2017", "val2017, to be learned from, holds 3 of the 3 pictures of COCO val2017"),
    ):
        assert detect.main([*given, "--train", train, "--test", "val2017"]) == 2
        printed = capsys.readouterr()
        (line,) = printed.err.splitlines()
        assert part in line
        assert f"boxes of COCO {train} that enclose nothing, not learned from: 1" in printed.out
    given[3] = "rendered"
    assert detect.main([*given, "--train", "val"]) == 2
    assert "--train and --test are both val" in capsys.readouterr().err


def test_what_cannot_be_scored_is_found_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(test: Content, task: str) -> str:
        write(tmp_path, test)
        given = ["--checkpoint", "random:resnet18", "--data.root", str(tmp_path), "--out"]
        given += [str(tmp_path / "out"), "--device", "cpu", "--batch_size", "0", "--arch", "fpn"]
        assert detect.main([*given, "--task", task]) == 2
        return capsys.readouterr().err

    what = content()
    (tmp_path / "train").mkdir()
    for image in what["images"]:
        size = image["width"], image["height"]
        Image.new("RGB", size).save(tmp_path / "train" / image["file_name"])
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_train.json").write_text(json.dumps(what))
    assert "--batch_size is 0" in told(what, "keypoints")
    what["annotations"][0]["keypoints"] = [0] * 6
    assert "COCO val2017 has no object with annotated keypoints" in told(what, "keypoints")
    assert "--batch_size is 0" in told(what, "boxes")
    what["categories"][0]["keypoints"] = ["tail", "head"]
    assert "do not hold the same keypoints" in told(what, "keypoints")
    what["annotations"] = [one for one in what["annotations"] if one.get("iscrowd")]
    assert "COCO val2017 has no object to find, none annotated" in told(what, "boxes")


@pytest.mark.parametrize("kind", ["nothing", "no folder"])
def test_a_root_of_no_layout_is_told_what_was_looked_for(kind: str, tmp_path: Path) -> None:
    root = tmp_path if kind == "nothing" else tmp_path / "gone"
    part = "VOCdevkit" if kind == "nothing" else "is not a folder"
    with pytest.raises(ConfigError, match=part):
        detection_set(str(root), "train")


def test_compressed_runs_are_counted_as_pycocotools_does() -> None:
    rng = np.random.default_rng(1)
    for height, width, share in ((1, 1, 0.5), (7, 300, 0.01), (200, 90, 0.5), (640, 480, 0.0001)):
        mask = (rng.random((height, width)) < share).astype(np.uint8)
        counts = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
        assert run_sums(counts) == height * width
        assert run_sums(counts[:-1]) != height * width
