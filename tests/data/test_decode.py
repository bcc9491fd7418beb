"""Which JPEGs every decoder reads alike: complete ones of a common process in gray or YCbCr."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmoco.data.backends.array import decode_tensor
from fastmoco.data.decode import BadImage, decode, is_complete_jpeg, jpeg_header
from fastmoco.data.pixels.rule import RGB8
from fastmoco.data.reader import Reader
from fastmoco.data.sources.folder import open_folder

ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"  # the last byte, the transform, follows


def photo(mode: str = "RGB", side: int = 24, **options: object) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (side, side + 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def with_adobe(data: bytes, transform: int) -> bytes:
    """The same file with the segment that says what its components are."""
    start = data.index(b"\xff\xdb")
    return data[:start] + ADOBE + bytes([transform]) + data[start:]


def with_identifiers(data: bytes, identifiers: bytes) -> bytes:
    """The same file with other names of its components, in the frame and in the scan."""
    frame, scan = data.index(b"\xff\xc0") + 10, data.index(b"\xff\xda") + 5
    found = bytearray(data)
    found[frame : frame + 9 : 3] = identifiers
    found[scan : scan + 6 : 2] = identifiers
    return bytes(found)


JPEGS = {
    "YCbCr": (photo(), True),
    "gray": (photo("L"), True),
    "progressive": (photo(progressive=True), True),
    "said to be YCbCr": (with_adobe(photo(), 1), True),
    "said to be RGB": (with_adobe(photo(), 0), False),
    "RGB by name": (with_identifiers(photo(), b"RGB"), False),
    "RGB by name, said to be YCbCr": (with_adobe(with_identifiers(photo(), b"RGB"), 1), True),
    "RGB": (photo(keep_rgb=True), False),
    "CMYK": (photo("CMYK"), False),
}


@pytest.mark.parametrize("kind", JPEGS)
def test_a_plain_jpeg_is_one_that_decoders_agree_on(kind: str) -> None:
    data, plain = JPEGS[kind]
    header = jpeg_header(data)
    assert header is not None
    assert (header.width, header.height, header.plain) == (32, 24, plain)
    truth = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decode_tensor(data, RGB8).permute(1, 2, 0).numpy(), truth)


def test_a_jpeg_is_complete_only_with_the_end_of_its_last_scan() -> None:
    """Whatever follows; the end of a thumbnail in its EXIF data is not its own."""
    exif = b"Exif\0\0" + photo(side=8)
    for data in (photo(), photo(progressive=True), photo(exif=exif)):
        header = jpeg_header(data)
        assert header is not None
        assert is_complete_jpeg(data, header)
        assert is_complete_jpeg(data + b"what a phone appends", header)
        cuts = range(header.end, len(data))
        assert not any(is_complete_jpeg(data[:cut], header) for cut in cuts)
        for cut in range(2, len(data) - 2, 7):  # without the end marker PIL has all pixels
            with pytest.raises(BadImage):
                decode(data[:cut], RGB8)


def test_a_cut_jpeg_is_bad_and_not_half_gray(tmp_path: Path) -> None:
    data = photo()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) * 2 // 3])
    (tmp_path / "whole.jpg").write_bytes(data)
    reader = Reader(open_folder(str(tmp_path), 10**6), 0, RGB8)
    with pytest.raises(BadImage, match="truncated"):
        reader.load(0)
    assert reader.load(1).data == data
    with pytest.raises(BadImage, match="truncated"):
        decode_tensor(data[: len(data) * 2 // 3], RGB8)


def test_a_jpeg_without_quantization_tables_is_left_to_pil() -> None:
    """nvJPEG would silently use those of another picture (seen on an H200)."""
    data = photo()
    tables, frame = data.index(b"\xff\xdb"), data.index(b"\xff\xc0")
    behind = data.index(b"\xff\xc4")
    moved = data[:tables] + data[frame:behind] + data[tables:frame] + data[behind:]
    for whole in (data, moved):  # they may also come behind the frame
        header = jpeg_header(whole)
        assert header is not None
        assert is_complete_jpeg(whole, header)
        assert np.array_equal(np.asarray(decode(whole, RGB8)), np.asarray(decode(data, RGB8)))
    header = jpeg_header(bare := data[:tables] + data[frame:])
    assert header is not None
    assert not is_complete_jpeg(bare, header)
    with pytest.raises(BadImage):
        decode(bare, RGB8)
