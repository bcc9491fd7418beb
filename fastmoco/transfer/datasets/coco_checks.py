"""What COCO's dictionary must hold, refused in a sentence where it does not.

`pycocotools` reads nearly anything: an unknown category is never scored, a polygon of four numbers
is taken for a box, a mask of another size ends the program. Each refusal names file, annotation and
picture, and says what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from fastmoco.config import ConfigError
from fastmoco.transfer.datasets.detection import Parts

Row = dict[str, Any]
Refuse = Callable[[str], NoReturn]


def check_content(content: Any, file: Path, parts: Parts) -> Row:
    """COCO's dictionary with defaults filled in; segmentations are looked at if `parts` asks.

    `iscrowd` is 0 and `area` that of the box unless given. Annotations are numbered from 1 anew:
    `pycocotools` takes an object of the id 0 for one that was never found.
    Raises `ConfigError` for what the reference tools would stumble over or misread.
    """
    lists = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(
        isinstance(content.get(name), list) and all(isinstance(row, dict) for row in content[name])
        for name in lists
    ):
        raise ConfigError(
            f"{file} is no annotation file of COCO: it needs lists of objects named "
            f"{', '.join(lists)}."
        )
    images = _by_id(content["images"], "image", file)
    categories = _by_id(content["categories"], "category", file)
    _by_id(content["annotations"], "annotation", file)
    if not images or not categories:
        raise ConfigError(f"{file} lists no {'categories' if images else 'images'}.")
    for image in images.values():
        _check_image(image, file)
    points = _check_categories(categories.values(), file, parts)
    rows = tqdm(content["annotations"], f"check {file.name}", leave=False, disable=None)
    for number, one in enumerate(rows, start=1):
        _check_annotation(one, images, categories, points, file, parts)
        one["id"] = number
        one.pop("difficult", None)  # VOC's flag: pycocotools would score such an object
    return content


def _by_id(rows: list[Row], kind: str, file: Path) -> dict[int, Row]:
    found: dict[int, Row] = {}
    for row in rows:
        key = row.get("id")
        if type(key) is not int:
            raise ConfigError(f"{file}: the id {key!r} of an {kind} is no integer; number them.")
        if key in found:
            raise ConfigError(f"{file} has two of {kind} {key}: remove one, or renumber them.")
        found[key] = row
    return found


def _check_image(image: Row, file: Path) -> None:
    name = image.get("file_name")
    if not isinstance(name, str) or not name or "\0" in name:
        raise ConfigError(f"{file}: image {image['id']} has no file_name.")
    for side in ("width", "height"):
        if type(image.get(side)) is not int or image[side] < 1:
            raise ConfigError(
                f"{file}: image {image['id']} ({name}) has the {side} {image.get(side)!r}; write "
                "the picture's own, in pixels."
            )


def _check_categories(categories: Iterable[Row], file: Path, parts: Parts) -> int:
    """The number of keypoints of an object."""
    names: set[str] = set()
    counts: set[int] = set()
    for category in categories:
        name = category.get("name")
        if not isinstance(name, str) or name in names:
            raise ConfigError(
                f"{file}: category {category['id']} has the name {name!r}; give each its own."
            )
        names.add(name)
        if points := category.get("keypoints"):
            if not isinstance(points, list) or not all(isinstance(one, str) for one in points):
                raise ConfigError(
                    f"{file}: category {category['id']} ({name}) has the keypoints {points!r}; "
                    "write a list of their names, or none at all."
                )
            counts.add(len(points))
    if parts.keypoints and len(counts) != 1:
        kinds = f"of {sorted(counts)} keypoints" if counts else "without a list of keypoints"
        raise ConfigError(
            f"{file} has categories {kinds}, and a detector of keypoints has one number of them; "
            "COCO's file for them is person_keypoints_*.json."
        )
    return counts.pop() if len(counts) == 1 else 0


def _check_annotation(
    one: Row,
    images: dict[int, Row],
    categories: dict[int, Row],
    points: int,
    file: Path,
    parts: Parts,
) -> None:
    """Raises `ConfigError`; fills in the defaults."""
    image = images.get(_id(one.get("image_id")))

    def refuse(reason: str) -> NoReturn:
        name = f" ({image['file_name']})" if image else ""
        raise ConfigError(
            f"{file}: annotation {one['id']} of image {one.get('image_id')}{name} {reason}."
        )

    if image is None:
        refuse("is about an image that the file does not list: remove the annotation")
    if _id(one.get("category_id")) not in categories:
        known = ", ".join(str(key) for key in sorted(categories)[:5])
        refuse(
            f"has the category {one.get('category_id')!r}, and the file lists {known}"
            f"{', ...' if len(categories) > 5 else ''}: add the category, or correct it"
        )
    _check_box(one, image, refuse)
    if one.setdefault("iscrowd", 0) not in (0, 1):
        refuse(f"has iscrowd {one['iscrowd']!r}: write 0 or 1")
    area = one.setdefault("area", one["bbox"][2] * one["bbox"][3])
    if not _finite([area]) or area < 0:
        refuse(f"has the area {area!r}: write its number of pixels")
    if parts.masks:
        _check_mask(one.get("segmentation"), image, refuse)
    if parts.keypoints and "keypoints" in one:
        _check_keypoints(one["keypoints"], points, refuse)
        one["num_keypoints"] = sum(visible > 0 for visible in one["keypoints"][2::3])
    elif parts.keypoints:
        one.update(keypoints=[0] * 3 * points, num_keypoints=0)


def _id(value: Any) -> int:
    """The value if it can be an id; else one that nothing has."""
    return value if type(value) is int else -(1 << 99)


def _finite(values: Any, count: int = 0) -> bool:
    """Whether it is a list of finite numbers, `count` of them unless 0."""
    return (
        isinstance(values, list)
        and (not count or len(values) == count)
        and all(isinstance(value, int | float) and abs(value) < 1e12 for value in values)
    )


def _numbers(values: Any) -> bool:
    """Whether it is a list of numbers without NaN: quick, as COCO has 30 million of polygons."""
    try:
        return isinstance(values, list) and abs(sum(values)) < 1e12
    except (TypeError, ArithmeticError):
        return False


def _check_box(one: Row, image: Row, refuse: Refuse) -> None:
    box: Any = one.get("bbox")
    if not _finite(box, 4):
        refuse(f"has the bbox {box!r}: write four finite numbers, x, y, width, height")
    if min(box[2:]) < 0:
        refuse(f"has a box of {box[2]:g} x {box[3]:g} pixels: COCO's boxes are x, y, width, height")
    # Boxes without width or height are left out of targets: train2017 itself has some. None is
    # outside of its picture there.
    (x, y, w, h), (width, height) = box, _sides(image)
    if x > width or y > height or x + w < 0 or y + h < 0:
        refuse(f"has the box {box}, outside of its picture of {width} x {height}: correct it")


def _sides(image: Row) -> tuple[int, int]:
    return image["width"], image["height"]


def _check_mask(segmentation: Any, image: Row, refuse: Refuse) -> None:
    width, height = _sides(image)
    if isinstance(segmentation, dict):
        size, counts = segmentation.get("size"), segmentation.get("counts")
        if size != [height, width]:
            refuse(f"has a mask of the size {size}, and its picture {[height, width]}: redo it")
        runs = run_sums(counts)
        if runs != width * height:
            refuse(
                f"has a run-length mask of {runs} pixels, and its picture {width * height}: redo it"
            )
        return
    if not isinstance(segmentation, list) or not segmentation:
        refuse(f"has the segmentation {segmentation!r}: give polygons or run lengths for masks")
    for polygon in segmentation:
        if not _numbers(polygon) or len(polygon) < 6 or len(polygon) % 2:
            refuse("has a polygon that is no list of three or more pairs of numbers: remove it")
        for values, side in ((polygon[::2], width), (polygon[1::2], height)):
            if min(values) < -side or max(values) > 2 * side:
                refuse(
                    f"has a polygon far outside of its picture of {width} x {height}: correct it"
                )


def run_sums(counts: Any) -> int:
    """Pixels of a run-length mask, plain or in COCO's compressed text; -1 if it is none."""
    if isinstance(counts, list):
        valid = all(type(run) is int and run >= 0 for run in counts)
        return sum(counts) if valid else -1
    if not isinstance(counts, str):
        return -1
    # Six bits a character from "0" on: five of the number, one for "it goes on"; from the third
    # run on, differences to the run before the previous one (maskApi.c of the COCO API).
    runs: list[int] = []
    value = shift = 0
    for sign in counts:
        bits = ord(sign) - 48
        if not 0 <= bits < 64:
            return -1
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        if len(runs) > 2:
            value += runs[-2]
        if value < 0:
            return -1
        runs.append(value)
        value = shift = 0
    return sum(runs) if not shift else -1


def _check_keypoints(values: Any, points: int, refuse: Refuse) -> None:
    if not _finite(values, 3 * points):
        refuse(f"needs {points} keypoints, each of x, y and visibility, all of them finite")
    if not {0, 1, 2}.issuperset(values[2::3]):
        refuse("has a keypoint whose visibility is not 0, 1 or 2")
