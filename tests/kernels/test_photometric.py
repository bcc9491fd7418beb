"""The reference of the photometric op against PIL, its registration, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastmoco_kernels as ops
from fastmoco.config import AugmentConfig
from fastmoco.data import photometric_rows as rows_module
from fastmoco.data.backends import pil
from fastmoco.data.photometric_rows import photometric_rows
from fastmoco.data.table import HUE
from fastmoco_kernels.views import photometric as op_module
from fastmoco_kernels.views import photometric_reference as reference
from fastmoco_kernels.views import photometric_triton as kernels
from tests.support.oracles.photometric import by_pil, small_views, table_for

ALWAYS = AugmentConfig(jitter_p=1, grayscale_p=0.3, blur_p=0.7, hue=0.5)


@pytest.mark.parametrize("recipe", ["v1", "v2"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"brightness": 1.5, "contrast": 1.5, "saturation": 3},
        {"hue": 0.002},  # shifts of 0, which still go through HSV
        {"hue": 0, "brightness": 0},
        {"jitter_p": 0, "blur_p": 1, "blur_min": 0, "blur_max": 3},
        {"jitter_p": 0, "blur_p": 1, "blur_min": 3, "blur_max": 16},
    ],
)
def test_equals_pil(change: dict[str, Any], recipe: Any) -> None:
    augment = replace(ALWAYS, recipe=recipe, **change)
    for side in (8, 33):
        views = small_views(40, side)
        table = table_for(views, augment)
        rows = torch.from_numpy(photometric_rows(table, recipe))
        got = ops.photometric(torch.from_numpy(views), rows).numpy()
        assert np.array_equal(got, by_pil(views, table, recipe))


def test_the_boxes_of_every_sigma_have_pils_weights() -> None:
    """An impulse of every height shows each weight to the last bit that matters."""
    sigmas = np.concatenate([np.linspace(0.01, 16, 200), np.sqrt([0.75, 2, 3.75, 6, 8.75, 12])])
    ramp = np.zeros((len(sigmas), 64, 64, 3), np.uint8)
    ramp[:, :, 32] = np.arange(192).reshape(64, 3) + 64
    table = table_for(ramp, replace(ALWAYS, jitter_p=0, grayscale_p=0, flip_p=0))
    table = replace(table, sigma=sigmas.astype(np.float32))
    rows = torch.from_numpy(photometric_rows(table, "v2"))
    got = ops.photometric(torch.from_numpy(ramp), rows).numpy()
    assert np.array_equal(got, by_pil(ramp, table, "v2"))


def colours(step: int) -> np.ndarray:
    """Every step-th level of each channel in all combinations, as (H, W, 3)."""
    levels = np.arange(0, 256, step, dtype=np.uint8)
    planes = np.meshgrid(levels, levels, levels, indexing="ij")
    return np.stack(planes, axis=-1).reshape(len(levels), -1, 3)


@pytest.mark.parametrize(("step", "amount"), [(3, 1), (5, 77), (7, 200)])
def test_hue_equals_pils_for_colours_of_the_whole_cube(step: int, amount: int) -> None:
    pixels = colours(step)
    got = reference.shift_hue(torch.from_numpy(pixels).permute(2, 0, 1).float(), amount)
    want = hue_by_pil(pixels, amount)
    assert np.array_equal(got.permute(1, 2, 0).numpy(), want)


@pytest.mark.slow
def test_hue_equals_pils_for_every_colour() -> None:
    pixels = colours(1)
    want = hue_by_pil(pixels, 100)
    for part, expected in zip(np.split(pixels, 16), np.split(want, 16), strict=True):
        got = reference.shift_hue(torch.from_numpy(part).permute(2, 0, 1).float(), 100)
        assert np.array_equal(got.permute(1, 2, 0).numpy(), expected)


def hue_by_pil(pixels: np.ndarray, amount: int) -> np.ndarray:
    """torchvision's shift of the hue by the factor that it turns into this amount."""
    signed = amount if amount < 128 else amount - 256
    factor = (signed + (0.5 if signed > 0 else -0.5)) / 255
    return np.asarray(pil.COLOUR[HUE](Image.fromarray(pixels), factor))


def test_the_op_and_the_rows_mean_the_same_columns() -> None:
    assert op_module.COLUMNS == rows_module.COLUMNS
    for name in ("FLIP", "RADIUS", "INNER", "OUTER", "BEFORE_CONTRAST", "SLOTS"):
        assert getattr(kernels, name).value == getattr(rows_module, name), name


def test_is_registered_and_changes_neither_input() -> None:
    views = torch.from_numpy(small_views(3, 8))
    table = table_for(views.numpy(), ALWAYS)
    rows = torch.from_numpy(photometric_rows(table, "v2"))
    torch.library.opcheck(op_module._photometric, (views, rows))
    before = views.clone(), rows.clone()
    assert not torch.equal(ops.photometric(views, rows), views)
    assert torch.equal(views, before[0])
    assert torch.equal(rows, before[1])
    assert ops.photometric(views[:0], rows[:0]).shape == (0, 8, 8, 3)


@pytest.mark.parametrize(
    ("views", "rows", "message"),
    [
        (torch.zeros(2, 4, 4, 3), torch.zeros(2, 19), "uint8 views"),
        (torch.zeros(2, 4, 5, 3).byte(), torch.zeros(2, 19), "uint8 views"),
        (torch.zeros(2, 3, 4, 4).byte(), torch.zeros(2, 19), "uint8 views"),
        (torch.zeros(2, 4, 4, 3).byte(), torch.zeros(1, 19), "float32 rows"),
        (torch.zeros(2, 4, 4, 3).byte(), torch.zeros(2, 19).double(), "float32 rows"),
        (torch.zeros(2, 4, 4, 3).byte().transpose(1, 2), torch.zeros(2, 19), "contiguous"),
    ],
)
def test_refuses_what_it_would_get_wrong(
    views: torch.Tensor, rows: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ops.photometric(views, rows)
