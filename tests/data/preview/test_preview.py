"""The picture of views: what it shows, and its command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fastmoco.data.backends.choose import has_dali
from fastmoco.data.preview.__main__ import main
from fastmoco.data.preview.sheet import Column, captions, sheet
from fastmoco.data.table import ViewTable


def test_preview_draws_originals_and_both_views(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "views.png"
    arguments = ["--data.root", str(photos), "--augment.image_size", "48", "--samples", "4"]
    small = ["--optim.global_batch_size", "16"]
    assert main([*arguments, *small, "--out", str(out)]) == 0
    page = np.asarray(Image.open(out)).astype(float)
    columns = 5 if has_dali() else 3
    pitch = 176 + 8  # as wide as the captions; pictures of 48 pixels are drawn twice as large
    assert page.shape == (8 + 14 + 8 + 4 * (96 + 3 * 14 + 8), columns * pitch + 8, 3)

    def picture(column: int, row: int) -> NDArray[np.float64]:
        top, left = 30 + row * 146, 8 + column * pitch
        return page[top : top + 96, left : left + 96]

    for row in range(4):
        assert np.array_equal(picture(1, row)[::2, ::2], picture(1, row)[1::2, 1::2])
        assert picture(1, row).std() > 20
        if has_dali():  # both executors drew nearly the same pictures
            assert np.abs(picture(1, row) - picture(3, row)).mean() < 2


def test_captions_say_what_was_drawn() -> None:
    table = ViewTable(
        crop=np.array([[0, 0, 50, 40], [1, 2, 100, 100]]),
        jitter=np.array([True, False]),
        order=np.array([[0, 1, 2, 3]] * 2),
        factors=np.array([[1.25, 0.8, 1.0, -0.05]] * 2, dtype=np.float32),
        gray=np.array([False, True]),
        sigma=np.array([0.0, 1.5], dtype=np.float32),
        flip=np.array([False, True]),
    )
    assert captions(table, [(100, 100), (200, 100)]) == [
        ["20 % of the image", "bri 1.25 con 0.80 sat 1.00 hue -0.05", "neither gray nor blurred"],
        ["50 % of the image, flipped", "colours as they are", "gray, blur 1.50 px"],
    ]


def test_headings_and_captions_stay_in_their_columns() -> None:
    black = np.zeros((32, 32, 3), np.uint8)
    widest = "bri 1.40 con 1.40 sat 1.40 hue +0.10"
    columns = [Column("im_q, by DALI", [black], [[widest]]), Column("im_k", [black], [[""]])]
    page = np.asarray(sheet(columns, 32))
    assert (page[:, 8 + 176 : 8 + 176 + 8] == 255).all()  # the gap between the columns


def test_preview_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data.root", str(tmp_path / "none"), "--out", str(tmp_path / "x.png")]) == 2
    assert "is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "part"),
    [
        ("--out=views", "must end in .png or .jpg or .jpeg"),
        ("--out=views.gif", "must end in .png"),
        ("--out=none/views.png", "none/views.png"),
        ("--out=folder.png", "folder.png"),
        ("--augment.image_size=1", "augment.image_size is 1"),
        ("--augment.jitter_p=7", "augment.jitter_p is 7.0"),
        ("--augment.blur_min=3", "augment.blur_min 3.0 exceeds"),
        ("--optim.global_batch_size=1", "BN group"),
        ("--moco.temperature=0", "moco.temperature"),
    ],
)
def test_what_a_run_would_refuse_is_refused_before_anything_is_read(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    part: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "images").mkdir()
    small = ["--optim.global_batch_size=16", "--moco.queue_size=64", "--data.root=images"]
    assert main([*small, option]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert part in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.png", "images"]


def test_a_jpeg_is_one(tmp_path: Path) -> None:
    out = tmp_path / "views.JPG"
    small = ["--optim.global_batch_size=16", "--moco.queue_size=64", "--augment.image_size=32"]
    assert main([*small, "--data.source=synthetic", f"--out={out}"]) == 0
    with Image.open(out) as image:
        assert image.format == "JPEG"
