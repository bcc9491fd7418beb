"""The layout of PASCAL VOC: `VOC2007/{Annotations,ImageSets,JPEGImages,SegmentationClass}`."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from fastmoco.config import ConfigError
from fastmoco.machine import durable
from fastmoco.transfer.datasets.detection import Detections
from fastmoco.transfer.datasets.pictures import PictureFiles, names_in, picture_of, shared
from fastmoco.transfer.datasets.segmentation import Segmentations

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
CLASS_FILE = "classes.txt"
"""In the folder of the years: other classes than VOC's, one a line."""
MAIN, SEGMENTATION = "Main", "Segmentation"
"""Folders of lists below `ImageSets`."""
Row = dict[str, Any]


def years(root: Path) -> dict[str, Path]:
    """The folder of each year, such as `2007`, below a root or its `VOCdevkit`; mostly none."""
    found: dict[str, Path] = {}
    for folder in (root, root / "VOCdevkit"):
        for year in sorted(folder.glob("VOC[0-9][0-9][0-9][0-9]")):
            if (year / "ImageSets").is_dir():
                found.setdefault(year.name.removeprefix("VOC"), year)
    return found


def read_voc(root: Path, split: str) -> Detections:
    """`train`: trainval of all years; `val`: test of 2007, or val of the only year without a test.

    Any other split is named as `2012_train` or `2007_trainval+2012_trainval`; `learned_lists` has
    those that hold none of the test pictures. Boxes are the devkit's, from 1 and both ends
    included, as pixels' edges: x1 is xmin - 1, x2 is xmax.
    Raises `ConfigError` for what the reference tools would stumble over or misread.
    """
    folders = years(root)
    names = _names(folders, MAIN, split)
    classes = class_names(root)
    categories = [{"id": i, "name": name} for i, name in enumerate(classes, start=1)]
    labels = {name: i for i, name in enumerate(classes, start=1)}
    content: Row = {"images": [], "annotations": [], "categories": categories}
    paths: list[Path] = []
    for name in names:
        year, part = _year(root, folders, name)
        _add(content, paths, year, part, labels)
    sizes = [(image["width"], image["height"]) for image in content["images"]]
    title = f"VOC {'+'.join(names)}"
    return Detections(title, content, PictureFiles(paths, sizes.__getitem__), style="voc")


def read_voc_segmentation(root: Path, split: str) -> Segmentations:
    """`train`: the list `trainaug` of the latest year if there is one, else `train`; `val`.

    Class numbers are the palette indices of `SegmentationClass`, or of `SegmentationClassAug` for
    `trainaug`; 255 is the border, which is not scored. Any other list is named as `2012_trainval`.
    Raises `ConfigError` as `read_voc` does.
    """
    folders = years(root)
    (name,) = _names(folders, SEGMENTATION, split)
    folder, part = _year(root, folders, name)
    listed = _listed(folder, SEGMENTATION, part)
    labels = folder / ("SegmentationClassAug" if part == "trainaug" else "SegmentationClass")
    label_names = names_in(labels)
    for one in listed:
        if f"{one}.png" not in label_names:
            raise ConfigError(f"{labels} has no {one}.png, which the list {part} names.")
    classes = ["background", *class_names(root)]
    maps = LabelFiles([labels / f"{one}.png" for one in listed], len(classes))
    pictures_of = PictureFiles(list(listed.values()), maps.size)
    return Segmentations(f"VOC {name}", classes, pictures_of, maps, len(listed))


def learned_lists(root: Path, task: str, test: str) -> tuple[str, str]:
    """What `train` means where the split `test` is scored, and a sentence if it is another list.

    task: `MAIN` or `SEGMENTATION`. Of a year whose usual list holds test pictures, as trainval does
    where only val is left to score, it is the list `train`. Raises `ConfigError` for broken lists.
    """
    folders = years(root)

    def pictures(name: str) -> list[Path]:
        year, part = _year(root, folders, name)
        return list(_listed(year, task, part).values())

    scored = [path for name in _names(folders, task, test) for path in pictures(name)]
    usual = _names(folders, task, "train")
    chosen = []
    for name in usual:
        year = name.partition("_")[0]
        narrow = _list_file(folders[year], task, "train").is_file()
        chosen.append(f"{year}_train" if narrow and shared(pictures(name), scored) else name)
    learned, whole = "+".join(chosen), "+".join(usual)
    told = f"{test} is scored and has pictures of {whole}, so that {learned} is learned from."
    return learned, told if learned != whole else ""


