"""Executes rows of the table on pictures of any depth and number of channels, in float32.

The operations of the 8-bit backends without their roundings and clippings, so that nothing of a
16-bit picture is lost. Brightness, contrast, crop, blur and flip take any number of channels, with
one factor per view; saturation, hue and gray are for RGB.

S side of a view, C channels, planes are (C, S, S).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from fastmoco.data.pixels.banded import blur, resize
from fastmoco.data.pixels.deep import Deep, Float32, decode_deep
from fastmoco.data.pixels.rule import PixelRule
from fastmoco.data.table import BRIGHTNESS, CONTRAST, HUE, ViewTable

_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)[:, None, None]


def by_pil(part: Float32, height: int, width: int) -> Float32:
    """`resize` by PIL, plane by plane: float32 (c, H, W) to (c, height, width)."""
    planes = [Image.fromarray(plane) for plane in part]
    return np.stack(
        [np.asarray(one.resize((width, height), Image.Resampling.BILINEAR)) for one in planes]
    )


RESIZE: dict[str, Callable[[Float32, int, int], Float32]] = {"array": resize, "pil": by_pil}
"""Who resizes, by `data.backend`: all else is the same."""


class FloatCanvas:
    """Views of one size. One thread uses it at a time."""

    def __init__(self, side: int, recipe: str, channels: int, backend: str) -> None:
        self.side, self.recipe, self.channels = side, recipe, channels
        self.resize = RESIZE[backend]
        self.planes: Float32
        """(C, S, S) of the view at work."""

    def decode(self, data: bytes, rule: PixelRule) -> Deep:
        """See `decode_deep`."""
        return decode_deep(data, rule)

    def execute(self, image: Deep, table: ViewTable, row: int) -> Float32:
        """One view: float32 (S, S, C), of which 0..255 is the range of `data.intensity`."""
        found = self.resize(image.box(*table.crop[row].tolist()), self.side, self.side)
        self.planes = np.repeat(found, self.channels, axis=0) if len(found) == 1 else found
        gray_first = self.recipe == "v1"
        if table.gray[row] and gray_first:
            self.planes[:] = self.gray()
        if table.jitter[row]:
            for operation in table.order[row].tolist():
                self.colour(operation, float(table.factors[row, operation]))
        if table.gray[row] and not gray_first:
            self.planes[:] = self.gray()
        planes = blur(self.planes, float(table.sigma[row])) if table.sigma[row] else self.planes
        view = planes.transpose(1, 2, 0)
        return view[:, ::-1] if table.flip[row] else view

    def gray(self) -> Float32:
        """The luminance (1, S, S); of another number of channels than three, each one itself."""
        if len(self.planes) != 3:
            return self.planes
        luminance: Float32 = (self.planes * _LUMINANCE).sum(axis=0, keepdims=True)
        return luminance

    def colour(self, operation: int, factor: float) -> None:
        """One operation of the colour jitter, in place: x <- d + f (x - d).

        d is black for brightness; for contrast the mean of the luminance, or of each channel where
        there are not three; for saturation the luminance.
        """
        if operation == HUE:
            if factor:
                self.shift_hue(factor)
        elif operation == BRIGHTNESS:
            self.planes *= factor
        elif operation == CONTRAST or len(self.planes) == 3:
            other: Any = self.gray()
            if operation == CONTRAST:
                other = other.mean(axis=(1, 2), keepdims=True, dtype=np.float64)
            self.planes *= factor
            self.planes += (np.float32(1 - factor) * other).astype(np.float32)

    def shift_hue(self, turns: float) -> None:
        """HSV's hue by some turns; value and chroma stay as they are, also outside of 0..255."""
        red, green, blue = self.planes
        value, low = self.planes.max(axis=0), self.planes.min(axis=0)
        chroma = value - low
        apart = np.where(chroma > 0, chroma, np.float32(1))
        # Position on the hexagon: 0 at red, 2 at green, 4 at blue.
        place = np.where(red == value, green - blue, blue - red + 2 * apart)
        place = np.where((red != value) & (green != value), red - green + 4 * apart, place)
        place = place / apart + np.float32(6 * turns)
        for plane, offset in enumerate((5, 3, 1)):
            k = (place + np.float32(offset)) % np.float32(6)
            share = np.clip(np.minimum(k, 4 - k), 0, 1)
            self.planes[plane] = value - chroma * share
