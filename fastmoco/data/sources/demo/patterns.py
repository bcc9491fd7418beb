"""The twelve pattern families of the demo set, as functions of the plane.

A family fixes the geometry (spirals, bricks, ...); a generator `rng` draws what distinguishes one
picture of the family from another: proportions, counts, jitter. Coordinates come in periods of the
pattern, so a family knows neither the size of the picture nor its rotation nor its colours.

Every family takes x, y: float (S, S), and gives a `Layer` of float (S, S) arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.floating[Any]]
TABLE = 64
SOFT = 0.035


class Layer(NamedTuple):
    """What a family paints: three fields over the picture."""

    cover: Plane
    """0 shows the base colour, 1 the figure's colour."""
    accent: Plane
    """Inside the figure: 0 shows the figure's colour, 1 the accent colour."""
    tone: Plane
    """Lightness offset in [-1, 1], constant within a cell: hand-made rather than printed."""


class Cells(NamedTuple):
    """The plane cut into unit squares: local coordinates and per-cell random numbers."""

    u: Plane
    """Horizontal coordinate in [-0.5, 0.5) from the centre of the cell."""
    v: Plane
    """Vertical coordinate, likewise."""
    random: Plane
    """(4, S, S), uniform in [0, 1), the same for all pixels of a cell."""


def inside(distance: Plane, soft: float = SOFT) -> Plane:
    """1 where distance < 0, 0 where it is > 0, linear over `soft` in between."""
    return np.asarray(np.clip(0.5 - distance / soft, 0, 1), dtype=np.float32)


def lookup(i: Plane, j: Plane, rng: np.random.Generator) -> Plane:
    """Four random numbers in [0, 1) for every pixel (4, S, S), functions of its cell (i, j)."""
    table = rng.random((4, TABLE * TABLE), dtype=np.float32)
    flat = (j.astype(np.int32) % TABLE) * TABLE + i.astype(np.int32) % TABLE
    return table[:, flat]


def cut(x: Plane, y: Plane, rng: np.random.Generator, brick_shift: float = 0.0) -> Cells:
    """Unit cells; every second row is shifted by `brick_shift`."""
    j = np.floor(y)
    x = x + brick_shift * (j % 2)
    i = np.floor(x)
    return Cells(x - i - 0.5, y - j - 0.5, lookup(i, j, rng))


def motif(
    x: Plane, y: Plane, rng: np.random.Generator, wander: float
) -> tuple[Plane, Plane, Plane]:
    """Polar coordinates (radius, angle) around one motif per cell, and the cell's numbers.

    Motifs stand off their cell's centre by up to `wander` and are turned at random.
    """
    cells = cut(x, y, rng, brick_shift=0.5 if rng.random() < 0.5 else 0.0)
    u = cells.u - wander * (2 * cells.random[0] - 1)
    v = cells.v - wander * (2 * cells.random[1] - 1)
    turn = 2 * np.pi * cells.random[2]
    return np.hypot(u, v), np.arctan2(v, u) + turn, cells.random


def dots(x: Plane, y: Plane, rng: np.random.Generator) -> Layer:
    radius, _, random = motif(x, y, rng, wander=0.12)
    size = rng.uniform(0.2, 0.3) * (0.75 + 0.5 * random[3])
    core = inside(radius - size * rng.uniform(0.3, 0.6)) * float(rng.random() < 0.3)
    return Layer(inside(radius - size), core, random[3] - 0.5)


def flowers(x: Plane, y: Plane, rng: np.random.Generator) -> Layer:
    radius, angle, random = motif(x, y, rng, wander=0.06)
    petals = int(rng.integers(5, 9))
    depth = rng.uniform(0.25, 0.45)
    outline = 0.42 * (1 - depth + depth * np.abs(np.cos(angle * petals / 2)))
    heart = inside(radius - rng.uniform(0.11, 0.16))
    return Layer(inside(radius - outline * (0.85 + 0.15 * random[3])), heart, random[3] - 0.5)


