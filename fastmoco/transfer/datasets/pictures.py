"""The pictures of a data set, found and decoded: RGB of 8 bits in the stored orientation."""

from __future__ import annotations

import filecmp
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastmoco.config import ConfigError
from fastmoco.data.decode import IMAGE_SUFFIXES, BadImage, decode
from fastmoco.data.pixels.rule import RGB8
from fastmoco.data.sources.listing import read_file


def names_in(folder: Path) -> set[str]:
    """Names of what is in a folder. Raises `ConfigError` where it cannot be listed."""
    try:
        return set(os.listdir(folder))
    except OSError as error:
        raise ConfigError(f"The folder {folder} cannot be listed: {error.strerror}.") from error


def picture_of(stem: str, names: set[str], folder: Path) -> Path:
    """The picture of an id, `000005.jpg` of `000005`. Raises `ConfigError` if there is none."""
    for suffix in IMAGE_SUFFIXES:
        if stem + suffix in names:
            return folder / (stem + suffix)
    raise ConfigError(
        f"{folder} has no picture {stem}.jpg: unpack it, or take {stem} out of the list."
    )


def shared(learned: Sequence[Path], scored: Sequence[Path]) -> list[Path]:
    """Those of `scored` that are in `learned` too: the same file, or one of its name and content.

    A file of another name is not looked into: to read every picture takes hours on a network.
    """
    named: dict[str, list[Path]] = defaultdict(list)
    for path in learned:
        named[path.name].append(path)
    return [path for path in scored if any(_same(path, one) for one in named[path.name])]


def _same(one: Path, other: Path) -> bool:
    try:
        # Contents are read only where the sizes agree.
        return one == other or one.samefile(other) or filecmp.cmp(one, other, shallow=False)
    except OSError:  # whoever needs the picture will say so
        return False


class PictureFiles:
    """Calls with a number give the picture as uint8 (3, H, W).

    paths: where each picture is. size: (width, height) that the annotations of one are about.

    EXIF orientations are not applied: annotations are about the stored pixels, as torchvision and
    pycocotools read them. A picture of another size is refused, which also finds those whose
    annotations are about the turned picture. Raises `ConfigError` for such a picture,
    and for one that cannot be read or decoded.
    """

    def __init__(self, paths: Sequence[Path], size: Callable[[int], tuple[int, int]]) -> None:
        self.paths, self._size = list(paths), size

    def __call__(self, number: int) -> Tensor:
        path = self.paths[number]
        try:
            image = decode(read_file(str(path)), RGB8)
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(f"The picture {path} cannot be read: {reason}.") from error
        except BadImage as error:
            raise ConfigError(
                f"The picture {path} cannot be decoded ({error}): repair it, or remove it together "
                "with its annotations."
            ) from error
        expected = self._size(number)
        if image.size != expected:
            turned = image.size == expected[::-1]
            raise ConfigError(
                f"The picture {path} is {_pixels(image.size)}, its annotations are about "
                f"{_pixels(expected)}: "
                + (
                    "if EXIF turns it, store it turned (exiftran -ai), or annotate it as stored."
                    if turned
                    else "they belong to another copy of the picture."
                )
            )
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]} pixels"
