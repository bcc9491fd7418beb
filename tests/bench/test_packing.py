"""The fidelity of a pack, on pictures whose error is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.packing import psnr, ratios
from fastmoco.cli import main as fastmoco

SIDES = {"small": 120, "large": 640}


def test_psnr_of_a_known_error() -> None:
    black = np.zeros((4, 4, 3), np.uint8)
    assert psnr(black, black) == float("inf")
    # One value of 48 is off by 255: a mean square error of 255 ** 2 / 48.
    one = black.copy()
    one[0, 0, 0] = 255
    assert psnr(black, one) == pytest.approx(10 * np.log10(48))


def test_views_of_smaller_images_show_the_same_and_kept_ones_do_not_count(
    tmp_path: Path,
) -> None:
    (root := tmp_path / "images" / "a").mkdir(parents=True)
    y, x = np.mgrid[:1:640j, :1:640j]
    smooth = (np.stack([x, y, (x + y) / 2], 2) * 255).astype(np.uint8)
    for name, side in SIDES.items():
        Image.fromarray(smooth).resize((side, side)).save(root / f"{name}.png")
    pack = tmp_path / "pack"
    wanted = [f"--data.root={tmp_path / 'images'}", f"--out={pack}", "--short-side=320"]
    assert fastmoco(["pack", *wanted]) == 0
    lines = [json.loads(line) for line in next(pack.glob("*.jsonl")).read_text().splitlines()]
    assert sorted(line["kept"] for line in lines) == [False, True]
    found = ratios(pack, tmp_path / "images")
    assert len(found) == 2
    assert all(35 < value < 70 for value in found)  # a view of another box: below 20
