"""The rendered shapes: exact masks, boxes and keypoints, drawn and written."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco.config import ConfigError
from fastmoco.transfer.datasets.choose import detection_set, segmentation_set
from fastmoco.transfer.datasets.detection import Parts
from fastmoco.transfer.datasets.rendered import (
    SIZES,
    coco_content,
    pixel_classes,
    rendered_shapes,
)
from fastmoco.transfer.datasets.scenes import (
    LEAST_VISIBLE,
    Drawn,
    Layout,
    layout,
    picture,
    whole_mask,
)
from fastmoco.transfer.datasets.shapes import KEYPOINTS, SHAPES, Pose
from fastmoco.transfer.datasets.write_shapes import main, voc_palette, write_shapes
from tests.support.runs.sessions import all_ended, begun, members

pytest.importorskip("pycocotools", reason="the extra transfer is not installed")

# By hand: a circle, a ring with a hole of half its radius, a square of side 1.7, a pentagram of ten
# triangles between the centre, a tip (radius 1) and a notch (0.45), a triangle of base 1.9.
AREAS = {
    "circle": math.pi,
    "ring": 0.75 * math.pi,
    "square": 2.89,
    "star": 10 * 0.5 * 0.45 * math.sin(math.pi / 5),
    "triangle": 0.5 * 1.9 * 1.8,
}


@pytest.mark.parametrize("name", SHAPES)
def test_masks_have_the_area_of_the_shape(name: str) -> None:
    """Pixels are counted by their centres: the error falls with the size, whatever the angle."""
    for radius, angle, stretch in ((20, 0.0, 1.0), (20.3, 0.3, 1.2), (40, -0.2, 0.8)):
        pose = Pose(50.2, 49.7, radius, angle, stretch)
        mask = whole_mask(name, pose, 100, 101)
        expected = AREAS[name] * radius**2
        assert pose.area(SHAPES[name]) == pytest.approx(expected)
        assert mask.sum() == pytest.approx(expected, abs=0.6 * radius)
        rows, columns = np.nonzero(mask)
        if name in ("circle", "ring"):  # edges along pixels shift by up to half of one
            assert columns.mean() + 0.5 == pytest.approx(pose.x, abs=0.1)
            assert rows.mean() + 0.5 == pytest.approx(pose.y, abs=0.1)


def test_a_tilted_square_lies_clockwise_and_wider_than_high() -> None:
    """Its corners by hand, from the turn of 0.3 and sides of 17 * sqrt(1.5) and 17 / sqrt(1.5)."""
    pose = Pose(40, 30, 10, 0.3, 1.5)
    mask = whole_mask("square", pose, 80, 60)
    wide, high = 8.5 * math.sqrt(1.5), 8.5 / math.sqrt(1.5)
    corner_x = 40 + math.cos(0.3) * wide - math.sin(0.3) * -high
    corner_y = 30 + math.sin(0.3) * wide + math.cos(0.3) * -high
    columns = np.flatnonzero(mask.any(0))
    assert columns[-1] + 1 == pytest.approx(corner_x, abs=1)
    assert np.flatnonzero(mask[:, columns[-1]]).mean() + 0.5 == pytest.approx(corner_y, abs=1.2)


@pytest.mark.parametrize("name", SHAPES)
def test_keypoints_lie_where_their_names_say(name: str) -> None:
    pose = Pose(50, 50, 30, 0.25, 1.1)
    mask = whole_mask(name, pose, 100, 100)
    scene = Layout(100, 100, [Drawn(name, pose, mask, 1.0)])
    points = dict(zip(KEYPOINTS, scene.keypoints(0), strict=True))
    assert all(point[2] == 2 for point in points.values())
    assert points["top"][1] < points["centre"][1] < points["bottom"][1]
    assert points["left"][0] < points["centre"][0] < points["right"][0]
    for which, (u, v) in zip(KEYPOINTS[1:], SHAPES[name].keypoints[1:], strict=True):
        # On the outline: a step towards the centre is inside, a step away from it outside.
        inside = SHAPES[name].inside(*(np.array([0.97, 1.03]) * one for one in (u, v)))
        assert inside.tolist() == [True, False]
        # And there in the picture too. In a tip of 45 degrees a disc that must hold the centre of
        # a pixel, of radius 0.71, lies 1.85 pixels away.
        x, y, _ = points[which]
        for part in (mask, ~mask):
            assert np.hypot(*(np.argwhere(part).T - [[y], [x]])).min() < 2.6


def test_covered_parts_belong_to_the_shape_above() -> None:
    low = Pose(40, 40, 20, 0, 1)
    high = Pose(60, 40, 20, 0, 1)
    above = whole_mask("circle", high, 100, 80)
    seen = whole_mask("square", low, 100, 80) & ~above
    scene = Layout(100, 80, [Drawn("square", low, seen, 0.8), Drawn("circle", high, above, 1.0)])
    labels = pixel_classes(scene)
    assert labels[40, 55] == 1 + list(SHAPES).index("circle")
    assert labels[40, 30] == 1 + list(SHAPES).index("square")
    assert (labels > 0).sum() == seen.sum() + above.sum()
    points = dict(zip(KEYPOINTS, scene.keypoints(0), strict=True))
    assert points["right"][2] == 1, "its right edge lies below the circle"
    assert points["left"].tolist() == [40 - 17 - 0.5, 39.5, 2]


def test_keypoints_outside_of_the_picture_are_not_annotated() -> None:
    pose = Pose(5, 30, 20, 0, 1)
    scene = Layout(60, 60, [Drawn("circle", pose, whole_mask("circle", pose, 60, 60), 0.6)])
    points = dict(zip(KEYPOINTS, scene.keypoints(0), strict=True))
    assert points["left"].tolist() == [0, 0, 0]
    assert points["right"][2] == 2


def test_scenes_are_functions_of_split_seed_and_index() -> None:
    def shapes(split: str, seed: int, index: int) -> str:
        return json.dumps(coco_content([layout(split, seed, index)]))

    def pixels(split: str, seed: int, index: int) -> bytes:
        empty = Layout(100, 100, [])
        return picture(empty, split, seed, index, []).tobytes()

    keys = [("train", 0, 7), ("val", 0, 7), ("pretrain", 0, 7), ("train", 1, 7), ("train", 0, 8)]
    for what in (shapes, pixels):
        found = [what(*key) for key in keys]
        assert len(set(found)) == len(keys)
        assert [what(*key) for key in reversed(keys)] == found[::-1]


def test_every_drawn_shape_is_annotated_and_can_be_seen() -> None:
    shares, counts = [], []
    for index in range(120):
        what = layout("train", 3, index)
        counts.append(len(what.shapes))
        union = np.zeros((what.height, what.width), int)
        for one in what.shapes:
            x1, y1, x2, y2 = one.box
            assert one.mask[y1:y2, x1:x2].sum() == one.mask.sum()
            assert one.mask[y1].any()
            assert one.mask[y2 - 1].any()
            assert one.mask[:, x1].any()
            assert one.mask[:, x2 - 1].any()
            union += one.mask
            shares.append(one.visible)
        assert union.max() <= 1, "a pixel belongs to one shape"
    assert min(shares) >= LEAST_VISIBLE
    assert any(share < 0.5 for share in shares)
    assert set(counts) == set(range(7))


def test_a_shape_differs_from_its_ground_inside_of_its_mask_only() -> None:
    """The picture with the shapes, and the same without them: same ground, no grain."""
    what = next(one for i in range(50) if len((one := layout("val", 0, i)).shapes) == 2)
    with_shapes = picture(what, "val", 0, 1, []).astype(int)
    without = picture(what._replace(shapes=[]), "val", 0, 1, []).astype(int)
    difference = np.abs(with_shapes - without).sum(2)
    labels = pixel_classes(what) > 0
    assert np.median(difference[labels]) > 3 * np.median(difference[~labels])


def test_photographs_are_the_ground_if_there_are_any(tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    Image.new("RGB", (50, 70), (250, 10, 10)).save(path)
    empty = next(one for i in range(99) if not (one := layout("train", 0, i)).shapes)
    pixels = picture(empty, "train", 0, 0, [path])
    assert pixels.shape == (empty.height, empty.width, 3)
    assert np.abs(pixels.reshape(-1, 3).mean(0) - (250, 10, 10)).max() < 5
    path.write_bytes(b"no picture")
    with pytest.raises(ConfigError, match=r"red\.png cannot be read .*remove it"):
        picture(empty, "train", 0, 0, [path])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shapes") / "out"
    write_shapes(out, train=6, val=5, pretrain=3, seed=2, processes=1)
    return out


def test_what_is_written_is_read_back_exactly(written: Path) -> None:
    """The same scenes in three forms; JPEG changes the pixels a little."""
    drawn = rendered_shapes("val", Parts(True, True), seed=2, count=5)
    coco = detection_set(str(written / "coco"), "val", masks=True, keypoints=True)
    voc = detection_set(str(written / "voc"), "val")
    pixels = segmentation_set(str(written / "voc"), "val")
    assert len(coco) == len(voc) == len(pixels) == 5
    assert drawn.classes == coco.classes == voc.classes == pixels.classes[1:]
    assert coco.keypoint_names == list(KEYPOINTS)
    assert sum(len(drawn.target(i)["labels"]) for i in range(5)) > 5
    for i in range(5):
        image, target = drawn[i]
        for other in (coco, voc):
            read, found = other[i]
            assert (read.float() - image.float()).abs().mean() < 6
            assert torch.equal(found["boxes"], target["boxes"])
            assert torch.equal(found["labels"], target["labels"])
        assert torch.equal(coco.target(i)["masks"], target["masks"])
        assert torch.allclose(coco.target(i)["keypoints"], target["keypoints"])
        assert torch.equal(voc.target(i)["difficult"], target["difficult"])
        labels = pixels[i][1]
        for mask, label in zip(target["masks"], target["labels"], strict=True):
            assert (labels[mask > 0] == label).all()
        assert (labels > 0).sum() == target["masks"].sum()
    names = sorted(path.name for path in (written / "pretrain").iterdir())
    assert names == [f"{i:06d}.jpg" for i in range(3)]
    assert len(detection_set(str(written / "coco"), "train")) == 6
    assert len(segmentation_set(str(written / "voc"), "train")) == 6


def test_the_root_rendered_needs_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "val", 8)
    data = detection_set("rendered", "val", masks=True)
    assert (len(data), data.name) == (8, "shapes val")
    labels = segmentation_set("rendered", "val")
    number = data.with_objects()[0]
    image, target = data[number]
    assert torch.equal(labels[number][0], image)
    assert torch.equal(labels[number][1] > 0, target["masks"].sum(0) > 0)
    with pytest.raises(ConfigError, match="splits train, val, not test"):
        detection_set("rendered", "test")


def test_the_palette_is_that_of_voc() -> None:
    """As the files of SegmentationClass have it: aeroplane, bicycle, tvmonitor, the border."""
    colours = np.array(voc_palette()).reshape(256, 3).tolist()
    assert colours[:3] == [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
    assert colours[20] == [0, 64, 128]
    assert colours[255] == [224, 224, 192]


def test_the_command_refuses_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    refused = {
        f"--out {tmp_path}": "exists already",
        f"--out {tmp_path}/file/x": "cannot be written",
        f"--out {tmp_path}/new --train 0": "--train 0 is too few",
        f"--out {tmp_path}/new --photographs {tmp_path}": "holds no picture",
        f"--out {tmp_path}/new --photographs {tmp_path}/gone": "cannot be listed",
    }
    for words, part in refused.items():
        assert main(words.split()) == 2
        said = capsys.readouterr().err
        assert part in said
        assert said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_nothing_outlives_an_interrupted_drawing(tmp_path: Path) -> None:
    process = begun("-m", "fastmoco", "shapes", f"--out={tmp_path / 'out'}", "--train=99999")
    try:
        while not any(tmp_path.glob(".out*/out/coco/train/*.jpg")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # Ctrl-C reaches the whole group
        assert all_ended(process.pid, 60)
        assert process.communicate() == ("", "fastmoco: interrupted\n")
        assert process.returncode == 130
        assert list(tmp_path.iterdir()) == []
    finally:
        for left in members(process.pid):
            os.kill(left, signal.SIGKILL)
