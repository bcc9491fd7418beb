"""The README's picture is made of a run's own pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.pages.run_picture import compose, main


def test_views_stand_left_of_loss_and_knn() -> None:
    views = Image.new("RGB", (928, 1198), "red")
    curves = Image.new("RGB", (1000, 1000), "white")
    curves.paste("green", (0, 0, 340, 530))
    curves.paste("blue", (690, 0, 1000, 530))
    found = np.asarray(compose(views, curves))
    assert found.shape[0] == 468
    middle = [tuple(found[200, x]) for x in (10, 550, 600, found.shape[1] - 10)]
    assert middle == [(255, 0, 0), (255, 0, 0), (0, 128, 0), (0, 0, 255)]


def test_a_folder_without_pictures_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path), str(tmp_path / "out.png")]) == 2
    assert "has no pictures" in capsys.readouterr().err
