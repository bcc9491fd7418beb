"""From encoded bytes to RGB: the one decoder of training, evaluation and pictures.

Also what the bytes say about themselves: size, and whether any JPEG decoder reads them alike.

A JPEG is plain when its components are gray or YCbCr, its process is baseline or progressive, and
an end marker follows its last scan. Decoders agree on plain files. All others (other formats, CMYK
and RGB JPEGs, arithmetic coding, cut-off files) are left to PIL, whose reading is the reference.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastmoco.data.pixels.deep import UNEXPECTED, stored_or_bad
from fastmoco.data.pixels.rgb import exif_orientation, to_rgb
from fastmoco.data.pixels.rule import BadImage as BadImage
from fastmoco.data.pixels.rule import PixelRule, check_pixels
from fastmoco.data.pixels.stored import (
    NPY_START,
    TIFF_STARTS,
    is_deep,
    npy_header,
    npy_size,
    tiff_size,
)

IMAGE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".pjpeg",
    ".png",
    ".webp",
    ".bmp",
    ".ppm",
    ".pgm",
    ".tif",
    ".tiff",
    ".gif",
    ".avif",
    ".npy",
)
"""How the name of an image ends, in lower case, in every source and evaluation."""
JPEG_START = b"\xff\xd8"
_END = b"\xff\xd9"
_SCAN = b"\xff\xda"
_QUANTIZATION = b"\xff\xdb"
_FRAMES = frozenset(
    {*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)}
)
_HUFFMAN_8_BIT = frozenset({0xC0, 0xC1, 0xC2})
_ADOBE = 0xEE
_YCBCR = 1
_EXIF = b"Exif\0\0"
_EXIF_WITHIN = 1 << 18  # behind a JFIF header or a colour profile, each at most 64 KiB


@dataclass(frozen=True)
class JpegHeader:
    """Size in pixels, and whether the frame is one that all decoders read alike."""

    width: int
    height: int
    plain: bool
    end: int
    """Where the frame's segment ends: the scans come behind it, a thumbnail mostly before it."""
    quantized: bool
    """Whether quantization tables come before the frame, where nearly every file has them."""


def jpeg_header(data: bytes) -> JpegHeader | None:
    """Header of JPEG bytes, of which the first 64 KiB mostly suffice; None if there is none."""
    if data[:2] != JPEG_START:
        return None
    at, adobe, quantized = 2, -1, False
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == _ADOBE and data[at + 4 : at + 9] == b"Adobe" and length >= 14:
            adobe = data[at + 15]
        quantized |= marker == _QUANTIZATION[1]
        if marker in _FRAMES:
            end = at + 2 + length
            frame = data[at + 4 : end]
            if len(frame) < 9:
                return None
            return _frame(frame, adobe, marker in _HUFFMAN_8_BIT, end, quantized)
        if marker == _SCAN[1] or length < 2:
            return None
        at += 2 + length
    return None


def _frame(frame: bytes, adobe: int, common_process: bool, end: int, quantized: bool) -> JpegHeader:
    """Reads the payload of a start-of-frame segment."""
    components = frame[5]
    identifiers = frame[6::3][:components]
    luminance_chrominance = adobe == _YCBCR or (adobe < 0 and identifiers != b"RGB")
    plain = (
        common_process
        and frame[0] == 8
        and (components == 1 or (components == 3 and luminance_chrominance))
    )
    width, height = int.from_bytes(frame[3:5], "big"), int.from_bytes(frame[1:3], "big")
    return JpegHeader(width, height, plain and width > 0 and height > 0, end, quantized)


def is_complete_jpeg(data: bytes, header: JpegHeader) -> bool:
    """Whether it has tables, and an end marker follows the last scan.

    No marker occurs inside entropy-coded data. Without tables of its own a picture is given those
    of another one by nvJPEG, which says nothing.
    """
    scan = data.find(_SCAN, header.end)  # the scan and the end of a thumbnail are not its own
    if scan < 0 or not (header.quantized or data.find(_QUANTIZATION, header.end, scan) >= 0):
        return False
    # Most files end with the marker; searching a whole file for its last scan takes 30 us.
    return data.endswith(_END) or data.rfind(_END) > data.rfind(_SCAN)


def image_size(data: bytes, max_pixels: int) -> tuple[int, int]:
    """Width and height of encoded bytes. Raises `BadImage` for no image or too many pixels."""
    header = jpeg_header(data)
    if header is not None and header.width and header.height:
        size = header.width, header.height
    else:
        try:
            size = _size(data)
        except BadImage:
            raise
        except Exception as error:  # PIL's plugins raise nearly every type on hostile bytes
            raise BadImage(_reason(data, error)) from error
    check_pixels(size, max_pixels)
    return size


def _size(data: bytes) -> tuple[int, int]:
    if data.startswith(NPY_START):
        return npy_size(npy_header(data)[0])
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except UnidentifiedImageError:
        if data.startswith(TIFF_STARTS):
            return tiff_size(data)
        raise


def decode(data: bytes, rule: PixelRule) -> Image.Image:
    """The image as 8-bit RGB, see `to_rgb`.

    Raises `BadImage` for bytes that PIL does not decode completely, and for more than 8 bits.
    """
    if data.startswith(NPY_START):
        values = stored_or_bad(data, rule)
        if values.dtype != np.uint8:
            raise BadImage(UNEXPECTED)
        return Image.fromarray(np.ascontiguousarray(values.transpose(1, 2, 0)))
    try:
        with Image.open(io.BytesIO(data)) as image:
            check_pixels(image.size, rule.max_pixels)
            if is_deep(image, data):
                raise BadImage(UNEXPECTED)
            return to_rgb(image, rule)
    except BadImage:
        raise
    except Exception as error:
        raise BadImage(_reason(data, error)) from error


def is_turned(data: bytes) -> bool:
    """Whether EXIF says that the image of a JPEG is to be turned or mirrored."""
    if _EXIF not in data[:_EXIF_WITHIN]:
        return False  # as most files: opening one takes 60 us
    try:
        with Image.open(io.BytesIO(data)) as image:
            return exif_orientation(image) != 1
    except Exception:
        return False  # decoding finds the reason


def _reason(data: bytes, error: Exception) -> str:
    if not data:
        return "empty file"
    if type(error).__name__ == "UnidentifiedImageError":
        return f"not an image: starts with {data[:8]!r}"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
