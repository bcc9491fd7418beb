"""VOC's layout: read as the devkit means it and Detectron2 reads it, or refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco.config import ConfigError
from fastmoco.transfer import detect, segment
from fastmoco.transfer.datasets.choose import detection_set, segmentation_set

pytest.importorskip("pycocotools", reason="the extra transfer is not installed")

HEAD = "<annotation><filename>f</filename><size><width>{}</width><height>{}</height></size>"
CAR = (
    "<object><name>car</name><pose>Left</pose><difficult>{}</difficult><bndbox><xmin>{}</xmin>"
    "<ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)
PERSON = (
    "<object><name> person </name><bndbox><ymin>2.5</ymin><xmin>3</xmin><xmax>9</xmax>"
    "<ymax>8</ymax></bndbox><part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin>"
    "<xmax>2</xmax><ymax>2</ymax></bndbox></part></object>"
)


def add(root: Path, year: str, name: str, lists: tuple[str, ...], objects: str) -> Path:
    """One picture of 40 x 30 with its annotation, on lists of `Main`; the annotation's path."""
    folder = root / f"VOC{year}"
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), (9, 90, 200)).save(folder / "JPEGImages" / f"{name}.jpg")
    for one in lists:
        with open(folder / "ImageSets" / "Main" / f"{one}.txt", "a") as file:
            file.write(f"{name}  1\r\n")
    path = folder / "Annotations" / f"{name}.xml"
    path.write_text(HEAD.format(40, 30) + objects + "</annotation>")
    return path


def both_years(root: Path) -> Path:
    """VOC07+12: trainval of both, test of 2007; returns one annotation of trainval."""
    path = add(root, "2007", "000005", ("trainval",), CAR.format(0, 1, 1, 40, 30) + PERSON)
    add(root, "2007", "000007", ("test",), CAR.format(1, 5, 6, 5, 6))
    add(root, "2012", "2008_000001", ("trainval", "train"), "")
    return path


def test_boxes_count_pixels_from_one_with_both_ends(tmp_path: Path) -> None:
    both_years(tmp_path / "VOCdevkit")
    data = detection_set(str(tmp_path), "train")
    assert data.name == "VOC 2007_trainval+2012_trainval"
    assert len(data.classes) == 20
    image, target = data[0]
    assert image.shape == (3, 30, 40)
    # A box over the whole picture, and the person's; the part is no object.
    assert target["boxes"].tolist() == [[0, 0, 40, 30], [2, 1.5, 9, 8]]
    names = [data.classes[label - 1] for label in target["labels"].tolist()]
    assert names == ["car", "person"]
    assert target["area"].tolist() == [1200, 7 * 6.5]
    assert target["difficult"].tolist() == [False, False]
    assert data.target(1)["boxes"].shape == (0, 4), "a picture without objects"
    assert data.with_objects() == [0]


def test_splits_are_those_of_the_papers(tmp_path: Path) -> None:
    both_years(tmp_path)
    test = detection_set(str(tmp_path), "val")
    assert (test.name, len(test), test.style) == ("VOC 2007_test", 1, "voc")
    target = test.target(0)
    assert target["boxes"].tolist() == [[4, 5, 5, 6]], "one pixel"
    assert target["difficult"].tolist() == [True]
    named = detection_set(str(tmp_path), "2012_train+2007_test")
    assert named.image_ids == [1, 2]
    with pytest.raises(ConfigError, match="holds the years 2007, 2012 of VOC, not 2011_train"):
        detection_set(str(tmp_path), "2011_train")
    with pytest.raises(ConfigError, match=r"Main/val\.txt cannot be read: No such file"):
        detection_set(str(tmp_path), "2012_val")
    with pytest.raises(ConfigError, match="VOC, in which detection data has no masks"):
        detection_set(str(tmp_path), "train", masks=True)


def command(root: Path, *more: str) -> list[str]:
    """Options for less than a step: the run ends at its batch size, with all data read."""
    given = ["--checkpoint", "random:resnet18", "--data.root", str(root), "--device", "cpu"]
    return [*given, "--out", str(root / "out"), "--batch_size", "0", *more]


def without_a_test_list(root: Path) -> Path:
    """VOC2012 as it is given out: trainval is train and val together."""
    add(root, "2012", "2008_000001", ("trainval", "train"), CAR.format(0, 1, 1, 9, 9))
    add(root, "2012", "2008_000002", ("trainval", "val"), CAR.format(0, 2, 2, 9, 9))
    return root


def test_pictures_that_are_scored_are_not_learned_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = without_a_test_list(tmp_path)
    assert detect.main(command(root)) == 2
    told = capsys.readouterr()
    assert told.out.startswith(
        "val is scored and has pictures of 2012_trainval, so that 2012_train is learned from.\n"
    )
    assert "--batch_size is 0" in told.err
    assert detect.main(command(root, "--train", "2012_trainval")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        "VOC 2012_trainval, to be learned from, holds 1 of the 1 pictures of VOC 2012_val" in line
    )
    assert "2008_000002.jpg" in line
    assert "--train" in line
    # A list of test pictures leaves trainval whole.
    add(root, "2012", "2008_000003", ("test",), CAR.format(0, 3, 3, 9, 9))
    assert detect.main(command(root)) == 2
    assert "learned from" not in capsys.readouterr().out


