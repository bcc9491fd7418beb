"""Rendered scenes: shapes that cover one another, on pictures of the demo set or on photographs.

A scene is a function of (split, seed, index) alone, and of the photographs if there are any: any
process draws any of them without the others. What is on it is known exactly. The mask of a shape
holds the pixels whose centre lies in it and in no shape above it; its box encloses them.

H W the size of a scene, K keypoints.
"""

from __future__ import annotations

import colorsys
import math
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastmoco.config import ConfigError
from fastmoco.data.decode import BadImage, decode
from fastmoco.data.pixels.rule import RGB8
from fastmoco.data.sources.demo import render
from fastmoco.data.sources.listing import read_file
from fastmoco.transfer.datasets.shapes import SHAPES, Pose

VERSION = 1
SPLITS = ("train", "val", "pretrain")
SIDES = (96, 161)
"""Width and height are at least the first and below the second."""
MOST_SHAPES = 6
RADII = (0.1, 0.27)
"""Of a shape, as a share of the shorter side."""
TILT = 0.35
"""At most, in radians; from half a quarter turn on, the top of a square would be another one."""
LEAST_VISIBLE = 0.25
"""A shape is not drawn where it would leave less of another, or of itself, to be seen."""
DIFFICULT = 0.5
"""Shapes of which less is seen are `difficult`."""
# Families of the demo without discs, rings and stars of their own.
GROUNDS = ("bricks", "checks", "honeycomb", "mazes", "mosaic", "scales", "zigzags")
GROUNDS_EACH = 40
FINE = 3

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Colours = NDArray[np.floating[Any]]


class Drawn(NamedTuple):
    """A shape of a scene."""

    name: str
    pose: Pose
    mask: Mask
    """(H, W), what is seen of it."""
    visible: float
    """That as a share of the whole shape, parts outside of the picture included."""

    @property
    def box(self) -> tuple[int, int, int, int]:
        """x1 y1 x2 y2, the edges of what is seen."""
        rows, columns = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


class Layout(NamedTuple):
    """What a scene holds, from the lowest shape to the uppermost."""

    width: int
    height: int
    shapes: list[Drawn]

    def keypoints(self, number: int) -> NDArray[np.float64]:
        """(K, 3) of a shape: x, y in COCO's numbers of pixels, and visibility.

        2 if nothing covers it, 1 if a shape above does, and 0 with x and y, outside of the picture.
        """
        one = self.shapes[number]
        points = one.pose.points(SHAPES[one.name].keypoints)
        rows = np.zeros((len(points), 3))
        for row, (x, y) in zip(rows, points, strict=True):
            if 0 <= x < self.width and 0 <= y < self.height:
                above = self.shapes[number + 1 :]
                covered = any(
                    whole_mask(other.name, other.pose, self.width, self.height)[int(y), int(x)]
                    for other in above
                )
                row[:] = x - 0.5, y - 0.5, 1 if covered else 2
        return rows


def whole_mask(name: str, pose: Pose, width: int, height: int) -> Mask:
    """(H, W): the pixels of a shape if nothing is above it."""
    mask, window = np.zeros((height, width), bool), pose.window(width, height)
    mask[window] = SHAPES[name].inside(*pose.plane(window))
    return mask


def _generator(split: str, seed: int, index: int, purpose: int) -> np.random.Generator:
    key = (VERSION, SPLITS.index(split), seed, index, purpose)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def layout(split: str, seed: int, index: int) -> Layout:
    """The shapes of a scene; about one in `MOST_SHAPES` + 1 has none."""
    rng = _generator(split, seed, index, 0)
    width, height = (int(side) for side in rng.integers(*SIDES, 2))
    drawn: list[Drawn] = []
    for _ in range(int(rng.integers(0, MOST_SHAPES + 1))):
        name = str(rng.choice(list(SHAPES)))
        pose = Pose(
            x=rng.uniform(0.05, 0.95) * width,
            y=rng.uniform(0.05, 0.95) * height,
            radius=rng.uniform(*RADII) * min(width, height),
            angle=rng.uniform(-TILT, TILT),
            stretch=math.exp(rng.uniform(-0.2, 0.2)),
        )
        mask = whole_mask(name, pose, width, height)
        under = [_seen(one.name, one.pose, one.mask & ~mask) for one in drawn]
        new = _seen(name, pose, mask)
        if min(one.visible for one in [*under, new]) >= LEAST_VISIBLE:
            drawn = [*under, new]
    return Layout(width, height, drawn)


