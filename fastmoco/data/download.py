"""Downloads a public data set with torchvision and lays it out as class folders of images.

    python -m fastmoco.data.download cifar10|stl10|imagenette --out DIR

Writes DIR/train and DIR/test (STL-10: also its unlabelled images, under train/unlabeled). Pictures
that torchvision delivers as arrays are stored as PNG, without loss; Imagenette keeps its JPEGs.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from fastmoco.config import ConfigError
from fastmoco.config.command import CommandParser
from fastmoco.machine.stopping import exit_code

Labelled = Iterable[tuple[Image.Image, str]]


def write_class_folders(images: Labelled, out: Path) -> int:
    """Stores every image as out/<label>/NNNNNN.png; the number of images."""
    count = 0
    for count, (image, label) in enumerate(images, start=1):
        folder = out / label
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{count - 1:06d}.png")
    return count


def _cifar10(sets: Any, work: Path, out: Path) -> None:
    for split in ("train", "test"):
        data = sets.CIFAR10(work, train=split == "train", download=True)
        write_class_folders(((image, data.classes[label]) for image, label in data), out / split)


def _stl10(sets: Any, work: Path, out: Path) -> None:
    for part, split in (("train+unlabeled", "train"), ("test", "test")):
        data = sets.STL10(work, split=part, download=True)
        named = (
            (image, data.classes[label] if label >= 0 else "unlabeled") for image, label in data
        )
        write_class_folders(named, out / split)


def _imagenette(sets: Any, work: Path, out: Path) -> None:
    sets.Imagenette(work, split="train", size="320px", download=True)
    for downloaded, split in (("train", "train"), ("val", "test")):
        shutil.move(str(work / "imagenette2-320" / downloaded), out / split)


SETS: dict[str, Callable[[Any, Path, Path], None]] = {
    "cifar10": _cifar10,
    "stl10": _stl10,
    "imagenette": _imagenette,
}


def prepare(name: str, out: Path, datasets: Any = None) -> Path:
    """Downloads and lays out a data set; out exists only once it is complete.

    datasets: torchvision.datasets unless given. Raises `ConfigError` if out is there already or the
    download fails.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already: choose another folder or remove it.")
    if datasets is None:
        import torchvision

        datasets = torchvision.datasets
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Beside the result, so that the last step is a rename within one file system.
        beside = tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{name}-")
    except OSError as error:
        raise ConfigError(f"{out.parent} cannot be written ({error.strerror}).") from error
    with beside as place:
        work, complete = Path(place) / "download", Path(place) / "images"
        work.mkdir()
        complete.mkdir()
        try:
            SETS[name](datasets, work, complete)
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"{name} could not be downloaded into {out.parent}: {reason}"
            ) from error
        os.rename(complete, out)
    return out


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit code 2 with one sentence where it cannot be done."""
    parser = CommandParser(
        prog="fastmoco prepare", description="Download a public data set as folders of images."
    )
    parser.add_argument("name", choices=sorted(SETS), help="the data set")
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    options = parser.parse_args(arguments)
    try:
        out = prepare(options.name, options.out)
    except ConfigError as error:
        print(f"fastmoco: {error}", file=sys.stderr)
        return 2
    print(f"{out}: train with --data.root {out} and evaluate with --knn.test_root {out / 'test'}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
