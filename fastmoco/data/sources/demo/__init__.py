"""The embedded demo set: pictures that are rendered, so that training starts without a download.

Twelve classes are twelve families of patterns (`patterns.py`). A family has a usual size and
slant of its pattern and a preferred part of the colour wheel; these overlap between families.
Within a class everything varies: palette, polarity, scale, rotation, warp, the shape that carries
the pattern, its place, light, background and grain. So pictures that are close in pixel space are
mostly of different classes, while the geometry of the pattern survives crops, jitter and blur.

Every picture is a function of (version, split, index): any number of processes renders the same
files. `python -m fastmoco.data.sources.demo --out DIR` renders into a folder of your choice.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastmoco.config import ConfigError
from fastmoco.config.command import CommandParser
from fastmoco.data.sources.demo.patterns import FAMILIES, Plane, inside
from fastmoco.data.sources.measure import in_parallel
from fastmoco.machine import durable
from fastmoco.machine.cache import cache_folder
from fastmoco.machine.stopping import exit_code

VERSION = 2
DIGEST = "digest"
"""File of a rendered set with a hash of its pictures."""
SIDE = 96
CLASSES = tuple(FAMILIES)
PER_CLASS = {"train": 400, "test": 100}
PALETTES = 24
# Rendered at twice the side, then averaged: edges without stairs.
FINE = 2 * SIDE

Colours = NDArray[np.floating[Any]]


class Habit(NamedTuple):
    """What is usual for a family; the picture's own draw scatters around it."""

    periods: float
    """Periods of the pattern over half a side."""
    slant: float
    """Rotation in radians."""
    palette: int
    """Number of the preferred palette, out of PALETTES around the colour wheel."""


HABITS = {
    "bricks": Habit(2.6, 0.0, 0),
    "checks": Habit(1.8, 0.8, 2),
    "dots": Habit(3.1, 0.3, 4),
    "flowers": Habit(1.8, 0.5, 6),
    "honeycomb": Habit(3.1, 0.2, 8),
    "mazes": Habit(2.2, 0.8, 10),
    "mosaic": Habit(1.7, 0.0, 12),
    "rings": Habit(1.6, 0.4, 14),
    "scales": Habit(2.5, 0.0, 16),
    "spirals": Habit(1.3, 0.3, 18),
    "stars": Habit(2.1, 0.0, 20),
    "zigzags": Habit(2.3, 1.2, 22),
}


class DemoFolders(NamedTuple):
    """Class folders of JPEGs of 96 x 96 pixels."""

    train: Path
    """4,800 images, 400 of each of the 12 classes."""
    test: Path
    """1,200 images, 100 of each class."""


def palette(number: int) -> Colours:
    """Five colours, from dark to light, as sRGB float32 (5, 3) in [0, 1].

    Built in OKLCH (lightness, chroma, hue), where equal steps look equal: the base hue is the
    palette's place on the colour wheel, the accents stand beside or across it.
    """
    hue = 360 * number / PALETTES
    beside, across = ((40, 190), (-35, 150), (60, 240))[number % 3]
    tones = np.array(
        [
            [0.27, 0.06, hue],
            [0.47, 0.13, hue + 15],
            [0.66, 0.15, hue + beside],
            [0.80, 0.13, hue + across],
            [0.95, 0.03, hue + across + 20],
        ]
    )
    lightness, chroma, angle = tones[:, 0], tones[:, 1], np.deg2rad(tones[:, 2])
    a, b = chroma * np.cos(angle), chroma * np.sin(angle)
    # Oklab to linear sRGB: the two matrices of its definition.
    cone = np.stack(
        [
            lightness + 0.3963377774 * a + 0.2158037573 * b,
            lightness - 0.1055613458 * a - 0.0638541728 * b,
            lightness - 0.0894841775 * a - 1.2914855480 * b,
        ]
    )
    linear = (
        np.array(
            [
                [4.0767416621, -3.3077115913, 0.2309699292],
                [-1.2684380046, 2.6097574011, -0.3413193965],
                [-0.0041960863, -0.7034186147, 1.7076147010],
            ]
        )
        @ cone**3
    ).clip(0, 1)
    curved = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.asarray(curved.T, dtype=np.float32)


def smooth_noise(rng: np.random.Generator, cells: int) -> Plane:
    """Smooth random hills, (FINE, FINE) in about [-1, 1], with `cells` bumps along an edge."""
    coarse = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((FINE, FINE), Image.Resampling.BICUBIC), dtype=np.float32)