def _names(folders: dict[str, Path], task: str, split: str) -> list[str]:
    """The lists of a split, such as `2007_trainval` and `2012_trainval`."""
    last = list(folders)[-1]
    if task == SEGMENTATION:
        augmented = _list_file(folders[last], task, "trainaug").is_file()
        part = "trainaug" if split == "train" and augmented else split
        return [f"{last}_{part}" if split in ("train", "val") else split]
    if split == "train":
        return [f"{year}_trainval" for year in folders]
    if split == "val":
        tested = [year for year in folders if _list_file(folders[year], task, "test").is_file()]
        return [f"{tested[0]}_test" if tested else f"{last}_val"]
    return split.split("+")


def _year(root: Path, folders: dict[str, Path], name: str) -> tuple[Path, str]:
    """The folder of the year of a list, and its name there. Raises `ConfigError`."""
    year, _, part = name.partition("_")
    if year not in folders:
        raise ConfigError(f"{root} holds the years {', '.join(folders)} of VOC, not {name}.")
    return folders[year], part


class LabelFiles:
    """Calls with a number give the class of each pixel, uint8 (H, W), 255 where it is unknown.

    Raises `ConfigError` for a file that is no picture of palette indices below `classes`.
    """

    def __init__(self, paths: list[Path], classes: int) -> None:
        self.paths, self.classes = paths, classes

    def size(self, number: int) -> tuple[int, int]:
        """Width and height, from the header."""
        return self._open(number).size

    def __call__(self, number: int) -> Tensor:
        path = self.paths[number]
        try:
            values = np.array(self._open(number))
        except (OSError, ValueError, SyntaxError) as error:
            raise ConfigError(f"{path} cannot be decoded ({error}): download it again.") from error
        strange = values[(values >= self.classes) & (values != 255)]
        if strange.size:
            raise ConfigError(
                f"{path} has the class number {strange[0]}, and there are {self.classes} with the "
                "background: correct it, or list the classes."
            )
        return torch.from_numpy(values)

    def _open(self, number: int) -> Image.Image:
        path = self.paths[number]
        try:
            image = Image.open(io.BytesIO(durable.read_regular(path)))
        except (OSError, ValueError, SyntaxError) as error:
            raise ConfigError(f"{path} cannot be read as a picture: {error}.") from error
        if image.mode not in ("P", "L"):
            raise ConfigError(
                f"{path} is of the mode {image.mode}: class numbers are a PNG with a palette, or a "
                "gray one of 8 bits."
            )
        return image


def class_names(root: Path) -> list[str]:
    """The lines of `classes.txt`, else VOC's twenty. Raises `ConfigError` for a double one."""
    for file in (root / CLASS_FILE, root / "VOCdevkit" / CLASS_FILE):
        if file.is_file():
            names = _lines(file)
            if not names or len(set(names)) < len(names):
                raise ConfigError(f"{file} must have one class a line, and each once.")
            return names
    return list(CLASSES)


def _list_file(year: Path, task: str, part: str) -> Path:
    return year / "ImageSets" / task / f"{part}.txt"


def _lines(file: Path) -> list[str]:
    """Lines that are not empty. Raises `ConfigError` where they cannot be read as UTF-8."""
    try:
        lines = durable.read_regular(file).decode("utf-8-sig").splitlines()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is no text in UTF-8 ({error}).") from error
    return [line.strip() for line in lines if line.strip()]


