"""PIL executes rows of the table as the official pipeline does: the oracle, and `data.backend` pil.

Every operation is torchvision's on PIL images, hence uint8 after every one of them. Blur is PIL's
GaussianBlur with radius sigma, as in the official v2 pipeline (an approximation by box filters).

S side of a view.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageFilter
from torchvision.transforms import functional
from torchvision.transforms.functional import InterpolationMode

from fastmoco.data.decode import decode
from fastmoco.data.pixels.rule import PixelRule
from fastmoco.data.table import BRIGHTNESS, CONTRAST, HUE, SATURATION, UInt8, ViewTable

# Its annotations name tensors only, although it takes PIL images and is the reference on them.
F: Any = functional

COLOUR: dict[int, Callable[[Image.Image, float], Image.Image]] = {
    BRIGHTNESS: F.adjust_brightness,
    CONTRAST: F.adjust_contrast,
    SATURATION: F.adjust_saturation,
    HUE: F.adjust_hue,
}


def crop(image: Image.Image, table: ViewTable, row: int, side: int) -> Image.Image:
    """The row's box, resized with antialiased bilinear interpolation to side x side pixels."""
    top, left, height, width = table.crop[row].tolist()
    view: Image.Image = F.resized_crop(
        image, top, left, height, width, [side, side], InterpolationMode.BILINEAR
    )
    return view


def jitter(view: Image.Image, table: ViewTable, row: int) -> Image.Image:
    """Brightness, contrast, saturation and hue in the row's order, if the row says so."""
    if table.jitter[row]:
        for operation in table.order[row].tolist():
            factor = float(table.factors[row, operation])
            if operation != HUE or factor != 0:  # ColorJitter(hue=0) leaves hue out altogether
                view = COLOUR[operation](view, factor)
    return view


def gray(view: Image.Image, table: ViewTable, row: int) -> Image.Image:
    """Three equal channels, if the row says so."""
    return view.convert("L").convert("RGB") if table.gray[row] else view


def blur(view: Image.Image, table: ViewTable, row: int) -> Image.Image:
    """Gaussian blur with the row's sigma, none at 0."""
    if table.sigma[row] > 0:
        view = view.filter(ImageFilter.GaussianBlur(radius=float(table.sigma[row])))
    return view


def flip(view: Image.Image, table: ViewTable, row: int) -> Image.Image:
    """Mirrored horizontally, if the row says so."""
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if table.flip[row] else view


def execute(image: Image.Image, table: ViewTable, row: int, side: int, recipe: str) -> UInt8:
    """One view of an RGB image: uint8 (S, S, 3). recipe: `v1` or `v2`."""
    view = crop(image, table, row, side)
    colour = (gray, jitter) if recipe == "v1" else (jitter, gray)
    for operation in (*colour, blur, flip):
        view = operation(view, table, row)
    return np.asarray(view)


class PilExecutor:
    """The reference as `data.backend` pil: views of one size, by one recipe."""

    def __init__(self, side: int, recipe: str) -> None:
        self.side, self.recipe = side, recipe

    def decode(self, data: bytes, rule: PixelRule) -> Image.Image:
        """See `fastmoco.data.decode.decode`."""
        return decode(data, rule)

    def execute(self, image: Image.Image, table: ViewTable, row: int) -> UInt8:
        """See `execute`."""
        return execute(image, table, row, self.side, self.recipe)
