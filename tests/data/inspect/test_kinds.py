"""What the bytes of a picture say, and which number of channels follows from many."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from fastmoco.data.inspect.kinds import Kind, channels_for, kind_of
from fastmoco.data.pixels.rgb import ORIENTATION
from fastmoco.data.pixels.rule import BadImage
from tests.support.data.hostile import hostile_files
from tests.support.data.images import npy, png, tiff


def saved(mode: str, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (20, 10)).save(file, form, **options)
    return file.getvalue()


def upside_down() -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    return exif


def deep(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (saved("RGB", "JPEG"), Kind("JPEG", "RGB", 8, 3, 3, 1)),
        (saved("L", "JPEG", exif=upside_down()), Kind("JPEG", "L", 8, 1, 1, 3)),
        (saved("CMYK", "JPEG"), Kind("JPEG", "CMYK", 8, 4, 3, 1)),
        (saved("1", "PNG"), Kind("PNG", "1", 1, 1, 1, 1)),
        (saved("P", "PNG"), Kind("PNG", "P", 8, 3, 3, 1)),
        (saved("LA", "PNG"), Kind("PNG", "LA", 8, 2, 1, 1)),
        (saved("RGBA", "PNG"), Kind("PNG", "RGBA", 8, 4, 3, 1)),
        (png(deep(10, 20)), Kind("PNG", "I;16", 16, 1, 1, 1)),
        (png(deep(10, 20, 2)), Kind("PNG", "RGBA", 16, 2, 1, 1)),
        (png(deep(10, 20, 3)), Kind("PNG", "RGB", 16, 3, 3, 1)),
        (png(deep(10, 20, 4)), Kind("PNG", "RGBA", 16, 4, 3, 1)),
        (tiff(deep(10, 20)), Kind("TIFF", "uint16", 16, 1, 1, 1)),
        (tiff(deep(10, 20, 3), photometric="rgb"), Kind("TIFF", "uint16", 16, 3, 3, 1)),
        (tiff(deep(13, 10, 20), photometric="minisblack"), Kind("TIFF", "uint16", 16, 13, 13, 1)),
        (npy(deep(10, 20).astype(np.float32)), Kind("NPY", "float32", 32, 1, 1, 1)),
        (npy(deep(13, 10, 20)), Kind("NPY", "uint16", 16, 13, 13, 1)),
        (npy(deep(30, 40, 13)), Kind("NPY", "uint16", 16, 13, 13, 1)),
    ],
)
def test_each_kind_is_told_by_its_bytes(data: bytes, kind: Kind) -> None:
    assert kind_of(data) == kind


@pytest.mark.parametrize("name", ["empty.jpg", "text.jpg", "noise.jpg", "half.webp"])
def test_bytes_that_say_nothing_are_refused_with_a_reason(name: str) -> None:
    with pytest.raises(BadImage, match=r"\w"):
        kind_of(hostile_files()[name])


@pytest.mark.parametrize(
    ("colours", "channels"),
    [
        ({3: 100}, 3),
        ({1: 100}, 1),
        ({3: 99, 1: 400}, 3),
        ({3: 1, 1: 99}, 1),
        ({3: 2, 1: 98}, 3),
        ({13: 60, 3: 40}, 13),
        ({13: 40, 3: 60}, 3),
    ],
)
def test_channels_are_those_that_lose_nothing(colours: dict[int, int], channels: int) -> None:
    assert channels_for(colours) == channels
