"""The picture of views: what it shows, and its command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmoco.data.backends.choose import has_dali
from fastmoco.data.preview import main


def test_preview_draws_originals_and_both_views(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "views.png"
    arguments = ["--data.root", str(photos), "--augment.image_size", "48", "--samples", "4"]
    small = ["--optim.global_batch_size", "16"]
    assert main([*arguments, *small, "--out", str(out)]) == 0
    page = np.asarray(Image.open(out))
    columns = 5 if has_dali() else 3
    assert page.shape[1] == columns * 52 - 4
    assert page.shape[0] > 4 * 48
    if has_dali():  # both executors drew nearly the same pictures
        pil, dali = page[14:, 52:100].astype(float), page[14:, 3 * 52 : 3 * 52 + 48].astype(float)
        assert np.abs(pil - dali).mean() < 2
        assert pil.std() > 20


def test_preview_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data.root", str(tmp_path / "none"), "--out", str(tmp_path / "x.png")]) == 2
    assert "is not a folder" in capsys.readouterr().err
