"""Views of float pictures in float64, pixel by pixel from the definitions; shares no code.

H x W pixels, S side of a view, C channels.
"""

from __future__ import annotations

import colorsys
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmoco.data.table import BRIGHTNESS, CONTRAST, SATURATION, ViewTable

Float64 = NDArray[Any]


def resize_matrix(length: int, side: int) -> Float64:
    """(side, length): a triangle as wide as an output pixel, at least two input pixels."""
    step = length / side
    wide = max(step, 1.0)
    rows = []
    for out in range(side):
        centre = (out + 0.5) * step
        weights = [max(0.0, 1 - abs(j + 0.5 - centre) / wide) for j in range(length)]
        rows.append([weight / sum(weights) for weight in weights])
    return np.array(rows)


def resize(image: Float64, height: int, width: int) -> Float64:
    """(H, W, C) to (height, width, C)."""
    down, across = resize_matrix(image.shape[0], height), resize_matrix(image.shape[1], width)
    out: Float64 = np.einsum("yh,xw,hwc->yxc", down, across, image)
    return out


def box(sigma: float) -> list[float]:
    """A box with fractional ends whose variance is a third of sigma's; found by bisection."""

    def weights(radius: float) -> list[float]:
        whole = math.floor(radius)
        inner = 1 / (2 * radius + 1)
        outer = (radius - whole) * inner
        return [outer, *[inner] * (2 * whole + 1), outer]

    def variance(radius: float) -> float:
        found = weights(radius)
        return sum(w * (k - len(found) // 2) ** 2 for k, w in enumerate(found))

    low, high = 0.0, 40.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if variance(middle) < sigma**2 / 3 else (low, middle)
    return weights(low)


def blur(image: Float64, sigma: float) -> Float64:
    """Three boxes along x, then along y; the edge repeats."""
    kernel = box(sigma)
    reach = len(kernel) // 2
    for axis in (1, 0):
        for _ in range(3):
            padded = np.pad(
                image, [(reach, reach) if a == axis else (0, 0) for a in range(3)], "edge"
            )
            image = np.apply_along_axis(
                lambda line: np.convolve(line, kernel, "valid"), axis, padded
            )
    return image


def luminance(image: Float64) -> Float64:
    gray: Float64 = image @ np.array([0.299, 0.587, 0.114])
    return gray


def hue(image: Float64, turns: float) -> Float64:
    """By the standard library's HSV, which is for values from 0 on."""
    out = np.empty_like(image)
    for y, x in np.ndindex(*image.shape[:2]):
        h, s, v = colorsys.rgb_to_hsv(*(image[y, x] / 255))
        out[y, x] = 255 * np.array(colorsys.hsv_to_rgb((h + turns) % 1, s, v))
    return out


def colour(image: Float64, operation: int, factor: float) -> Float64:
    """One operation on (S, S, C)."""
    if operation == BRIGHTNESS:
        return image * factor
    rgb = image.shape[2] == 3
    if operation == CONTRAST:
        centre = luminance(image).mean() if rgb else image.mean(axis=(0, 1))
    elif operation == SATURATION:
        centre = luminance(image)[..., None]
    else:
        return hue(image, factor)
    blended: Float64 = centre + factor * (image - centre)
    return blended


def view(image: Float64, table: ViewTable, row: int, side: int, recipe: str) -> Float64:
    """One view of a picture that is mapped to 0..255: (H, W, C) to (S, S, C)."""
    top, left, height, width = table.crop[row].tolist()
    out = resize(image[top : top + height, left : left + width], side, side)
    operations = table.order[row].tolist() if table.jitter[row] else []
    gray = [-1] if table.gray[row] else []
    for operation in [*gray, *operations] if recipe == "v1" else [*operations, *gray]:
        if operation < 0:
            out = np.repeat(luminance(out)[..., None], 3, axis=2)
        elif image.shape[2] == 3 or operation in (BRIGHTNESS, CONTRAST):
            out = colour(out, operation, float(table.factors[row, operation]))
    if table.sigma[row] > 0:
        out = blur(out, float(table.sigma[row]))
    return out[:, ::-1] if table.flip[row] else out
