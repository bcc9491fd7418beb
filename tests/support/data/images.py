"""Images as PIL itself reads them, and files of kinds that PIL does not write."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image


def open_rgb(data: bytes) -> Image.Image:
    """The RGB image of encoded bytes; transparency over white."""
    with Image.open(io.BytesIO(data)) as image:
        if not image.has_transparency_data:
            return image.convert("RGB")
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")


def png(pixels: NDArray[Any], key: tuple[int, ...] = ()) -> bytes:
    """A PNG of uint8 or uint16 (H, W) or (H, W, c): gray, gray and alpha, RGB or RGBA.

    Written here, because PIL writes no colour of 16 bits. key: the transparent colour.
    """
    height, width, channels = np.atleast_3d(pixels).shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    bits = 8 * pixels.dtype.itemsize
    rows = pixels.astype(pixels.dtype.newbyteorder(">")).reshape(height, -1)
    filtered = b"".join(b"\0" + row.tobytes() for row in rows)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))]
    parts += [(b"tRNS", struct.pack(f">{len(key)}H", *key))] if key else []
    parts += [(b"IDAT", zlib.compress(filtered)), (b"IEND", b"")]
    chunks = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tiff(pixels: NDArray[Any], **options: Any) -> bytes:
    """A TIFF by tifffile."""
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **options)
    return file.getvalue()


def npy(pixels: NDArray[Any]) -> bytes:
    """An NPY file."""
    file = io.BytesIO()
    np.save(file, pixels)
    return file.getvalue()
