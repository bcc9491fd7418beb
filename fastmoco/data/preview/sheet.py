"""A page of pictures in columns, each with the parameters it was made with.

S side of a view in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from fastmoco.data.table import BRIGHTNESS, CONTRAST, HUE, SATURATION, ViewTable

# Smaller pictures are enlarged by a whole factor, so that pixels stay pixels.
SMALLEST = 96
_WIDTH = 176  # of a column at least, for its captions
_GAP = 8
_LINE = 14
_FONT = 11


@dataclass(frozen=True)
class Column:
    """Pictures below each other, uint8 (S, S, 3), and the lines of text below each of them."""

    title: str
    pictures: Sequence[NDArray[np.uint8]]
    captions: Sequence[Sequence[str]] = ()


def captions(table: ViewTable, sizes: Sequence[tuple[int, int]]) -> list[list[str]]:
    """Three lines on each row of `table`; `sizes` are width and height of the images."""
    found = []
    for row, (width, height) in enumerate(sizes):
        _, _, box_height, box_width = table.crop[row]
        share = 100 * box_height * box_width / (width * height)
        bright, contrast, saturation, hue = (
            table.factors[row, at] for at in (BRIGHTNESS, CONTRAST, SATURATION, HUE)
        )
        jitter = f"bri {bright:.2f} con {contrast:.2f} sat {saturation:.2f} hue {hue:+.2f}"
        others = ["gray"] * bool(table.gray[row])
        others += [f"blur {table.sigma[row]:.2f} px"] * bool(table.sigma[row])
        found.append(
            [
                f"{share:.0f} % of the image{', flipped' * bool(table.flip[row])}",
                jitter if table.jitter[row] else "colours as they are",
                ", ".join(others) or "neither gray nor blurred",
            ]
        )
    return found


def sheet(columns: Sequence[Column], side: int) -> Image.Image:
    """The page: titles on top, each picture at least SMALLEST pixels wide."""
    font = ImageFont.load_default(_FONT)
    drawn = side * max(1, -(-SMALLEST // side))
    width = max(drawn, _WIDTH)
    lines = max((len(text) for column in columns for text in column.captions), default=0)
    rows = max(len(column.pictures) for column in columns)
    height = drawn + lines * _LINE + _GAP
    page = Image.new(
        "RGB", (len(columns) * (width + _GAP) + _GAP, 2 * _GAP + _LINE + rows * height), "white"
    )
    pen = ImageDraw.Draw(page)
    for x, column in enumerate(columns):
        left = _GAP + x * (width + _GAP)
        pen.text((left, _GAP), column.title, fill="black", font=ImageFont.load_default(_FONT + 2))
        for y, picture in enumerate(column.pictures):
            top = 2 * _GAP + _LINE + y * height
            large = Image.fromarray(picture).resize((drawn, drawn), Image.Resampling.NEAREST)
            page.paste(large, (left, top))
            for number, line in enumerate(column.captions[y] if column.captions else ()):
                place = left, top + drawn + number * _LINE
                pen.text(place, line, fill="#444444", font=font)
    return page
