"""The five shapes of the rendered set: which points are inside, their area, their keypoints.

A shape lies in a plane of its own: u to the right, v down, within a circle of radius 1 around 0. A
`Pose` puts it into a picture. A pixel is inside if its centre is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.floating[Any]]
Points = NDArray[np.float64]
KEYPOINTS = ("centre", "top", "right", "bottom", "left")
"""In a mirror `left` and `right` change places, as a person's do."""
HOLE = 0.5
NOTCH = 0.45
SQUARE = 0.85


class Shape(NamedTuple):
    """One class of the set."""

    inside: Callable[[Plane, Plane], NDArray[np.bool_]]
    """u, v to whether a point belongs to the shape."""
    area: float
    keypoints: tuple[tuple[float, float], ...]
    """u, v of each of `KEYPOINTS`."""


def polygon(corners: Points) -> Callable[[Plane, Plane], NDArray[np.bool_]]:
    """Points inside of a polygon (n, 2): those from which a ray crosses its edges an odd time."""

    def inside(u: Plane, v: Plane) -> NDArray[np.bool_]:
        odd = np.zeros(u.shape, bool)
        for (u1, v1), (u2, v2) in zip(corners, np.roll(corners, -1, 0), strict=True):
            if v1 != v2:
                odd ^= ((v1 > v) != (v2 > v)) & (u < u1 + (v - v1) / (v2 - v1) * (u2 - u1))
        return odd

    return inside


def polygon_area(corners: Points) -> float:
    """The shoelace formula."""
    u, v = corners.T
    return abs(float(u @ np.roll(v, -1) - v @ np.roll(u, -1))) / 2


def _star() -> Points:
    angles = np.arange(10) * math.pi / 5
    radius = np.where(np.arange(10) % 2 == 0, 1.0, NOTCH)
    return np.stack([radius * np.sin(angles), -radius * np.cos(angles)], 1)


_TRIANGLE = np.array([(0, -1), (0.95, 0.8), (-0.95, 0.8)])
_STAR = _star()
_TIP = (float(_STAR[2, 0]), float(_STAR[2, 1]))
_ROUND = ((0, 0), (0, -1), (1, 0), (0, 1), (-1, 0))

SHAPES: dict[str, Shape] = {
    "circle": Shape(lambda u, v: u**2 + v**2 <= 1, math.pi, _ROUND),
    "ring": Shape(
        lambda u, v: (u**2 + v**2 <= 1) & (u**2 + v**2 >= HOLE**2),
        math.pi * (1 - HOLE**2),
        _ROUND,
    ),
    "square": Shape(
        lambda u, v: np.maximum(abs(u), abs(v)) <= SQUARE,
        4 * SQUARE**2,
        ((0, 0), (0, -SQUARE), (SQUARE, 0), (0, SQUARE), (-SQUARE, 0)),
    ),
    "star": Shape(
        polygon(_STAR),
        polygon_area(_STAR),
        ((0, 0), (0, -1), _TIP, (0, NOTCH), (-_TIP[0], _TIP[1])),
    ),
    "triangle": Shape(
        polygon(_TRIANGLE),
        polygon_area(_TRIANGLE),
        ((0, 0.2), (0, -1), (0.95, 0.8), (0, 0.8), (-0.95, 0.8)),
    ),
}


class Pose(NamedTuple):
    """Where a shape lies in a picture, in pixels from its left and top edges."""

    x: float
    y: float
    radius: float
    angle: float
    """Clockwise, in radians."""
    stretch: float
    """How much wider than high."""

    def window(self, width: int, height: int) -> tuple[slice, slice]:
        """Rows and columns of a picture in which the shape may be."""
        reach = max(self._wide, self._high) + 1
        spans = ((self.y, height), (self.x, width))
        rows, columns = (
            slice(max(0, int(at - reach)), min(side, int(at + reach) + 1)) for at, side in spans
        )
        return rows, columns

    def plane(self, window: tuple[slice, slice], fine: int = 1) -> tuple[Plane, Plane]:
        """u and v of the centre of each pixel, or of `fine` times as many in each direction."""
        y, x = (
            (np.arange(span.start * fine, span.stop * fine) + 0.5) / fine - at
            for span, at in zip(window, (self.y, self.x), strict=True)
        )
        y = y[:, None]
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        return (cos * x + sin * y) / self._wide, (cos * y - sin * x) / self._high

    def points(self, places: tuple[tuple[float, float], ...]) -> Points:
        """x, y of points (n, 2) given as u, v."""
        u, v = np.array(places).T * [[self._wide], [self._high]]
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        return np.stack([self.x + cos * u - sin * v, self.y + sin * u + cos * v], 1)

    def area(self, shape: Shape) -> float:
        """Square pixels of the whole shape."""
        return shape.area * self._wide * self._high

    @property
    def _wide(self) -> float:
        return self.radius * math.sqrt(self.stretch)

    @property
    def _high(self) -> float:
        return self.radius / math.sqrt(self.stretch)
