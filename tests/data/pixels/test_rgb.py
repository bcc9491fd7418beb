"""Every kind of 8-bit file, one test per row of the table in docs/data.md."""

from __future__ import annotations

import io
import json
import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from fastmoco.config import AugmentConfig, Config, ConfigError, DataConfig, check
from fastmoco.data.backends.array import decode_tensor
from fastmoco.data.decode import BadImage, decode
from fastmoco.data.pixels.rule import RGB8, PixelRule
from fastmoco.data.pixels.survey import survey
from fastmoco.data.reader import Reader
from fastmoco.data.sources.folder import open_folder
from fastmoco.evaluate.labelled_images import eval_view

PNG_START = b"\x89PNG\r\n\x1a\n"
RED, BLUE = (200, 10, 30), (20, 40, 220)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def halves(side: int = 16) -> Image.Image:
    """Red on the left, blue on the right; the top row is green."""
    pixels = np.empty((side, side, 3), np.uint8)
    pixels[:, : side // 2], pixels[:, side // 2 :], pixels[0] = RED, BLUE, (0, 255, 0)
    return Image.fromarray(pixels)


def pixels(data: bytes, rule: PixelRule = RGB8) -> np.ndarray:
    """By every decoder of the program, which must agree."""
    found = np.asarray(decode(data, rule))
    assert np.array_equal(decode_tensor(data, rule).permute(1, 2, 0).numpy(), found)
    height, width = found.shape[:2]
    if height == width:  # no resizing and no cropping
        assert np.array_equal(eval_view(data, width, width, rule), found)
    return found


@pytest.mark.parametrize("over", [(255, 255, 255), (0, 0, 0), (10, 200, 90)])
@pytest.mark.parametrize("form", ["RGBA.png", "LA.png", "RGBA.webp", "RGBA.tiff"])
def test_transparency_is_composed_over_the_colour(form: str, over: tuple[int, int, int]) -> None:
    mode, kind = form.split(".")
    colour = halves()
    colour.putalpha(Image.fromarray(np.linspace(0, 255, 256).astype(np.uint8).reshape(16, 16)))
    image = colour.convert(mode)
    options = {"lossless": True, "exact": True} if kind == "webp" else {}
    found = pixels(encoded(image, kind.upper(), **options), PixelRule(alpha_over=over))
    rgba = np.asarray(image.convert("RGBA"), np.float64)
    share = rgba[..., 3:] / 255
    expected = share * rgba[..., :3] + (1 - share) * np.array(over)
    assert np.abs(found - expected).max() <= 1


def test_transparency_of_a_palette_and_of_one_colour_is_composed_too() -> None:
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, *RED])
    palette.paste(0, (0, 0, 4, 8))  # black, and transparent
    for kind in ("PNG", "GIF"):
        found = pixels(encoded(palette, kind, transparency=0), PixelRule(alpha_over=(9, 8, 7)))
        assert (found[:, :4] == (9, 8, 7)).all(), kind
        assert (found[:, 4:] == RED).all(), kind
    for mode, key, rest in (("RGB", RED, BLUE), ("L", 3, 90)):
        picture = Image.new(mode, (8, 8), rest)
        picture.paste(key, (0, 0, 4, 8))
        found = pixels(encoded(picture, "PNG", transparency=key))
        assert (found[:, :4] == 255).all(), mode
        assert (found[:, 4:] == rest).all(), mode


def test_icons_with_black_strokes_keep_their_drawing() -> None:
    icon = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    icon.paste((0, 0, 0, 255), (4, 4, 8, 12))
    found = pixels(encoded(icon, "PNG"))
    assert found.min() == 0
    assert found.max() == 255


def test_cmyk_is_converted_as_pil_does() -> None:
    ink = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    assert (pixels(encoded(ink, "TIFF")) == (0, 255, 255)).all()
    assert np.abs(pixels(encoded(ink, "JPEG")).astype(int) - (0, 255, 255)).max() < 8


def test_lab_becomes_srgb() -> None:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(halves(), *profiles, outputMode="LAB")
    assert lab is not None
    found = pixels(encoded(lab, "TIFF")).astype(int)
    # Saturated colours move by some levels on their way through 8-bit LAB.
    assert np.abs(found - np.asarray(halves(), int)).max() < 16


def test_one_bit_becomes_black_and_white() -> None:
    bits = np.random.default_rng(0).integers(0, 2, (8, 8)).astype(bool)
    for kind in ("PNG", "TIFF", "PPM", "BMP"):
        found = pixels(encoded(Image.fromarray(bits), kind))
        assert np.array_equal(found, np.repeat(bits[..., None] * np.uint8(255), 3, axis=2)), kind


