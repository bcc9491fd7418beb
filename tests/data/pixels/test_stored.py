"""What files of any depth and number of channels store comes out as they store it."""

from __future__ import annotations

import importlib.util
import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastmoco.data.decode import BadImage, decode, image_size
from fastmoco.data.pixels.deep import decode_deep
from fastmoco.data.pixels.rule import RGB8, PixelRule
from fastmoco.data.pixels.stored import stored
from tests.support.data.images import npy, png, tiff

H, W = 15, 17  # more than any number of channels here
GRAY, RGB = PixelRule(channels=1), PixelRule()
REFUSED = r"more than 8 bits.*data\.intensity to \[LOW, HIGH\]"


def drawn(dtype: Any, *shape: int) -> np.ndarray:
    kind = np.dtype(dtype)
    rng = np.random.default_rng(0)
    if kind.kind == "f":
        return rng.normal(0, 1e4, shape).astype(kind)
    limits, native = np.iinfo(kind), kind.newbyteorder("=")
    return rng.integers(limits.min, limits.max, shape, native, endpoint=True).astype(kind)


DEEP = [np.uint16, np.int16, np.int32, np.uint32, np.float32, np.float64]


@pytest.mark.parametrize("dtype", [*DEEP, np.float16, np.int64, ">u2", ">f4"])
def test_npy_of_every_type_and_layout(dtype: Any) -> None:
    for channels in (1, 3, 4, 13):
        pixels = drawn(dtype, channels, H, W)
        rule = PixelRule(channels=channels)
        for array in (pixels, pixels.transpose(1, 2, 0), np.asfortranarray(pixels)):
            assert np.array_equal(stored(npy(array), rule), pixels), (channels, array.shape)
            assert image_size(npy(array), 10**6) == (W, H)
    assert np.array_equal(stored(npy(drawn(dtype, H, W)), GRAY)[0], drawn(dtype, H, W))


def test_the_order_of_bytes_does_not_change_a_view() -> None:
    pixels = drawn(np.uint16, H, W)
    rule = PixelRule(channels=1, intensity=(100.0, 60_000.0))
    little, big = (
        decode_deep(npy(pixels.astype(kind)), rule).box(2, 1, 9, 8) for kind in ("<u2", ">u2")
    )
    assert np.array_equal(little, big)


@pytest.mark.parametrize("dtype", DEEP)
@pytest.mark.parametrize(
    "options", [{}, {"compression": "deflate"}, {"bigtiff": True, "byteorder": ">"}]
)
def test_tiff_of_every_type_and_layout(dtype: Any, options: dict[str, Any]) -> None:
    one = drawn(dtype, H, W)
    assert np.array_equal(stored(tiff(one, **options), GRAY)[0], one)
    for channels in (3, 4, 13):
        pixels = drawn(dtype, channels, H, W)
        rule = PixelRule(channels=channels)
        kind = {"photometric": "minisblack", **options}
        last = tiff(pixels.transpose(1, 2, 0), planarconfig="contig", **kind)
        planes = tiff(pixels, planarconfig="separate", **kind)
        pages = tiff(pixels, **kind)
        for data in (last, planes, pages):
            assert np.array_equal(stored(data, rule), pixels), channels
            assert image_size(data, 10**6) == (W, H)


def test_tiff_of_8_bits_with_many_channels() -> None:
    pixels = drawn(np.uint8, H, W, 4)
    data = tiff(pixels, photometric="minisblack", planarconfig="contig")
    found = decode_deep(data, PixelRule(channels=4))
    assert np.array_equal(found.values.transpose(1, 2, 0), pixels)
    assert (found.low, found.high) == (0, 255)


def test_12_bits_in_16_and_where_white_is_zero() -> None:
    pixels = np.arange(H * W, dtype=np.uint16).reshape(H, W) * 117
    image = decode_deep(tiff(pixels), replace(GRAY, intensity=(0.0, 4095.0)))
    np.testing.assert_allclose(image.box(0, 0, H, W)[0], pixels * (255 / 4095), rtol=1e-6)
    film = tiff(pixels, photometric="miniswhite")
    assert np.array_equal(stored(film, GRAY)[0], 65535 - pixels)


def test_png_of_16_bits_in_every_colour_type() -> None:
    gray, rgb = drawn(np.uint16, H, W), drawn(np.uint16, H, W, 3)
    assert np.array_equal(stored(png(gray), GRAY)[0], gray)
    assert np.array_equal(stored(png(rgb), RGB).transpose(1, 2, 0), rgb)
    luminance = rgb @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(stored(png(rgb), GRAY)[0], luminance, rtol=1e-6)
    over = PixelRule(alpha_over=(255, 0, 51))
    for channels in (2, 4):
        pixels = drawn(np.uint16, H, W, channels)
        share = pixels[..., -1:] / 65535
        ground = np.array([65535, 0, 13107])
        ground = ground if channels == 4 else ground @ np.array([[0.299], [0.587], [0.114]])
        expected = share * pixels[..., :-1] + (1 - share) * ground
        found = stored(png(pixels), over).transpose(1, 2, 0)
        np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), rtol=1e-6)


