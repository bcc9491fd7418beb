"""The values that a file stores: any number of channels, of any depth, nothing rounded.

PNG of 16 bits, TIFF (by tifffile), NPY, and what PIL opens with 16 or 32 bits. Files of 8 bits come
from `to_rgb`, so that they are the same pixels as in a run on 8-bit RGB.

c channels of the file, C = `data.channels`, H x W pixels.
"""

from __future__ import annotations

import importlib.util
import io
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastmoco.data.pixels.rgb import ORIENTATION, exif_orientation, to_rgb
from fastmoco.data.pixels.rule import BadImage, PixelRule, check_pixels

Values = NDArray[Any]
NPY_START = b"\x93NUMPY"
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
INSTALL_TIFFFILE = "pip install 'fastmoco[tiff]'"
_DEEP_MODES = ("I", "F")  # and those that start with I; as I;16
_LUMINANCE = (0.299, 0.587, 0.114)
_ALPHA = (1, 2)  # of TIFF's ExtraSamples: associated and unassociated
_WHITE_IS_ZERO, _GRAY, _RGB = 0, 1, 2  # of TIFF's PhotometricInterpretation


def is_deep(image: Image.Image, data: bytes) -> bool:
    """Whether a file that PIL has opened stores more than 8 bits per sample.

    Of some formats PIL's mode does not tell: it reads colour of 16 bits as 8.
    """
    if image.mode.startswith(_DEEP_MODES):
        return True
    if image.format == "PNG":
        return data[24] == 16
    file: Any = image  # what formats have beyond an image
    if image.format == "TIFF":
        bits = file.tag_v2.get(258, 8)
        return bool(max(bits if isinstance(bits, tuple) else (bits,)) > 8)
    if image.format == "PPM":
        # The codec's last argument is the largest value; plain and one-bit files have none.
        limits = [tile.args[-1] for tile in file.tile if isinstance(tile.args, tuple)]
        return any(isinstance(limit, int) and limit > 255 for limit in limits)
    return False


def stored(data: bytes, rule: PixelRule) -> Values:
    """(C, H, W) as the file stores them: uint8 for 8 bits and fewer, else any type of number.

    Gray becomes three equal channels and RGB the luminance where `data.channels` asks for it. Any
    other difference is refused. Raises `BadImage`; any other exception is of a broken file.
    """
    if data.startswith(NPY_START):
        found = _npy(data, rule)
    elif data.startswith(TIFF_STARTS) and (rule.channels not in (1, 3) or is_deep_file(data)):
        found = _tiff(data, rule)
    else:
        found = _by_pil(data, rule)
    if found.dtype == np.bool_:
        found = found.astype(np.uint8) * np.uint8(255)
    if found.dtype.kind == "f" and not np.isfinite(found).all():
        raise BadImage("holds NaN or infinite values")
    return _as_channels(found, rule.channels)


def _as_channels(found: Values, channels: int) -> Values:
    if len(found) == channels:
        return found
    if len(found) == 1 and channels == 3:
        return np.broadcast_to(found, (3, *found.shape[1:]))
    if len(found) == 3 and channels == 1:
        if found.dtype == np.uint8:
            rgb = Image.fromarray(np.ascontiguousarray(found.transpose(1, 2, 0)))
            return np.asarray(rgb.convert("L"))[None]
        luminance = np.tensordot(_LUMINANCE, found.astype(np.float64), 1)
        return np.asarray(luminance[None], np.float32)
    raise BadImage(f"{len(found)} channels, but data.channels is {channels}")


def _npy(data: bytes, rule: PixelRule) -> Values:
    """(H, W), (H, W, c) or (c, H, W): the last axis holds the channels where its length says so."""
    shape, fortran, dtype, start = npy_header(data)
    width, height = npy_size(shape, rule.channels)
    check_pixels((width, height), rule.max_pixels)
    count = math.prod(shape)
    if dtype.kind not in "biuf" or len(data) - start < count * dtype.itemsize:
        reason = "truncated" if dtype.kind in "biuf" else f"holds {dtype}, not real numbers"
        raise BadImage(f"NPY file: {reason}")
    array = np.frombuffer(data, dtype, count, start).reshape(shape, order="F" if fortran else "C")
    if array.ndim == 2:
        return array[None]
    return array.transpose(2, 0, 1) if shape[:2] == (height, width) else array


def npy_header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, Fortran order, type, and where the values start. Raises `BadImage`."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    formats = np.lib.format
    read = formats.read_array_header_1_0 if version == (1, 0) else formats.read_array_header_2_0
    shape, fortran, dtype = read(file)
    return shape, fortran, dtype, file.tell()


def npy_size(shape: tuple[int, ...], channels: int = 0) -> tuple[int, int]:
    """Width and height of (H, W), (H, W, c) or (c, H, W).

    c is the axis as long as `channels`, the last if both are; if none is, the shorter one.
    """
    if len(shape) not in (2, 3) or 0 in shape:
        raise BadImage(f"NPY file of shape {shape}, but pictures are (H, W), (H, W, c), (c, H, W)")
    first = len(shape) == 3 and shape[2] != channels
    if first and (shape[0] == channels or shape[0] < shape[2]):
        return shape[2], shape[1]
    return shape[1], shape[0]


