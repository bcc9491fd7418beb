"""Float views against float64 from the definitions, in every number of channels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fastmoco.config import AugmentConfig
from fastmoco.data.backends.array import Canvas, decode_tensor
from fastmoco.data.backends.float_views import FloatCanvas
from fastmoco.data.pixels.banded import blur
from fastmoco.data.pixels.deep import Deep, decode_deep, visible
from fastmoco.data.pixels.rule import RGB8, PixelRule
from fastmoco.data.table import ViewTable, draw_uniforms, view_table
from tests.support.data.images import npy, png
from tests.support.oracles import float_oracle

SIDE, ROWS = 10, 6
SIZES = [(31, 23), (9, 40), (12, 11)]


def table_of(config: AugmentConfig, size: tuple[int, int], seed: int) -> ViewTable:
    sizes = np.array([size] * ROWS, np.int32)
    return view_table(config, draw_uniforms(seed, 0, 0, 0, ROWS), sizes)


@pytest.mark.parametrize("backend", ["array", "pil"])
@pytest.mark.parametrize("channels", [1, 3, 4, 13])
@pytest.mark.parametrize("recipe", ["v1", "v2"])
def test_views_equal_the_oracle(recipe: str, channels: int, backend: str) -> None:
    config = AugmentConfig(recipe=recipe, image_size=SIDE, blur_p=0.7)  # type: ignore[arg-type]
    if channels != 3:
        config = replace(config, grayscale_p=0.0, saturation=0.0, hue=0.0)
    canvas = FloatCanvas(SIDE, recipe, channels, backend)
    for seed, (width, height) in enumerate(SIZES):
        rng = np.random.default_rng(seed)
        # Around the middle: the HSV of the oracle knows no negative values.
        values = rng.integers(20_000, 45_000, (channels, height, width), np.uint16)
        low, high = 10.0, 65000.0
        image = (values.transpose(1, 2, 0) - low) * 255 / (high - low)
        table = table_of(config, (width, height), seed)
        for row in range(ROWS):
            expected = float_oracle.view(image, table, row, SIDE, recipe)
            assert (expected > 0).all()
            found = canvas.execute(Deep(values, low, high), table, row)
            assert found.shape == (SIDE, SIDE, channels)
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, expected, atol=2e-3)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 1.9, 3.3, 9.0])
def test_blur_has_the_variance_of_its_sigma(sigma: float) -> None:
    point = np.zeros((1, 81, 81), np.float32)
    point[0, 40, 40] = 1
    found = blur(point, sigma)[0].astype(np.float64)
    place = np.arange(81) - 40
    assert found.sum() == pytest.approx(1, abs=1e-5)
    assert (found.sum(axis=0) * place**2).sum() == pytest.approx(sigma**2, rel=1e-3)
    assert (found.sum(axis=1) * place**2).sum() == pytest.approx(sigma**2, rel=1e-3)


def test_the_range_is_linear_and_clips_nothing() -> None:
    values = np.array([[[0, 40000, 40255, 40001, 65535]]], np.uint16)
    found = Deep(values, 40000.0, 40255.0).box(0, 0, 1, 5)[0, 0]
    np.testing.assert_array_equal(found, [-40000, 0, 255, 1, 25535])
    # Neighbouring integers stay apart where float32 could not tell them.
    large = np.array([[[2**31 - 2, 2**31 - 1]]], np.uint32)
    np.testing.assert_array_equal(
        Deep(large, 2.0**31 - 2, 2.0**31 - 1).box(0, 0, 1, 2)[0, 0], [0, 255]
    )


def test_hue_outside_of_the_range_keeps_value_and_chroma() -> None:
    canvas = FloatCanvas(4, "v2", 3, "array")
    values = np.random.default_rng(0).normal(0, 400, (3, 4, 4)).astype(np.float32)
    canvas.planes = values.copy()
    canvas.shift_hue(0.3)
    np.testing.assert_allclose(canvas.planes.max(axis=0), values.max(axis=0), rtol=1e-5)
    np.testing.assert_allclose(canvas.planes.min(axis=0), values.min(axis=0), atol=1e-3)
    canvas.shift_hue(-0.3)
    np.testing.assert_allclose(canvas.planes, values, atol=2e-3)


def test_8_bit_rgb_as_float_is_the_8_bit_view_without_its_roundings() -> None:
    """The two families of backends do the same to a picture that both can take."""
    config = AugmentConfig(image_size=SIDE, hue=0.0)
    rng = np.random.default_rng(3)
    pixels = rng.integers(60, 140, (40, 50, 3), np.uint8)  # jitter stays within 0..255
    data = png(pixels)
    table = table_of(config, (50, 40), 5)
    canvas, whole = FloatCanvas(SIDE, "v2", 3, "array"), Canvas(SIDE, "v2")
    image = decode_deep(data, PixelRule(intensity=(0.0, 1.0)))
    for row in range(ROWS):
        expected = whole.execute(decode_tensor(data, RGB8), table, row)
        # Each of four colour operations truncates: up to a level each, times factors up to 1.4.
        assert np.abs(canvas.execute(image, table, row) - expected).max() < 6


def test_gray_as_rgb_is_three_equal_channels() -> None:
    values = np.arange(20, dtype=np.uint16).reshape(4, 5) * 1000
    image = decode_deep(npy(values), PixelRule(intensity=(0.0, 19000.0)))
    assert image.values.shape == (3, 4, 5)
    table = table_of(AugmentConfig(image_size=8, jitter_p=0, blur_p=0), (5, 4), 0)
    found = FloatCanvas(8, "v2", 3, "array").execute(image, table, 0)
    assert (found == found[..., :1]).all()
    assert np.unique(found).size > 8


def test_what_people_see_is_clipped_and_has_three_channels() -> None:
    view = np.array([[[-5.0, 100.4, 300.0, 7.0]]], np.float32)
    assert visible(view).tolist() == [[[0, 100, 255]]]
    assert visible(view[..., 1:2]).tolist() == [[[100, 100, 100]]]