def test_the_first_frame_or_page_counts() -> None:
    pages = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("PNG", {})):
        data = encoded(pages[0], kind, save_all=True, append_images=pages[1:], **options)
        assert (pixels(data) == RED).all(), kind


def test_exif_turns_an_image_only_where_asked(tmp_path: Path) -> None:
    """Files of cameras in every orientation; the oracle is what the numbers mean."""
    upright = np.asarray(halves().resize((24, 16)))
    turns = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }
    apply = PixelRule(exif="apply")
    for number, stored in turns.items():
        exif = Image.Exif()
        exif[0x0112] = number
        for kind, options in (("PNG", {}), ("JPEG", {"quality": 100, "subsampling": 0})):
            image = Image.fromarray(np.ascontiguousarray(stored))
            data = encoded(image, kind, exif=exif, **options)
            near = 0 if kind == "PNG" else 8
            assert np.abs(pixels(data).astype(int) - stored).max() <= near, (kind, number)
            assert np.abs(pixels(data, apply).astype(int) - upright).max() <= near, (kind, number)
            (tmp_path / f"{number}.{kind.lower()}").write_bytes(data)
        # PIL itself turns a TIFF: it is not turned once more, nor counted as one to turn.
        data = encoded(image, "TIFF", tiffinfo={0x0112: number})
        for rule in (RGB8, apply):
            assert np.array_equal(pixels(data, rule), upright), number
        (tmp_path / "tiff").mkdir(exist_ok=True)
        (tmp_path / "tiff" / f"{number}.tif").write_bytes(data)
    assert survey(open_folder(str(tmp_path / "tiff"), 10**6), RGB8).turned == 0
    shutil.rmtree(tmp_path / "tiff")
    source = open_folder(str(tmp_path), 10**6)
    for rule, wide in ((RGB8, 8), (apply, 16)):
        reader = Reader(source, 0, rule)
        loaded = [reader.load(sample) for sample in range(16)]
        assert sum(one.width == 24 for one in loaded) == wide, rule.exif
        for one in loaded:  # what DALI gets needs no turning any more
            assert decode(one.data, RGB8).size == (one.width, one.height)
    assert survey(source, RGB8).turned == 14


def test_max_pixels_decides_alone() -> None:
    """PIL's own limit is 2 x 89 million pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 10_000, 1, 0, 0, 0, 0)
    large = PNG_START + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    large += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    with pytest.raises(BadImage, match=r"20000 x 10000 pixels exceed data\.max_pixels"):
        decode(large, RGB8)
    small = encoded(Image.new("1", (20, 10)), "PNG")
    with pytest.raises(BadImage, match="exceed"):
        decode(small, PixelRule(max_pixels=199))
    with Image.open(io.BytesIO(large)) as image:  # PIL itself no longer refuses
        assert image.size == (20_000, 10_000)


def test_a_set_of_nearly_one_colour_is_said_so(tmp_path: Path) -> None:
    for number in range(8):
        icon = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
        icon.paste((0, 0, 0, 255), (4, 4, 8, 12))
        (tmp_path / f"{number}.png").write_bytes(encoded(icon, "PNG"))
    source = open_folder(str(tmp_path), 10**6)
    assert survey(source, RGB8).warnings() == []
    found = survey(source, replace(RGB8, alpha_over=(0, 0, 0)))
    (sentence,) = found.warnings()
    assert sentence.startswith("8 of 8 sampled pictures are nearly one colour")
    assert "0.png" in sentence
    assert "data.alpha_over" in sentence


def test_a_colour_beyond_8_bits_is_refused() -> None:
    config = Config(data=DataConfig(alpha_over=(0, 256, 0)), augment=AugmentConfig(image_size=64))
    with pytest.raises(ConfigError, match=r"data\.alpha_over is \[0, 256, 0\]"):
        check(config, 1)


def test_a_broken_note_of_a_survey_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTMOCO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    halves().save(tmp_path / "images" / "a.png")
    source = open_folder(str(tmp_path / "images"), 10**6)
    found = survey(source, RGB8)
    (kept,) = (tmp_path / "cache" / "pixels").glob("*.json")
    whole = json.loads(kept.read_text())
    part = whole["shallow"]
    for broken in (
        *("[]", 3, {}, {**whole, "shallow": 3}, {**whole, "flat": "none"}, {**whole, "more": 1}),
        *({**whole, "shallow": {**part, "mean": mean}} for mean in ("", ["a", "b", "c"], [[1]])),
        *({**whole, "shallow": {**part, "pictures": None}}, "[" * 9999),
    ):
        kept.write_text(broken if isinstance(broken, str) else json.dumps(broken))
        again = survey(source, RGB8)
        assert again == found
        assert again.looked_at == 1
    kept.write_text(json.dumps({**whole, "turned": 7}))
    assert survey(source, RGB8).turned == 7  # one that is not broken is taken