def stars(x: Plane, y: Plane, rng: np.random.Generator) -> Layer:
    radius, angle, random = motif(x, y, rng, wander=0.05)
    points = int(rng.integers(4, 7))
    # The angle folded into half a point: 0 at a tip, `half` in the notch between two tips.
    half = np.pi / points
    fold = half - np.abs((angle / (2 * half)) % 1 - 0.5) * 2 * half
    notch = rng.uniform(0.36, 0.5)
    # Straight edge from the tip (1, 0) to the notch, as the line n . p = n . tip.
    edge_x, edge_y = notch * np.sin(half), 1 - notch * np.cos(half)
    reach = radius * (edge_x * np.cos(fold) + edge_y * np.sin(fold)) / edge_x
    facet = (np.sin(angle * points) > 0).astype(np.float32) * float(rng.random() < 0.4)
    return Layer(inside(reach - 0.48 * (0.8 + 0.2 * random[3]), 0.06), facet, random[3] - 0.5)


def rings(x: Plane, y: Plane, rng: np.random.Generator) -> Layer:
    radius, _, random = motif(x, y, rng, wander=0.05)
    count = rng.uniform(2.2, 3.4)
    wave = np.cos(2 * np.pi * count * radius / 0.46 + np.pi * (rng.random() < 0.5))
    inner = inside(radius - 0.46)
    pupil = inside(radius - 0.46 / count / 2)
    return Layer(inside(-wave * 0.1, 0.08) * inner, pupil, random[3] - 0.5)


def spirals(x: Plane, y: Plane, rng: np.random.Generator) -> Layer:
    radius, angle, random = motif(x, y, rng, wander=0.05)
    arms = int(rng.integers(1, 3))
    turns = rng.uniform(2.0, 3.0)
    hand = 1.0 if rng.random() < 0.5 else -1.0
    wave = np.cos(hand * arms * angle + 2 * np.pi * turns * radius / 0.48)
    rim = inside(radius - 0.48)
    return Layer(inside(-wave * 0.1, 0.08) * rim, 1 - inside(radius - 0.3, 0.2), random[3] - 0.5)


def zigzags(x: Plane, y: Plane, rng: np.random.Generator) -> Layer:
    length, height = rng.uniform(0.9, 1.5), rng.uniform(0.5, 1.1)
    y = 1.6 * y + height * 2 * np.abs((x / length) % 1 - 0.5)
    row = np.floor(y)
    random = lookup(np.zeros_like(row), row, rng)
    width = rng.uniform(0.3, 0.6)
    return Layer(
        inside(np.abs(y - row - 0.5) - width / 2, 0.06),
        (row % 2) * float(rng.random() < 0.5),
        random[3] - 0.5,
    )


def checks(x: Plane, y: Plane, rng: np.random.Generator) -> Layer:
    ratio = rng.uniform(0.8, 1.25)
    i, j = np.floor(1.5 * x * ratio), np.floor(1.5 * y / ratio)
    random = lookup(i, j, rng)
    return Layer(np.asarray((i + j) % 2), (i % 2) * float(rng.random() < 0.4), random[3] - 0.5)


def bricks(x: Plane, y: Plane, rng: np.random.Generator) -> Layer:
    aspect = rng.uniform(0.42, 0.6)
    cells = cut(x * 1.1, y * 1.1 / aspect, rng, brick_shift=float(rng.uniform(0.35, 0.65)))
    mortar = rng.uniform(0.03, 0.07)
    gap = np.maximum(np.abs(cells.u) - 0.5 + mortar, (np.abs(cells.v) - 0.5) * aspect + mortar)
    return Layer(inside(gap), (cells.random[2] < 0.25).astype(np.float32), 2 * cells.random[3] - 1)