def test_one_transparent_colour_of_16_bits() -> None:
    for pixels in (drawn(np.uint16, H, W), drawn(np.uint16, H, W, 3)):
        key = tuple(np.atleast_1d(pixels[2, 3]).tolist())
        found = stored(png(pixels, key), RGB)
        assert (found[:, 2, 3] == 65535).all()
        rest = np.atleast_3d(pixels).transpose(2, 0, 1)
        assert np.array_equal(found[:, 0], np.broadcast_to(rest[:, 0], (3, W)))


def test_exif_and_the_tag_of_a_tiff_turn_deep_pictures() -> None:
    upright = drawn(np.uint16, H, W)
    turns = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }
    for number, pixels in turns.items():
        exif = Image.Exif()
        exif[0x0112] = number
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG", exif=exif)
        data = file.getvalue()
        assert np.array_equal(stored(data, GRAY)[0], pixels)
        assert np.array_equal(stored(data, replace(GRAY, exif="apply"))[0], upright), number
        tagged = tiff(np.ascontiguousarray(pixels), extratags=[(274, "H", 1, number, True)])
        assert np.array_equal(stored(tagged, GRAY)[0], upright), number


def test_8_bit_files_are_the_pixels_of_the_8_bit_decoder() -> None:
    pixels = drawn(np.uint8, H, W, 4)
    for rule in (RGB, GRAY):
        found = stored(png(pixels), rule)
        rgb = decode(png(pixels), RGB8)
        expected = np.asarray(rgb if rule is RGB else rgb.convert("L"))
        assert np.array_equal(found, np.atleast_3d(expected).transpose(2, 0, 1))
    assert np.array_equal(np.asarray(decode(npy(pixels[..., :3]), RGB8)), pixels[..., :3])
    assert np.array_equal(stored(npy(pixels[..., 0] > 99), GRAY)[0], (pixels[..., 0] > 99) * 255)


@pytest.mark.parametrize(
    "data",
    [
        png(drawn(np.uint16, H, W)),
        png(drawn(np.uint16, H, W, 3)),
        tiff(drawn(np.uint16, H, W)),
        tiff(drawn(np.uint16, H, W, 3), photometric="rgb"),
        tiff(drawn(np.float32, H, W)),
        tiff(drawn(np.int32, H, W)),
        npy(drawn(np.uint16, H, W)),
        b"P5 17 15 4095\n" + drawn(np.uint16, H, W).tobytes(),
        b"P6 17 15 65535\n" + drawn(np.uint16, H, W, 3).tobytes(),
    ],
    ids=["png", "png rgb", "tiff", "tiff rgb", "float", "int", "npy", "pgm", "ppm"],
)
def test_deep_pictures_never_pass_as_8_bits(data: bytes) -> None:
    with pytest.raises(BadImage, match=REFUSED):
        decode(data, RGB8)


@pytest.mark.parametrize(
    ("data", "rule", "reason"),
    [
        (npy(drawn(np.uint16, H, W, 4)), RGB, "4 channels, but data.channels is 3"),
        (
            png(drawn(np.uint8, H, W, 3)),
            PixelRule(channels=4),
            "3 channels, but data.channels is 4",
        ),
        (npy(np.full((H, W), np.nan)), GRAY, "holds NaN or infinite values"),
        (npy(np.full((H, W), 1j)), GRAY, "holds complex128, not real numbers"),
        (npy(drawn(np.uint16, H, W))[:-1], GRAY, "truncated"),
        (npy(np.array({"a": 1}, object)), GRAY, "shape"),
        (npy(drawn(np.uint8, 2, H, W, 3)), RGB, r"shape \(2, 15, 17, 3\)"),
        (npy(drawn(np.uint8, H, W)), PixelRule(max_pixels=254), "exceed data.max_pixels"),
        (tiff(drawn(np.uint16, H, W)), PixelRule(max_pixels=254, channels=1), "exceed"),
        (tiff(drawn(np.uint16, H, W))[:-9], GRAY, "."),
        (png(drawn(np.uint16, H, W))[:-30], GRAY, "."),
        (png(drawn(np.uint16, H, W, 3))[:900], RGB, "."),
        (b"P6 17 15 65535\n" + bytes(H * W * 6), RGB, "PPM colour of more than 8 bits"),
        (b"\x93NUMPY\x01\0", GRAY, "."),
        (b"II*\0\xff\xff\xff\xff", GRAY, "."),
    ],
)
def test_what_cannot_be_used_has_a_reason(data: bytes, rule: PixelRule, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        decode_deep(data, replace(rule, intensity=(0.0, 1.0)))


def test_without_tifffile_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadImage, match=r"pip install 'fastmoco\[tiff\]'"):
        decode_deep(tiff(drawn(np.uint16, H, W)), replace(GRAY, intensity=(0.0, 1.0)))


@pytest.mark.skipif(
    importlib.util.find_spec("tifffile") is None, reason="the extra tiff is not installed"
)
def test_a_tiff_without_tags_has_no_pixels_and_is_bad() -> None:
    data = b"II*\0\x08\0\0\0" + bytes(8)
    with pytest.raises(BadImage):
        image_size(data, 10**8)
    with pytest.raises(BadImage):
        decode_deep(data, PixelRule(channels=1))