def pattern_plane(
    x: Plane, y: Plane, habit: Habit, rng: np.random.Generator
) -> tuple[Plane, Plane]:
    """Picture coordinates in [-1, 1] to pattern coordinates: scaled, turned, stretched, warped."""
    periods = habit.periods * np.exp(rng.uniform(-0.25, 0.25))
    angle = habit.slant + rng.uniform(-0.5, 0.5)
    stretch = np.exp(rng.uniform(-0.15, 0.15))
    warp = rng.uniform(0, 0.12)
    x = x + warp * smooth_noise(rng, 4)
    y = y + warp * smooth_noise(rng, 4)
    cos, sin = periods * np.cos(angle), periods * np.sin(angle)
    shift_x, shift_y = rng.uniform(0, 64, 2)
    return (
        np.asarray((cos * x + sin * y) * stretch + shift_x, dtype=np.float32),
        np.asarray((cos * y - sin * x) / stretch + shift_y, dtype=np.float32),
    )


def carrier(x: Plane, y: Plane, rng: np.random.Generator) -> tuple[Plane, Plane, Plane]:
    """The thing that carries the pattern: (mask, shadow, light), each (FINE, FINE).

    Mask and shadow are in [0, 1]; light is a lightness offset that makes the thing look round.
    Half of the pictures have no edge: the pattern fills them.
    """
    tilt = rng.uniform(0, 2 * np.pi)
    slope = x * np.cos(tilt) + y * np.sin(tilt)
    if rng.random() < 0.5:
        return np.ones_like(x), np.zeros_like(x), np.float32(rng.uniform(0, 0.12)) * slope
    u, v = x - rng.uniform(-0.25, 0.25), y - rng.uniform(-0.25, 0.25)
    size = rng.uniform(0.75, 1.0)
    angle = np.arctan2(v, u)
    squareness = rng.choice([2.0, 2.0, 4.0, 8.0])
    radius = (np.abs(u) ** squareness + np.abs(v) ** squareness) ** (1 / squareness)
    for harmonic in (2, 3, 5):
        bump = rng.uniform(0, 0.22) / harmonic
        radius = radius * (1 + bump * np.cos(harmonic * angle + rng.uniform(0, 6)))
    edge = np.asarray(radius - size, dtype=np.float32)
    light = np.float32(0.14) * slope - np.float32(0.2) * np.clip(radius / size, 0, 1) ** 4 + 0.05
    drop = np.asarray(
        radius + 0.09 * (np.cos(tilt) * u + np.sin(tilt) * v) / size - size, dtype=np.float32
    )
    return inside(edge, 0.02), 0.6 * inside(drop - 0.08, 0.3), np.asarray(light, dtype=np.float32)


def background(x: Plane, y: Plane, colours: Colours, rng: np.random.Generator) -> Colours:
    """What lies behind: a gradient between two colours with hills and bokeh, (3, FINE, FINE)."""
    tilt = rng.uniform(0, 2 * np.pi)
    blend = 0.5 + 0.35 * (x * np.cos(tilt) + y * np.sin(tilt))
    blend += rng.uniform(0, 0.3) * smooth_noise(rng, int(rng.integers(3, 9)))
    for _ in range(int(rng.integers(0, 4))):
        radius = np.hypot(x - rng.uniform(-1, 1), y - rng.uniform(-1, 1))
        blend += rng.uniform(-0.35, 0.35) * inside(radius - rng.uniform(0.08, 0.35), 0.06)
    return mix(colours[0], colours[1], np.clip(blend, 0, 1))


def mix(under: Colours, over: Colours, weight: Plane) -> Colours:
    """(3, FINE, FINE): `under` where weight (FINE, FINE) is 0, `over` where it is 1.

    `under` and `over` are single colours (3, 1, 1) or pictures (3, FINE, FINE).
    """
    return np.asarray(under + (over - under) * weight, dtype=np.float32)


def render(family: str, split: str, index: int) -> NDArray[np.uint8]:
    """Picture `index` of a class: uint8 RGB (96, 96, 3), the same on every call.

    Raises `KeyError` for an unknown class or split.
    """
    key = (VERSION, list(PER_CLASS).index(split), CLASSES.index(family), index)
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
    axis = (np.arange(FINE, dtype=np.float32) + np.float32(0.5)) / np.float32(SIDE) - 1
    x, y = np.meshgrid(axis, axis)
    habit = HABITS[family]
    number = round(habit.palette + rng.normal(0, 2)) % PALETTES
    colours = palette(number)[:, :, None, None]
    # Figure and base differ by two steps of lightness at least, in either polarity.
    base, figure = ((0, 2), (0, 3), (0, 4), (1, 3), (1, 4), (2, 4))[rng.integers(6)]
    if rng.random() < 0.5:
        base, figure = figure, base
    rest = [c for c in rng.permutation(5) if c not in (base, figure)]

    layer = FAMILIES[family](*pattern_plane(x, y, habit, rng), rng)
    mask, shadow, light = carrier(x, y, rng)
    ink = mix(colours[figure], colours[rest[0]], layer.accent)
    thing = mix(colours[base], ink, layer.cover * np.float32(rng.uniform(0.75, 1)))
    lightness = light + np.float32(rng.uniform(0, 0.2)) * layer.tone
    thing = np.clip(thing * (1 + lightness), 0, 1)
    behind = background(x, y, colours[rest[1:]], rng) * (1 - shadow)
    fine = mix(behind, thing, mask)
    rows = fine[:, ::2] + fine[:, 1::2]
    picture = (rows[:, :, ::2] + rows[:, :, 1::2]).transpose(1, 2, 0) / 4
    picture = picture + rng.normal(0, rng.uniform(0.0, 0.015), (SIDE, SIDE, 1))
    return np.asarray(picture.clip(0, 1) * 255 + 0.5, dtype=np.uint8)


