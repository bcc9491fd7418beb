"""Files that no loader expects: cut off, empty, of another kind, or larger than they claim."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

GOOD = 40


def jpeg(**options: object) -> bytes:
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((80, 60))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **({"quality": 90} | options))
    return buffer.getvalue()


def png(**options: object) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(jpeg())).save(buffer, "PNG", **options)
    return buffer.getvalue()


def with_size(data: bytes, width: int, height: int) -> bytes:
    """The JPEG with another size in its frame header."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def png_of_size(width: int, height: int) -> bytes:
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b"IDAT" + zlib.compress(bytes(100))
    chunks = b""
    for chunk in (head, body, b"IEND"):
        chunks += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + chunks


def thumbnail_only() -> bytes:
    """Cut in the main scan, but a complete thumbnail in EXIF has its own end marker."""
    data = jpeg(quality=95)
    thumbnail = jpeg(quality=30)
    segment = b"Exif\0\0" + thumbnail
    block = b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment
    return data[:2] + block + data[2 : len(data) // 2]


def hostile_files() -> dict[str, bytes]:
    """Bytes by name; none of them is an image that can be used."""
    good, picture = jpeg(), png()
    progressive = jpeg(progressive=True)
    scan = good.index(b"\xff\xda")
    tables, frame = good.index(b"\xff\xdb"), good.index(b"\xff\xc0")
    return {
        "empty.jpg": b"",
        "one_byte.jpg": b"\xff",
        "only_start.jpg": good[:2],
        "start_and_end.jpg": good[:2] + b"\xff\xd9",
        "no_frame.jpg": good[:20],
        "header_only.jpg": good[: scan + 4],
        "half.jpg": good[: len(good) // 2],
        "nine_tenths.jpg": good[: len(good) * 9 // 10],
        "half_progressive.jpg": progressive[: len(progressive) // 2],
        "cut_after_thumbnail.jpg": thumbnail_only(),
        # Complete and plain by its markers: only a decoder notices.
        "no_tables.jpg": good[:tables] + good[frame:],
        "zeros.jpg": bytes(5000),
        "noise.jpg": np.random.default_rng(0).bytes(5000),
        "text.jpg": b"this is not an image at all, sorry\n" * 40,
        "page.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "vector.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "document.jpg": b"%PDF-1.7\n" + bytes(300),
        "archive.jpg": b"PK\x03\x04" + bytes(300),
        "zero_width.jpg": with_size(good, 0, 60),
        "zero_height.jpg": with_size(good, 80, 0),
        "bomb.jpg": with_size(good, 65500, 65500),
        "bomb.png": png_of_size(60_000, 60_000),
        "short.png": png_of_size(500, 500),
        "half.png": picture[: len(picture) // 2],
        "bad_sum.png": picture[:60] + bytes([picture[60] ^ 255]) + picture[61:],
        "signature.png": picture[:8],
        "half.webp": webp()[: len(webp()) // 2],
        "half.gif": b"GIF89a" + struct.pack("<HH", 50, 50) + b"\0\0\0",
        "header.bmp": b"BM" + bytes(60),
        "huge_claim.ppm": b"P6\n9999 9999\n255\n" + bytes(100),
        "no_data.tif": b"II*\0\x08\0\0\0" + bytes(8),
    }


def webp() -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(jpeg())).save(buffer, "WEBP")
    return buffer.getvalue()


def build_corpus(root: Path, hostile: bool) -> set[str]:
    """Good images with the hostile ones between; without, good images stand in their place."""
    root.mkdir()
    rng = np.random.default_rng(3)
    for number in range(GOOD):
        width, height = (int(x) for x in rng.integers(40, 90, 2))
        noise = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
        image = noise.resize((width, height))
        image.save(root / f"{number:03d}.jpg", quality=92)
    for name, data in hostile_files().items():
        (root / name).write_bytes(data if hostile else jpeg())
    if hostile:
        os.symlink(root / "nowhere", root / "dangling.jpg")
    else:
        (root / "dangling.jpg").write_bytes(jpeg())
    return {*hostile_files(), "dangling.jpg"}