def _ids(file: Path) -> list[str]:
    """The ids of a list of `ImageSets`, the first word of each line."""
    ids = [line.split()[0] for line in _lines(file)]
    if not ids:
        raise ConfigError(f"{file} names no picture.")
    seen: set[str] = set()
    for one in ids:
        if one in seen:
            raise ConfigError(f"{file} names {one} twice: remove one.")
        seen.add(one)
    return ids


def _listed(year: Path, task: str, part: str) -> dict[str, Path]:
    """The picture of each id of a list, in its order."""
    ids, folder = _ids(_list_file(year, task, part)), year / "JPEGImages"
    there = names_in(folder)
    return {one: picture_of(one, there, folder) for one in ids}


def _add(content: Row, paths: list[Path], year: Path, part: str, labels: dict[str, int]) -> None:
    """Append the pictures of a list, and what is on them."""
    listed = _listed(year, MAIN, part)
    for one, path in tqdm(listed.items(), f"read {year.name} {part}", leave=False, disable=None):
        image_id = len(content["images"]) + 1
        width, height, objects = parse(year / "Annotations" / f"{one}.xml", labels)
        paths.append(path)
        content["images"].append(
            {"id": image_id, "file_name": path.name, "width": width, "height": height}
        )
        for found in objects:
            found |= {"id": len(content["annotations"]) + 1, "image_id": image_id}
            content["annotations"].append(found)


def parse(file: Path, labels: dict[str, int]) -> tuple[int, int, list[Row]]:
    """Width and height of the picture, and its objects as COCO has them.

    Raises `ConfigError` for a file that is no annotation of VOC, or one with a document type, which
    VOC has none of and by which a small file can become gigabytes.
    """
    try:
        data = durable.read_regular(file)
        _without_entities(data, file)
        tree = ElementTree.fromstring(data)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}.") from error
    except (ElementTree.ParseError, expat.ExpatError, ValueError, LookupError) as error:
        raise ConfigError(
            f"{file} is not valid XML ({error}): it may be cut off; unpack it again."
        ) from error
    width, height = (_number(tree, f"size/{side}", file) for side in ("width", "height"))
    if min(width, height) < 1 or not (width.is_integer() and height.is_integer()):
        raise ConfigError(
            f"{file} says that its picture is {width:g} x {height:g} pixels: write its own size."
        )
    objects = [
        _object(found, number, labels, (width, height), file)
        for number, found in enumerate(tree.findall("object"), start=1)
    ]
    return int(width), int(height), objects


def _without_entities(data: bytes, file: Path) -> None:
    def refuse(*_: Any) -> None:
        raise ConfigError(f"{file} declares a document type, as no annotation of VOC does.")

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.Parse(data, True)


def _number(element: ElementTree.Element, path: str, file: Path) -> float:
    text = element.findtext(path)
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{file} has {path} {text!r} where a number is needed: correct it.")
    return value


def _object(
    found: ElementTree.Element,
    number: int,
    labels: dict[str, int],
    size: tuple[float, float],
    file: Path,
) -> Row:
    name = (found.findtext("name") or "").strip()
    where = f"{file}: object {number}"
    if name not in labels:
        raise ConfigError(
            f"{where} is of the class {name!r}, which is none of the {len(labels)} known: correct "
            f"it, or list all classes in {CLASS_FILE} beside the folders of the years."
        )
    edges = (_number(found, f"bndbox/{edge}", file) for edge in ("xmin", "ymin", "xmax", "ymax"))
    x1, y1, x2, y2 = edges
    box = [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]
    if min(box[2:]) <= 0:
        raise ConfigError(f"{where} ends before it begins, from {x1:g}, {y1:g} to {x2:g}, {y2:g}.")
    if x1 > size[0] or y1 > size[1] or x2 < 1 or y2 < 1:
        raise ConfigError(
            f"{where} is outside of its picture of {size[0]:g} x {size[1]:g}, from {x1:g}, {y1:g} "
            f"to {x2:g}, {y2:g}: correct it."
        )
    return {
        "category_id": labels[name],
        "bbox": box,
        "area": box[2] * box[3],
        "iscrowd": 0,
        "difficult": (found.findtext("difficult") or "0").strip() == "1",
    }