def test_a_picture_of_two_years_is_one_and_another_of_its_name_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = without_a_test_list(tmp_path)
    add(root, "2010", "2008_000002", ("trainval",), CAR.format(0, 2, 2, 9, 9))  # equal bytes
    assert detect.main(command(root)) == 2
    assert "holds 1 of the 1 pictures of VOC 2012_val" in capsys.readouterr().err
    Image.new("RGB", (40, 30), "red").save(root / "VOC2010" / "JPEGImages" / "2008_000002.jpg")
    assert detect.main(command(root)) == 2
    told = capsys.readouterr()
    assert "2010_trainval+2012_train is learned from" in told.out
    assert "--batch_size is 0" in told.err


def test_objects_that_are_all_difficult_are_found_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both_years(tmp_path)  # the one object of 2007_test is difficult
    assert detect.main(command(tmp_path)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "VOC 2007_test has no object to find, only difficult ones of 1" in line
    add(tmp_path, "2007", "000008", ("test",), "")
    add(tmp_path, "2007", "000009", ("test",), PERSON)
    assert detect.main(command(tmp_path)) == 2
    assert "--batch_size is 0" in capsys.readouterr().err
    # In training difficult objects are learned unless the command says no.
    add(tmp_path, "2012", "2008_000009", ("val",), CAR.format(1, 5, 6, 9, 9))
    assert detect.main(command(tmp_path, "--train", "2012_val")) == 2
    assert "--batch_size is 0" in capsys.readouterr().err
    assert detect.main(command(tmp_path, "--train", "2012_val", "--difficult", "ignore")) == 2
    assert "VOC 2012_val has no object to learn from" in capsys.readouterr().err


def test_classes_of_another_set_are_listed_in_a_file(tmp_path: Path) -> None:
    add(tmp_path, "2007", "a", ("trainval",), CAR.replace("car", "mug").format(0, 1, 1, 9, 9))
    with pytest.raises(ConfigError, match=r"object 1 is of the class 'mug', .* classes\.txt"):
        detection_set(str(tmp_path), "train")
    (tmp_path / "classes.txt").write_text("cup\nmug\n\n")
    data = detection_set(str(tmp_path), "train")
    assert data.classes == ["cup", "mug"]
    assert data.target(0)["labels"].tolist() == [2]
    (tmp_path / "classes.txt").write_text("mug\nmug\n")
    with pytest.raises(ConfigError, match="each once"):
        detection_set(str(tmp_path), "train")


BOMB = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "bbbb">]>' + HEAD.format(40, 30)
BROKEN = {
    "backwards": (CAR.format(0, 9, 1, 8, 9), "object 1 ends before it begins, from 9, 1 to 7, 9"),
    "NaN": (CAR.format(0, "nan", 1, 8, 9), "bndbox/xmin 'nan' where a number"),
    "no number": (CAR.format(0, "", 1, 8, 9), "bndbox/xmin '' where a number"),
    "no box": ("<object><name>car</name></object>", "bndbox/xmin None where a number"),
    "outside": (CAR.format(0, 41, 1, 48, 9), "object 1 is outside of its picture of 40 x 30"),
    "above": (CAR.format(0, 4, -9, 8, 0), "object 1 is outside of its picture of 40 x 30"),
    "unknown class": (CAR.replace("car", "Car").format(0, 1, 1, 8, 9), "of the class 'Car'"),
    "no class": (CAR.replace("name", "nom").format(0, 1, 1, 8, 9), "of the class ''"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_objects_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    objects, part = BROKEN[kind]
    objects = (
        objects.replace("<xmax>8</xmax>", "<xmax>7</xmax>") if kind == "backwards" else objects
    )
    both_years(tmp_path)
    add(tmp_path, "2012", "bad", ("trainval",), objects)
    with pytest.raises(ConfigError) as refusal:
        detection_set(str(tmp_path), "train")
    assert part in str(refusal.value)
    assert "bad.xml" in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (BOMB.encode() + b"</annotation>", "declares a document type"),
        ((BOMB + "</annotation>").encode("utf-16"), "declares a document type"),
        (HEAD.format(40, 30).encode(), "is not valid XML"),
        (b"", "is not valid XML"),
        (b"<?xml version='1.0' encoding='no-such'?><a/>", "is not valid XML"),
        (b"<annotation/>", "size/width None where a number"),
        (HEAD.format(0, 30).encode() + b"</annotation>", "0 x 30 pixels: write its own size"),
    ],
)
def test_files_that_are_no_annotation_are_refused(
    content: bytes, part: str, tmp_path: Path
) -> None:
    both_years(tmp_path).write_bytes(content)
    with pytest.raises(ConfigError) as refusal:
        detection_set(str(tmp_path), "train")
    assert part in str(refusal.value)
    assert "000005.xml" in str(refusal.value)


