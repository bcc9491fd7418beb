"""Rows of the table in the form that `fastmoco_kernels.photometric` executes: numbers only.

The colour operations of a row become a programme of five slots, gray being saturation with factor
0, and the blur the weights of PIL's boxes. Imported by reader processes, so torch is not imported.

N rows.
"""

from __future__ import annotations

import numpy as np

from fastmoco.data.table import BRIGHTNESS, CONTRAST, HUE, SATURATION, Float32, ViewTable

KINDS = {BRIGHTNESS: 1, CONTRAST: 2, SATURATION: 3, HUE: 4}
"""Number of each operation in a slot; 0 is an empty slot."""

BOX = slice(0, 4)
FLIP, RADIUS, INNER, OUTER, BEFORE_CONTRAST, SLOTS = range(4, 10)
COLUMNS = SLOTS + 2 * 5


def photometric_rows(table: ViewTable, recipe: str) -> Float32:
    """(N, COLUMNS) float32. recipe: `v1` turns gray before the jitter, `v2` after it.

    Slot s has its kind at SLOTS + 2s and its factor behind it. Weights are below 2^24: exact.
    """
    rows = np.zeros((len(table), COLUMNS), dtype=np.float32)
    rows[:, BOX] = table.crop
    rows[:, FLIP] = table.flip
    rows[:, [RADIUS, INNER, OUTER]] = box_weights(table.sigma)
    kinds = np.zeros((len(table), 5), np.int64)
    factors = np.zeros((len(table), 5), np.float32)
    gray, jitter = (0, slice(1, 5)) if recipe == "v1" else (4, slice(0, 4))
    kinds[:, gray] = np.where(table.gray, KINDS[SATURATION], 0)
    number_of = np.array([KINDS[operation] for operation in range(4)])
    values = table.factors.astype(np.float64)
    # torchvision: no hue at 0; else truncate toward zero, then wrap around in uint8.
    no_hue = (table.order == HUE) & (values[:, [HUE]] == 0)
    values[:, HUE] = np.trunc(values[:, HUE] * 255) % 256
    kinds[:, jitter] = np.where(table.jitter[:, None] & ~no_hue, number_of[table.order], 0)
    factors[:, jitter] = np.take_along_axis(values, table.order, axis=1)
    is_contrast = kinds == KINDS[CONTRAST]
    rows[:, BEFORE_CONTRAST] = np.where(is_contrast.any(axis=1), is_contrast.argmax(axis=1), -1)
    rows[:, SLOTS::2], rows[:, SLOTS + 1 :: 2] = kinds, factors
    return rows


def box_weights(sigma: Float32) -> Float32:
    """(N, 3): whole radius of PIL's boxes, weight of a pixel inside and of each end, of 2^24.

    In float32 where PIL's C code has a float and in float64 where it has a double. Radius -1 where
    sigma is 0. Source of the formula: see `fastmoco.data.pixels.banded.box_radius`.
    """
    one, three, six = np.float32(1), np.float32(3), np.float32(6)
    variance = sigma.astype(np.float32) * sigma.astype(np.float32) / three
    length = np.sqrt(12.0 * variance.astype(np.float64) + 1.0).astype(np.float32)
    whole = np.floor((length.astype(np.float64) - 1.0) / 2.0).astype(np.float32)
    share = (2 * whole + one) * (whole * (whole + one) - three * variance)
    share /= six * (variance - (whole + one) * (whole + one))
    radius = whole + share
    floor = radius.astype(np.int64)
    inner = (np.float32(2**24) / (radius * np.float32(2) + one)).astype(np.int64)
    outer = (2**24 - (2 * floor + 1) * inner) // 2
    weights = np.stack([floor, inner, outer], axis=1)
    return np.where(sigma[:, None] > 0, weights, [-1, 0, 0]).astype(np.float32)
