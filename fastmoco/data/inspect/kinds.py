"""What a picture is by its own bytes: format, mode, bits, channels, orientation."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from PIL import Image

from fastmoco.data.pixels.rgb import exif_orientation
from fastmoco.data.pixels.rule import BadImage
from fastmoco.data.pixels.stored import (
    NPY_START,
    TIFF_STARTS,
    is_deep,
    npy_header,
    require_tifffile,
)

# Channels of PIL's modes where these are not the letters of the mode.
_CHANNELS = {"1": 1, "P": 3, "PA": 4, "LA": 2, "La": 2, "RGBa": 4, "RGBX": 4, "CMYK": 4}
_WITHOUT_ALPHA = {"PA": 3, "LA": 1, "La": 1, "RGBA": 3, "RGBa": 3, "RGBX": 3, "CMYK": 3}
_ALPHA = (1, 2)  # of TIFF's ExtraSamples: associated and unassociated
# So many gray pages of one TIFF are taken for channels; fewer are pages.
_PAGES_FROM = 4


class Kind(NamedTuple):
    """What the first bytes of a picture say."""

    format: str
    """JPEG, PNG, ..., NPY."""
    mode: str
    """PIL's mode, or the type of the numbers of TIFF and NPY."""
    bits: int
    """Of a value."""
    channels: int
    """With transparency."""
    colours: int
    """Without transparency; 3 for palettes and CMYK, which become RGB."""
    orientation: int
    """Of EXIF, 1 to 8; 1 is upright."""


def kind_of(data: bytes) -> Kind:
    """The kind of encoded bytes. Raises `BadImage` where they do not say."""
    try:
        if data.startswith(NPY_START):
            return _npy(data)
        try:
            with Image.open(io.BytesIO(data)) as image:
                tiff = image.format == "TIFF"
                if not (tiff and is_deep(image, data)):
                    return _by_pil(image, data)
        except Exception:
            if not data.startswith(TIFF_STARTS):
                raise
        return _tiff(data)
    except BadImage:
        raise
    except Exception as error:  # decoders raise nearly every type on hostile bytes
        raise BadImage(f"{type(error).__name__}: {' '.join(str(error).split())}") from error


def _by_pil(image: Image.Image, data: bytes) -> Kind:
    mode = image.mode
    bits = 1 if mode == "1" else 8
    if is_deep(image, data):
        bits = 16 if image.format in ("PNG", "PPM") or mode.startswith("I;16") else 32
    if image.format == "PNG" and bits == 16 and mode == "RGBA":
        channels = 2 if data[25] == 4 else 4  # PIL opens gray with alpha of 16 bits as RGBA
        colours = channels - 1
    else:
        channels = _CHANNELS.get(mode, 1 if mode[0] in "IF" else len(mode))
        colours = _WITHOUT_ALPHA.get(mode, channels)
    return Kind(image.format or "?", mode, bits, channels, colours, exif_orientation(image))


def _npy(data: bytes) -> Kind:
    """The channels are the shorter of the first and the last axis."""
    shape, _, dtype, _ = npy_header(data)
    channels = min(shape[0], shape[2]) if len(shape) == 3 else 1
    return Kind("NPY", str(dtype), 8 * dtype.itemsize, channels, channels, 1)


def _tiff(data: bytes) -> Kind:
    with require_tifffile().TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        channels, bits = int(page.samplesperpixel), int(page.bitspersample)
        if channels == 1 and len(file.pages) >= _PAGES_FROM:
            channels = len(file.pages)
        alpha = sum(int(kind) in _ALPHA for kind in page.extrasamples)
        return Kind("TIFF", str(np.dtype(page.dtype)), bits, channels, channels - alpha, 1)


def channels_for(colours: Mapping[int, int]) -> int:
    """`data.channels` for pictures of so many colours each.

    1 where 99 of 100 pictures are gray, 3 where they are gray and RGB; another number where most
    pictures have it. colours: pictures by number of colours, not empty.
    """
    most, _ = Counter(colours).most_common(1)[0]
    if most not in (1, 3):
        return most
    return 1 if colours.get(1, 0) >= 0.99 * sum(colours.values()) else 3
