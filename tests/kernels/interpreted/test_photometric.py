"""The Triton kernels of the views, interpreted on the CPU, against PIL itself: equal pixels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fastmoco.config import AugmentConfig
from fastmoco.data.photometric_rows import KINDS, photometric_rows
from fastmoco.data.table import CONTRAST, HUE
from fastmoco_kernels.views.photometric import launches, photometric_triton
from tests.kernels.interpreter import watched
from tests.support.oracles.photometric import by_pil, small_views, table_for

ALWAYS = AugmentConfig(jitter_p=1, grayscale_p=0.4, blur_p=0.5, hue=0.5)


def check(augment: AugmentConfig, count: int, side: int) -> None:
    views = small_views(count, side)
    table = table_for(views, augment)
    rows = torch.from_numpy(photometric_rows(table, augment.recipe))
    got = photometric_triton(torch.from_numpy(views), rows).numpy()
    assert np.array_equal(got, by_pil(views, table, augment.recipe))


@pytest.mark.parametrize("recipe", ["v1", "v2"])
def test_whole_rows_are_pils(recipe: Any) -> None:
    """Sides of several blocks, of lanes that are not a multiple of one, and of odd length."""
    check(replace(ALWAYS, recipe=recipe), 5, 17)
    check(replace(ALWAYS, recipe=recipe, blur_p=0.3), 3, 36)


def test_factors_that_overshoot_are_clipped_and_truncated_as_pils() -> None:
    check(replace(ALWAYS, brightness=1.5, contrast=1.5, saturation=3, blur_p=0, hue=0), 8, 12)


def test_colours_whose_hue_float32_alone_gets_wrong() -> None:
    """Of every third level in all combinations those that a sum in float32 turns elsewhere."""
    levels = np.arange(0, 256, 3, dtype=np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 3)
    value, low = (pick(cube, axis=1).astype(np.float32) for pick in (np.max, np.min))
    rest = (value[:, None] - cube) / np.maximum(value - low, 1)[:, None]
    from_green = (cube[:, 1] == value) & (cube[:, 0] != value)
    single = 2 + rest[:, 0] - rest[:, 2]
    double = (2 + rest[:, 0].astype(np.float64) - rest[:, 2]).astype(np.float32)
    hard = cube[from_green & (np.floor(single / 6 * 255) != np.floor(double / 6 * 255))]
    assert len(hard) > 300
    views = hard[:256].reshape(1, 16, 16, 3)
    table = table_for(views, replace(ALWAYS, blur_p=0, flip_p=0, grayscale_p=0))
    table = replace(table, order=np.array([[HUE, CONTRAST, 0, 2]]))
    table.factors[:] = [[1, 1, 1, 0.3]]
    rows = torch.from_numpy(photometric_rows(table, "v2"))
    got = photometric_triton(torch.from_numpy(views), rows).numpy()
    assert np.array_equal(got, by_pil(views, table, "v2"))


def test_boxes_wider_than_the_view_and_narrower_than_a_pixel() -> None:
    check(replace(ALWAYS, jitter_p=0, blur_p=1, blur_min=5, blur_max=16), 2, 9)
    check(replace(ALWAYS, jitter_p=0, blur_p=1, blur_min=0.05, blur_max=0.3), 2, 9)


def test_every_place_of_contrast_and_hue_occurs() -> None:
    """So that the two tests above cover the order of the operations."""
    views = small_views(16, 8)
    order = table_for(views, ALWAYS).order
    assert set(np.argmax(order == CONTRAST, axis=1)) == {0, 1, 2, 3}
    assert set(np.argmax(order == HUE, axis=1)) == {0, 1, 2, 3}
    check(replace(ALWAYS, blur_p=0), 16, 8)
    assert sorted(KINDS.values()) == [1, 2, 3, 4]


def test_three_launches_that_stay_in_their_tensors_and_never_share_a_pixel() -> None:
    views = small_views(2, 65)
    table = table_for(views, replace(ALWAYS, blur_p=1, jitter_p=0, grayscale_p=0))
    rows = torch.from_numpy(photometric_rows(table, "v2"))
    work, out = launches(torch.from_numpy(views), rows)
    assert len(work) == 3
    with watched() as watch:
        for one in work:
            one.run()
    # Of a view five chunks of pixels, then 63 lines and two more, then four strips of bytes.
    assert len(watch.programs) == 2 * 5
    assert np.array_equal(out.numpy(), by_pil(views, table, "v2"))