def _seen(name: str, pose: Pose, mask: Mask) -> Drawn:
    return Drawn(name, pose, mask, float(mask.sum()) / pose.area(SHAPES[name]))


def picture(what: Layout, split: str, seed: int, index: int, photographs: list[Path]) -> Pixels:
    """uint8 (H, W, 3): the shapes of a layout on their ground.

    Edges are smooth: each pixel is mixed as the shape covers its FINE x FINE parts. Raises
    `ConfigError` for a photograph that cannot be read.
    """
    rng = _generator(split, seed, index, 1)
    canvas = _ground(rng, what.width, what.height, split, photographs)
    for one in what.shapes:
        window = one.pose.window(what.width, what.height)
        u, v = one.pose.plane(window)
        parts = SHAPES[one.name].inside(*one.pose.plane(window, FINE))
        parts = parts.reshape(len(u), FINE, u.shape[1], FINE)
        cover = parts.mean((1, 3))[..., None]
        colour = _colour(rng, canvas[one.mask].mean(0))
        turn, depth = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.2)
        shade = 1 + depth * (u * math.cos(turn) + v * math.sin(turn))[..., None]
        inside = np.clip(colour * shade, 0, 1)
        canvas[window] = canvas[window] * (1 - cover) + inside * cover
    canvas = canvas + rng.normal(0, rng.uniform(0, 0.02), canvas.shape)
    return np.asarray(canvas.clip(0, 1) * 255 + 0.5, np.uint8)


def _colour(rng: np.random.Generator, ground: Colours) -> Colours:
    """Of a few random colours the one that differs most from what it covers."""
    several = [
        colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.3, 1), rng.uniform(0.25, 1))
        for _ in range(4)
    ]
    return np.array(max(several, key=lambda one: float(np.abs(np.array(one) - ground).sum())))


def _ground(
    rng: np.random.Generator, width: int, height: int, split: str, photographs: list[Path]
) -> Colours:
    """A random part of a photograph, or of a picture of the demo with less contrast."""
    if photographs:
        image = _photograph(photographs[rng.integers(len(photographs))])
        contrast = 1.0
    else:
        family = str(rng.choice(GROUNDS))
        image = Image.fromarray(_demo(family, split, int(rng.integers(GROUNDS_EACH))))
        contrast = rng.uniform(0.3, 0.7)
    share = rng.uniform(0.5, 1) * min(image.width / width, image.height / height)
    wide, high = share * width, share * height
    left, top = rng.random() * (image.width - wide), rng.random() * (image.height - high)
    box = (left, top, left + wide, top + high)
    part = image.resize((width, height), Image.Resampling.BICUBIC, box)
    pixels = np.asarray(part, np.float64)[:, :: -1 if rng.random() < 0.5 else 1] / 255
    mean = pixels.mean((0, 1))
    return np.asarray(mean + contrast * (pixels - mean))


@lru_cache(maxsize=len(GROUNDS) * GROUNDS_EACH)  # 8 MB; rendering one takes 20 ms
def _demo(family: str, split: str, index: int) -> Pixels:
    return render(family, "test" if split == "val" else "train", index)


def _photograph(path: Path) -> Image.Image:
    try:
        return decode(read_file(str(path)), RGB8)
    except (OSError, BadImage) as error:
        raise ConfigError(f"The photograph {path} cannot be read ({error}): remove it.") from error
