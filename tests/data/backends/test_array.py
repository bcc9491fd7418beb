"""Array operations against the PIL reference, operation by operation, on the same rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from fastmoco.config import AugmentConfig
from fastmoco.data.backends import array
from fastmoco.data.backends.array import Canvas, decode_tensor
from fastmoco.data.backends.pil import execute
from fastmoco.data.pixels.banded import box_radius
from fastmoco.data.pixels.rule import RGB8
from fastmoco.data.table import ViewTable, draw_uniforms, view_table
from tests.support.data.images import open_rgb

NOTHING = AugmentConfig(jitter_p=0, grayscale_p=0, blur_p=0, flip_p=0)
STILL = replace(NOTHING, jitter_p=1, brightness=0, contrast=0, saturation=0, hue=0)
SIDE = 64


def errors(photos: Path, config: AugmentConfig, *, whole: bool = False) -> np.ndarray:
    """(images, S, S, 3) absolute differences; `whole` replaces the crop by one without resize."""
    images = [open_rgb(path.read_bytes()) for path in sorted(photos.rglob("*.jpg"))]
    if whole:
        images = [image.resize((SIDE, SIDE)) for image in images]
    sizes = np.array([image.size for image in images], np.int32)
    table = view_table(config, draw_uniforms(0, 0, 0, 0, len(images)), sizes)
    if whole:
        box = np.tile(np.array([0, 0, SIDE, SIDE]), (len(images), 1))
        table = ViewTable(**{**vars(table), "crop": box})
    canvas = Canvas(SIDE, config.recipe)
    return np.stack(
        [
            np.abs(
                execute(image, table, row, SIDE, config.recipe).astype(np.int64)
                - canvas.execute(as_tensor(image), table, row)
            )
            for row, image in enumerate(images)
        ]
    )


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("without_torchvisions", [False, True])
def test_jpegs_decode_to_pils_pixels(
    photos: Path, monkeypatch: pytest.MonkeyPatch, without_torchvisions: bool
) -> None:
    if without_torchvisions:
        monkeypatch.setattr(array, "_decode_jpeg", None)
    for path in photos.rglob("*.jpg"):
        data = path.read_bytes()
        expected = np.asarray(open_rgb(data))
        assert np.array_equal(decode_tensor(data, RGB8).permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "grayscale_p", "flip_p"])
def test_pointwise_operations_are_exact(photos: Path, name: str) -> None:
    changed: dict[str, Any] = {name: 1.0 if name.endswith("_p") else 0.4}
    config = replace(NOTHING if name.endswith("_p") else STILL, **changed)
    assert errors(photos, config, whole=True).max() == 0


def test_hue_and_whole_jitter_are_exact_but_for_ties(photos: Path) -> None:
    for config in (replace(STILL, hue=0.4), replace(NOTHING, jitter_p=1)):
        wrong = errors(photos, config, whole=True)
        assert (wrong > 0).mean() < 0.005
        assert wrong.mean() < 0.005


def test_resize_is_within_one_level(photos: Path) -> None:
    wrong = errors(photos, NOTHING)
    assert wrong.max() <= 1
    assert wrong.mean() < 0.1


@pytest.mark.parametrize("sigmas", [(0.1, 2.0), (2.0, 2.6), (2.5, 16.0)])
def test_blur_is_pils(photos: Path, sigmas: tuple[float, float]) -> None:
    blur = replace(NOTHING, blur_p=1, blur_min=sigmas[0], blur_max=sigmas[1])
    wrong = errors(photos, blur, whole=True)
    # A weight is off by up to 1/512, so a box by up to a level on a full edge; six boxes.
    assert wrong.max() <= 6
    assert wrong.mean() < 0.1


@pytest.mark.parametrize("recipe", ["v1", "v2"])
def test_whole_views(photos: Path, recipe: str) -> None:
    config = AugmentConfig(recipe=recipe, hue=0.4 if recipe == "v1" else 0.1)  # type: ignore[arg-type]
    wrong = errors(photos, config)
    assert wrong.mean() < 0.25
    assert wrong.mean(axis=(1, 2, 3)).max() < 1


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 1.41, 1.42, 2.0])
def test_boxes_have_the_gaussians_variance(sigma: float) -> None:
    """Three boxes of fractional radius r: the variance is three times that of one box."""
    radius = box_radius(sigma)
    whole = int(radius)
    inner = 1 / (2 * radius + 1)
    outer = (1 - (2 * whole + 1) * inner) / 2
    squares = sum(2 * inner * k * k for k in range(1, whole + 1)) + 2 * outer * (whole + 1) ** 2
    assert abs(3 * squares - sigma**2) < 1e-9
    impulse = np.zeros((41, 41), np.uint8)
    impulse[20, 20] = 255
    blurred = Image.fromarray(impulse).filter(ImageFilter.GaussianBlur(sigma))
    assert abs(int(np.asarray(blurred)[20].sum()) - 255 * kernel(whole, inner, outer)) < 4


def kernel(whole: int, inner: float, outer: float) -> float:
    """Centre weight of the three stacked boxes: what a row through the impulse sums to."""
    box = np.array([outer] + [inner] * (2 * whole + 1) + [outer])
    stacked = np.convolve(np.convolve(box, box), box)
    return float(stacked.max())


@pytest.mark.parametrize("recipe", ["v1", "v2"])
def test_whole_views_of_photographs(photographs: list[bytes], recipe: str) -> None:
    """Decoded by the executor itself, at full size."""
    config = AugmentConfig(recipe=recipe, hue=0.4 if recipe == "v1" else 0.1)  # type: ignore[arg-type]
    images = [open_rgb(data) for data in photographs]
    sizes = np.array([image.size for image in images], np.int32)
    table = view_table(config, draw_uniforms(0, 0, 0, 0, len(images)), sizes)
    canvas = Canvas(config.image_size, recipe)
    for row, data in enumerate(photographs):
        expected = execute(images[row], table, row, config.image_size, recipe).astype(np.int64)
        wrong = np.abs(expected - canvas.execute(decode_tensor(data, RGB8), table, row))
        assert wrong.mean() < 1, row