def test_missing_and_double_files_are_named(tmp_path: Path) -> None:
    path = both_years(tmp_path)
    data = detection_set(str(tmp_path), "train")
    Image.new("RGB", (30, 40)).save(tmp_path / "VOC2007" / "JPEGImages" / "000005.jpg")
    with pytest.raises(ConfigError, match=r"000005\.jpg is 30 x 40 pixels, its annotations"):
        data[0]
    path.rename(path.with_name("other.xml"))
    with pytest.raises(ConfigError, match=r"000005\.xml cannot be read: No such file"):
        detection_set(str(tmp_path), "train")
    (tmp_path / "VOC2007" / "JPEGImages" / "000005.jpg").unlink()
    with pytest.raises(ConfigError, match=r"has no picture 000005\.jpg"):
        detection_set(str(tmp_path), "train")
    add(tmp_path, "2007", "000005", ("trainval",), "")
    with pytest.raises(ConfigError, match=r"trainval\.txt names 000005 twice"):
        detection_set(str(tmp_path), "train")


def labelled(root: Path, name: str, values: np.ndarray, part: str = "train") -> Path:
    """A picture with its classes as a palette PNG, on a list of `Segmentation`."""
    add(root, "2012", name, (), "")
    folder = root / "VOC2012"
    for some in ("ImageSets/Segmentation", "SegmentationClass", "SegmentationClassAug"):
        (folder / some).mkdir(parents=True, exist_ok=True)
    with open(folder / "ImageSets" / "Segmentation" / f"{part}.txt", "a") as file:
        file.write(f"{name}\n")
    labels = Image.fromarray(values.astype(np.uint8))
    labels.putpalette([(7 * i) % 256 for i in range(768)])
    path = folder / f"SegmentationClass{'Aug' * (part == 'trainaug')}" / f"{name}.png"
    labels.save(path)
    return path


def test_labels_are_palette_indices_with_an_unknown_border(tmp_path: Path) -> None:
    values = np.zeros((30, 40))
    values[5:9, 5:9], values[9, 5:9] = 20, 255
    labelled(tmp_path, "a", values)
    data = segmentation_set(str(tmp_path), "train")
    image, labels = data[0]
    assert (data.name, len(data), len(data.classes)) == ("VOC 2012_train", 1, 21)
    assert image.shape == (3, 30, 40)
    assert labels.dtype == torch.uint8
    assert np.array_equal(labels.numpy(), values)
    labelled(tmp_path, "b", values, "trainaug")
    assert segmentation_set(str(tmp_path), "train").name == "VOC 2012_trainaug"
    assert segmentation_set(str(tmp_path), "2012_train").name == "VOC 2012_train"


def test_broken_labels_are_refused_by_name(tmp_path: Path) -> None:
    path = labelled(tmp_path, "a", np.full((30, 40), 21))
    with pytest.raises(ConfigError, match=r"a\.png has the class number 21, and there are 21"):
        segmentation_set(str(tmp_path), "train")[0]
    labelled(tmp_path, "b", np.zeros((30, 41)))
    with pytest.raises(ConfigError, match=r"b\.jpg is 40 x 30 pixels, its annotations .* 41 x 30"):
        segmentation_set(str(tmp_path), "train")[1]
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ConfigError, match=r"a\.png cannot be"):
        segmentation_set(str(tmp_path), "train")[0]
    Image.new("RGB", (40, 30)).save(path)
    with pytest.raises(ConfigError, match=r"a\.png is of the mode RGB"):
        segmentation_set(str(tmp_path), "train")[0]
    path.unlink()
    with pytest.raises(ConfigError, match=r"has no a\.png, which the list train names"):
        segmentation_set(str(tmp_path), "train")
    with pytest.raises(ConfigError, match="holds no VOC2007"):
        segmentation_set(str(tmp_path / "VOC2012"), "train")


def test_labels_that_are_scored_exist_and_are_not_learned_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, parts in (("a", ("train", "trainval", "trainaug")), ("b", ("val", "trainval"))):
        for part in parts:
            labelled(tmp_path, name, np.zeros((30, 40)), part)
    assert segment.main(command(tmp_path)) == 2
    told = capsys.readouterr()
    assert "--batch_size is 0" in told.err
    assert "learned from" not in told.out
    assert segment.main(command(tmp_path, "--train", "2012_trainval")) == 2
    assert "VOC 2012_trainval, to be learned from, holds 1 of the 1" in capsys.readouterr().err
    labelled(tmp_path, "c", np.full((30, 40), 255), "test")
    assert segment.main(command(tmp_path, "--test", "2012_test")) == 2
    assert "VOC 2012_test has no pixel to score" in capsys.readouterr().err
    labelled(tmp_path, "b", np.zeros((30, 40)), "trainaug")
    assert segment.main(command(tmp_path)) == 2
    assert "2012_trainaug, so that 2012_train is learned from" in capsys.readouterr().out
