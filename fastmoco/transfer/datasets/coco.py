"""The layout of COCO: `annotations/instances_SPLIT.json` beside folders of pictures."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from fastmoco.config import ConfigError
from fastmoco.machine import durable
from fastmoco.transfer.datasets.coco_checks import check_content
from fastmoco.transfer.datasets.detection import Detections, Parts
from fastmoco.transfer.datasets.pictures import PictureFiles, names_in

KEYPOINT_FILES = ("person_keypoints_", "keypoints_", "instances_")
BOX_FILES = ("instances_",)


def annotation_files(root: Path, parts: Parts) -> dict[str, Path]:
    """The annotation file of every split, such as `train2017`, that a root holds; mostly none."""
    found: dict[str, Path] = {}
    for start in KEYPOINT_FILES if parts.keypoints else BOX_FILES:
        for path in sorted((root / "annotations").glob(f"{start}*.json")):
            found.setdefault(path.stem.removeprefix(start), path)
    return found


def read_coco(root: Path, split: str, parts: Parts = Parts()) -> Detections:  # noqa: B008
    """The split `train`, `val` or `train2017` of a root with `annotations/`.

    Raises `ConfigError` where there is no such split, and as `check_content` does.
    """
    files = annotation_files(root, parts)
    names = [split] if split in files else [name for name in files if name.startswith(split)]
    if len(names) != 1:
        raise ConfigError(
            f"{root / 'annotations'} holds the splits {', '.join(files) or 'of none'}: "
            f"{'more than one' if names else 'none'} is {split}, so name one of them."
        )
    (name,) = names
    file = files[name]
    content = check_content(load(file), file, parts)
    folder = _pictures(root, name, content, file)
    paths = [folder / image["file_name"] for image in content["images"]]
    _check_pictures(paths, file)
    sizes = [(image["width"], image["height"]) for image in content["images"]]
    return Detections(f"COCO {name}", content, PictureFiles(paths, sizes.__getitem__), parts=parts)


def load(file: Path) -> Any:
    """What a JSON file holds. Raises `ConfigError` where it cannot be read, or is cut off."""
    try:
        return json.loads(durable.read_regular(file))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{file} is not valid JSON ({error}): it may be cut off; download or write it again."
        ) from error


def _pictures(root: Path, name: str, content: dict[str, Any], file: Path) -> Path:
    """The folder in which the first picture is."""
    first = content["images"][0]["file_name"]
    folders = (root / name, root / "images" / name, root / "images", root)
    for folder in folders:
        if (folder / first).is_file():
            return folder
    raise ConfigError(
        f"{file} names the picture {first}, which is in none of "
        f"{', '.join(str(folder) for folder in folders)}: unpack the pictures there."
    )


def _check_pictures(paths: list[Path], file: Path) -> None:
    """Each folder is listed once: asking for every file takes minutes on a network."""
    by_folder: dict[Path, list[str]] = defaultdict(list)
    for path in paths:
        by_folder[path.parent].append(path.name)
    missing = [
        folder / name
        for folder, wanted in by_folder.items()
        for there in [names_in(folder) if folder.is_dir() else set()]
        for name in wanted
        if name not in there
    ]
    if missing:
        raise ConfigError(
            f"{file} names {len(missing)} pictures that do not exist, the first is {missing[0]}: "
            "unpack them, or take them out of the file."
        )
