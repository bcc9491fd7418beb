"""The oracle against torchvision's own transforms, driven by the table's numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter
from torchvision import transforms as official
from torchvision.transforms import functional

from fastmoco.config import AugmentConfig
from fastmoco.data.backends.pil import execute
from fastmoco.data.table import ViewTable, draw_uniforms, view_table

# torchvision annotates tensors only, although it takes PIL images.
F: Any = functional
transforms: Any = official


def picture(width: int = 97, height: int = 64) -> Image.Image:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def scripted_jitter(monkeypatch: pytest.MonkeyPatch, table: ViewTable, row: int) -> object:
    names = [float(x) for x in table.factors[row]]
    order = table.order[row].tolist()
    monkeypatch.setattr(
        transforms.ColorJitter, "get_params", staticmethod(lambda *_: (order, *names))
    )
    return transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)


@pytest.mark.parametrize("recipe", ["v1", "v2"])
def test_rows_do_what_torchvisions_transforms_do(
    monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    image, side = picture(), 48
    sizes = np.tile(np.array([image.size], np.int32), (40, 1))
    config = AugmentConfig(jitter_p=0.8, grayscale_p=0.3)
    table = view_table(config, draw_uniforms(0, 0, 0, 0, 40), sizes)
    for row in range(40):
        top, left, height, width = table.crop[row].tolist()
        box = (left, top, left + width, top + height)
        view = image.crop(box).resize((side, side), Image.Resampling.BILINEAR)
        colour = scripted_jitter(monkeypatch, table, row) if table.jitter[row] else None
        if recipe == "v1" and table.gray[row]:
            view = transforms.Grayscale(3)(view)
        view = colour(view) if callable(colour) else view
        if recipe == "v2" and table.gray[row]:
            view = transforms.Grayscale(3)(view)
        if table.sigma[row]:
            view = view.filter(ImageFilter.GaussianBlur(radius=float(table.sigma[row])))
        if table.flip[row]:
            view = F.hflip(view)
        assert np.array_equal(np.asarray(view), execute(image, table, row, side, recipe)), row