def is_deep_file(data: bytes) -> bool:
    """Whether an encoded picture is an NPY file, has more than 8 bits, or is none of PIL's."""
    if data.startswith(NPY_START):
        return True
    try:
        with Image.open(io.BytesIO(data)) as image:
            return is_deep(image, data)
    except Exception:  # who decodes it has the reason
        return True


def require_tifffile() -> Any:
    """The module. Raises `BadImage`, with the command that installs it, where there is none."""
    if importlib.util.find_spec("tifffile") is None:
        raise BadImage(f"this TIFF needs tifffile: {INSTALL_TIFFFILE}")
    import tifffile

    return tifffile


def tiff_size(data: bytes) -> tuple[int, int]:
    """Width and height of the first page."""
    with require_tifffile().TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        return page.imagewidth, page.imagelength


def _tiff(data: bytes, rule: PixelRule) -> Values:
    """The first page; its channels may also be the first pages of a stack of gray ones."""
    with require_tifffile().TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        check_pixels((page.imagewidth, page.imagelength), rule.max_pixels)
        if page.photometric not in (_WHITE_IS_ZERO, _GRAY, _RGB):
            raise BadImage(f"a TIFF of {page.photometric.name} with more than 8 bits")
        if page.samplesperpixel == 1 and len(file.pages) == rule.channels:
            found = np.stack([one.asarray() for one in file.pages])
        else:
            found = page.asarray()
            planes_last = found.ndim == 3 and page.axes.endswith("S")
            found = found.transpose(2, 0, 1) if planes_last else found
            found = found[None] if found.ndim == 2 else found
        if page.photometric == _WHITE_IS_ZERO and found.dtype.kind == "u":
            found = np.iinfo(found.dtype).max - found
        extra = [int(kind) for kind in page.extrasamples]
        if len(found) == rule.channels + 1 and len(extra) == 1 and extra[0] in _ALPHA:
            found = _over(found[:-1], found[-1], rule)
        tag = page.tags.get(ORIENTATION)
        return turned(found, int(tag.value) if tag else 1)


def _by_pil(data: bytes, rule: PixelRule) -> Values:
    with Image.open(io.BytesIO(data)) as image:
        check_pixels(image.size, rule.max_pixels)
        if not is_deep(image, data):
            rgb = to_rgb(image, rule)
            picture = rgb.convert("L") if rule.channels == 1 else rgb
            return np.atleast_3d(np.asarray(picture)).transpose(2, 0, 1)
        if image.format == "PNG":
            found = _png(data, image, rule)
        elif image.mode.startswith(_DEEP_MODES):
            found = np.asarray(image)[None]
        else:
            raise BadImage(f"{image.format} colour of more than 8 bits: convert it to PNG or TIFF")
        apply = rule.exif == "apply"
        return turned(found, exif_orientation(image)) if apply else found


def _png(data: bytes, image: Image.Image, rule: PixelRule) -> Values:
    """uint16 of any colour type; transparency composed in the file's own range, then float32."""
    if image.mode.startswith(_DEEP_MODES):
        found: Values = np.asarray(image)[None]
    else:
        found = _png_colour(data)
    if len(found) in (2, 4):
        return _over(found[:-1], found[-1], rule)
    if (key := image.info.get("transparency")) is not None:
        wanted = np.reshape(np.asarray(key, np.uint16), (-1, 1, 1))
        opaque = (found != wanted).any(axis=0) * np.uint16(65535)
        return _over(found, opaque, rule)
    return found


def _png_colour(data: bytes) -> Values:
    """(c, H, W) uint16 of a PNG that PIL would reduce to 8 bits."""
    # Imported on demand: the processes of a scan do without torch.
    import torch
    from torchvision import io as torchvision_io

    # Deprecated in torchvision 0.29; nothing else that this project needs reads such files.
    decode_png: Any = getattr(torchvision_io, "decode_png", None)
    if decode_png is None:
        raise BadImage("colour of 16 bits in a PNG, which this torchvision does not read: use TIFF")
    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    found: Values = decode_png(buffer, torchvision_io.ImageReadMode.UNCHANGED).numpy()
    return found


def _over(colour: Values, alpha: Values, rule: PixelRule) -> Values:
    """Composed over `data.alpha_over`, whose 255 is the largest value of the file's type."""
    most = np.iinfo(colour.dtype).max if colour.dtype.kind in "iu" else 1
    ground = np.asarray(rule.alpha_over, np.float64) / 255 * most
    if len(colour) == 1:
        ground = np.dot(_LUMINANCE, ground)[None]
    share = alpha.astype(np.float64) / most
    return np.asarray(share * colour + (1 - share) * ground[:, None, None], np.float32)


def turned(found: Values, orientation: int) -> Values:
    """(c, H, W) made upright from one of the eight orientations of TIFF and EXIF."""
    if orientation in (5, 6, 7, 8):
        found = found.transpose(0, 2, 1)
    if orientation in (2, 3, 6, 7):
        found = found[:, :, ::-1]
    if orientation in (3, 4, 7, 8):
        found = found[:, ::-1]
    return found