def honeycomb(x: Plane, y: Plane, rng: np.random.Generator) -> Layer:
    # The nearer of two rectangular lattices of centres is the hexagon a pixel belongs to.
    tall = np.float32(np.sqrt(3))
    x, y = 1.4 * x, 1.4 * y
    far, key_i, key_j = np.full_like(x, 9), x, y
    for shift in (0.0, 0.5):
        i, j = np.floor(x + shift), np.floor(y / tall + shift)
        u, v = x + shift - i - 0.5, (y / tall + shift - j - 0.5) * tall
        hexagon = np.maximum(np.abs(u), 0.5 * np.abs(u) + 0.5 * tall * np.abs(v))
        nearer = hexagon < far
        far = np.where(nearer, hexagon, far)
        key_i = np.where(nearer, i + TABLE * shift, key_i)
        key_j = np.where(nearer, j, key_j)
    random = lookup(key_i, key_j, rng)
    wall = rng.uniform(0.04, 0.1)
    drop = inside(far - 0.22) * (random[2] < rng.uniform(0, 0.6))
    return Layer(inside(far - 0.5 + wall), drop, random[3] - 0.5)


def mosaic(x: Plane, y: Plane, rng: np.random.Generator) -> Layer:
    # Voronoi cells of one jittered seed per unit square; the wall is where two seeds are as near.
    x, y = 1.2 * x, 1.2 * y
    i, j = np.floor(x), np.floor(y)
    table = rng.random((4, TABLE, TABLE), dtype=np.float32)
    first, second = np.full_like(x, 9), np.full_like(x, 9)
    tone = np.zeros_like(x)
    for di in (-1, 0, 1):
        for dj in (-1, 0, 1):
            ii, jj = i + di, j + dj
            seed = table[:, jj.astype(np.int32) % TABLE, ii.astype(np.int32) % TABLE]
            distance = np.hypot(ii + seed[0] - x, jj + seed[1] - y)
            second = np.minimum(second, np.maximum(first, distance))
            tone = np.where(distance < first, seed[3], tone)
            first = np.minimum(first, distance)
    wall = rng.uniform(0.06, 0.14)
    return Layer(inside(wall - (second - first)), (tone > 0.75).astype(np.float32), 2 * tone - 1)


def scales(x: Plane, y: Plane, rng: np.random.Generator) -> Layer:
    # Rows of discs half a period apart, each row lying over the one above it.
    x, y = 1.2 * x, 2.4 * y
    cover, tone = np.zeros_like(x), np.zeros_like(x)
    found = np.zeros(x.shape, dtype=bool)
    rim = rng.uniform(0.08, 0.16)
    shell = np.zeros_like(x)
    for row in (1, 0, -1):
        j = np.floor(y) + row
        shifted = x + 0.5 * (j % 2)
        i = np.floor(shifted)
        radius = np.hypot(shifted - i - 0.5, (y - j) / 2)
        here = (radius < 0.56) & ~found
        cover = np.where(here, inside(radius - 0.56 + rim), cover)
        shell = np.where(here, inside(radius - 0.25), shell)
        tone = np.where(here, lookup_once(i, j), tone)
        found |= here
    return Layer(cover, shell * float(rng.random() < 0.5), tone - 0.5)


def lookup_once(i: Plane, j: Plane) -> Plane:
    """A number in [0, 1) per cell from the cell alone, for families that visit a cell twice."""
    return np.asarray((np.sin(i * 12.9 + j * 78.2) * 437.5) % 1, dtype=np.float32)


def mazes(x: Plane, y: Plane, rng: np.random.Generator) -> Layer:
    # Truchet tiles: two quarter circles around opposite corners, mirrored at random.
    cells = cut(1.3 * x, 1.3 * y, rng)
    u = np.where(cells.random[0] < 0.5, cells.u, -cells.u)
    nearer = np.minimum(
        np.hypot(u - 0.5, cells.v - 0.5),
        np.hypot(u + 0.5, cells.v + 0.5),
    )
    width = rng.uniform(0.12, 0.2)
    track = np.abs(nearer - 0.5)
    core = inside(track - width / 3) * float(rng.random() < 0.5)
    return Layer(inside(track - width), core, np.zeros_like(x))


FAMILIES: dict[str, Callable[[Plane, Plane, np.random.Generator], Layer]] = {
    "bricks": bricks,
    "checks": checks,
    "dots": dots,
    "flowers": flowers,
    "honeycomb": honeycomb,
    "mazes": mazes,
    "mosaic": mosaic,
    "rings": rings,
    "scales": scales,
    "spirals": spirals,
    "stars": stars,
    "zigzags": zigzags,
}