def render_class(folder: Path, family: str, split: str, count: int) -> None:
    """Write pictures 0..count-1 of one class and split to `folder`/<split>/<family>/NNNN.jpg."""
    target = folder / split / family
    target.mkdir(parents=True)
    for index in range(count):
        image = Image.fromarray(render(family, split, index))
        image.save(target / f"{index:04d}.jpg", quality=92)


def demo_folder() -> Path:
    """Where the demo images are rendered to, unless another folder is named."""
    return cache_folder() / f"demo-{VERSION}"


def ensure_demo(root: Path | None = None, processes: int = 0) -> DemoFolders:
    """Render the demo set into `root` (the cache folder by default) unless it is there already.

    The set appears whole or not at all: it is rendered beside `root` and renamed into place, so
    an interrupted run leaves nothing that looks finished, and of several processes that render at
    once the first wins and the others take its files (ranks that wait for one save the work).
    `processes` 0 takes every CPU. In the cache folder a set that is not as it was rendered is
    rendered anew: it was damaged, or is another user's.

    Raises `ConfigError` when the folder cannot be written, or exists and is not a demo set.
    """
    folder = demo_folder() if root is None else root
    folders = DemoFolders(folder / "train", folder / "test")
    if root is None and folder.exists() and not _as_rendered(folder):
        _move_away(folder)
    if folders.train.is_dir() and folders.test.is_dir():
        return folders
    # Imported on demand: it brings torch, which the rendering processes do without.
    from fastmoco.machine.host import machine_cores

    staging: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        staging.chmod(0o755)  # mkdtemp makes it private, the finished set is not
        _render_all(staging, processes or machine_cores())
        (staging / DIGEST).write_text(_digest(staging))
        staging.rename(folder)
    except OSError as error:
        # Renaming onto a folder that another process has filled meanwhile fails: its files do.
        if not (folders.train.is_dir() and folders.test.is_dir()):
            raise ConfigError(f"Cannot render the demo images into {folder}: {error}.") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
    return folders


def _digest(folder: Path) -> str:
    """A hash of the names and the bytes of all pictures. Raises `OSError` where one is none."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.jpg")):
        data = durable.read_regular(path)
        digest.update(f"{path.relative_to(folder)} {len(data)} ".encode() + data)
    return digest.hexdigest()


def _as_rendered(folder: Path) -> bool:
    """Whether the set has the digest in it. One of an older version, without any, gets it now."""
    try:
        now = _digest(folder)
        if not (folder / DIGEST).exists():
            (folder / DIGEST).write_text(now)
        return durable.read_regular(folder / DIGEST) == now.encode()
    except OSError:
        return False


def _move_away(folder: Path) -> None:
    """Free the name of a damaged set and delete it; another process may do the same."""
    with contextlib.suppress(OSError):
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        folder.rename(aside / folder.name)
        shutil.rmtree(aside, ignore_errors=True)


def _render_all(folder: Path, processes: int) -> None:
    """Render every class and split, the larger jobs first."""
    with in_parallel(many=True, workers=processes) as pool:
        jobs = [
            pool.submit(render_class, folder, family, split, count)
            for split, count in PER_CLASS.items()
            for family in CLASSES
        ]
        for job in jobs:
            job.result()


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m fastmoco.data.sources.demo --out DIR`; exit code 2 where it cannot be written."""
    parser = CommandParser(description="Render the demo images as class folders.")
    parser.add_argument("--out", type=Path, default=None, help="default: the cache folder")
    try:
        folders = ensure_demo(parser.parse_args(arguments).out)
    except ConfigError as error:
        print(f"fastmoco: {error}", file=sys.stderr)
        return 2
    print(f"{folders.train}\n{folders.test}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
