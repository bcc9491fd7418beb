"""One image as it stands in a pack: made smaller where it is larger than asked, else its own bytes.

What is made smaller becomes a JPEG. Only images of 8 bits without transparency are: a JPEG cannot
hold the others, which stay as they are.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image

from fastmoco.data.decode import BadImage, decode, image_size, is_complete_jpeg, jpeg_header
from fastmoco.data.pixels.deep import stored_or_bad
from fastmoco.data.pixels.rgb import ORIENTATION, exif_orientation, to_rgb
from fastmoco.data.pixels.rule import PixelRule
from fastmoco.data.pixels.stored import NPY_START, TIFF_STARTS, is_deep_file
from fastmoco.data.reader import read_sample
from fastmoco.data.sources.source import Source

# A JPEG decoder halves a picture at next to no cost. Down to twice the final size that is done
# first: the 40 to 60 dB that it costs there are far above what quality 90 leaves.
DRAFT = 2
SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "TIFF": ".tif", "BMP": ".bmp"}
SUFFIXES |= {"GIF": ".gif", "PPM": ".ppm", "AVIF": ".avif", "JPEG2000": ".tif"}


@dataclass(frozen=True)
class Size:
    """What `fastmoco pack` makes of images."""

    short_side: int
    """Pixels of the shorter side at most."""
    quality: int
    """Of the JPEGs that are written, 1 to 95."""


class Packed(NamedTuple):
    """An image of a pack, or why there is none."""

    data: bytes
    suffix: str
    width: int
    height: int
    original: tuple[int, int]
    kept: bool
    """Whether the bytes are the original's."""
    bad: str = ""
    """Why the image cannot be used; empty if it can."""

    def digest(self) -> str:
        """SHA-256 of the bytes, in hex."""
        return hashlib.sha256(self.data).hexdigest()


def shrink_chunk(
    samples: Sequence[int], source: Source, size: Size, rule: PixelRule
) -> list[Packed]:
    """The unit of work of one process; not in `__main__`, where that would not find it."""
    return [_packed(source, sample, size, rule) for sample in samples]


def _packed(source: Source, sample: int, size: Size, rule: PixelRule) -> Packed:
    try:
        data = read_sample(source, sample)
    except BadImage as bad:
        return Packed(b"", "", 0, 0, (0, 0), False, str(bad))
    return shrink(data, size, rule)


def shrink(data: bytes, size: Size, rule: PixelRule) -> Packed:
    """The encoded image for a pack. Never raises for bad bytes: the reason is in `bad`.

    An EXIF orientation is carried over, so that `data.exif` means what it meant before.
    """
    try:
        width, height = image_size(data, rule.max_pixels)
        if rule.channels not in (1, 3) or is_deep_file(data):
            return _as_stored(data, (width, height), rule)
        if min(width, height) > size.short_side:
            with Image.open(io.BytesIO(data)) as image:
                if _fits_a_jpeg(image):
                    return _smaller(image, size, rule)
        return _as_it_is(data, (width, height), rule)
    except BadImage as bad:
        return Packed(b"", "", 0, 0, (0, 0), False, str(bad))
    except Exception as error:  # PIL raises nearly every type on hostile bytes
        return Packed(b"", "", 0, 0, (0, 0), False, f"{type(error).__name__}: {error}")


def _fits_a_jpeg(image: Image.Image) -> bool:
    """Whether the pixels are those of a JPEG once they are RGB or gray."""
    return image.mode in ("L", "RGB", "P", "CMYK", "YCbCr", "1") and not (
        image.has_transparency_data
    )


def _as_it_is(data: bytes, size: tuple[int, int], rule: PixelRule) -> Packed:
    """The original bytes. Raises `BadImage` where they do not decode."""
    header = jpeg_header(data)
    if header is None or not header.plain or not is_complete_jpeg(data, header):
        decode(data, rule)
    with Image.open(io.BytesIO(data)) as image:
        suffix = SUFFIXES.get(image.format or "", f".{(image.format or 'bin').lower()}")
    return Packed(data, suffix, *size, size, True)


def _as_stored(data: bytes, size: tuple[int, int], rule: PixelRule) -> Packed:
    """The original bytes of an NPY file, or of a picture with more than 8 bits or other channels.

    Raises `BadImage` where they do not decode.
    """
    stored_or_bad(data, rule)
    kinds = {NPY_START: ".npy", **dict.fromkeys(TIFF_STARTS, ".tif"), b"\x89PNG": ".png"}
    suffix = next((kinds[start] for start in kinds if data.startswith(start)), ".pgm")
    return Packed(data, suffix, *size, size, True)


def _smaller(image: Image.Image, size: Size, rule: PixelRule) -> Packed:
    width, height = original = image.size
    scale = size.short_side / min(original)
    target = max(1, round(width * scale)), max(1, round(height * scale))
    image.draft(image.mode, (DRAFT * target[0], DRAFT * target[1]))
    orientation = exif_orientation(image)
    if image.mode == "L":
        image.load()
        pixels = image
    else:
        pixels = to_rgb(image, PixelRule(rule.max_pixels, rule.alpha_over))
    if image.format == "TIFF" and (pixels.width > pixels.height) != (width > height):
        target = target[1], target[0]  # PIL has turned it
    exif = Image.Exif()
    if orientation != 1:
        exif[ORIENTATION] = orientation
    file = io.BytesIO()
    pixels.resize(target, Image.Resampling.LANCZOS).save(
        file, "JPEG", quality=size.quality, exif=exif
    )
    return Packed(file.getvalue(), ".jpg", *target, original, False)
