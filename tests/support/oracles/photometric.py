"""Small views, rows of the table for them, and what PIL makes of both. S side of a view."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastmoco.config import AugmentConfig
from fastmoco.data.backends import pil
from fastmoco.data.table import ViewTable, draw_uniforms, view_table

Views = NDArray[np.uint8]


def small_views(count: int, side: int, seed: int = 0) -> Views:
    """(count, S, S, 3): noise, and every second one smooth."""
    rng = np.random.default_rng(seed)
    views = rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    for view in views[1::2]:
        view[:] = np.asarray(Image.fromarray(view[:4, :4]).resize((side, side)))
    return views


def table_for(views: Views, augment: AugmentConfig, seed: int = 0) -> ViewTable:
    """Rows of these views, of which the crop takes everything."""
    sizes = np.full((len(views), 2), views.shape[1], np.int32)
    return view_table(augment, draw_uniforms(seed, 0, 0, 0, len(views)), sizes)


def by_pil(views: Views, table: ViewTable, recipe: str) -> Views:
    """What the official pipeline does after the crop, in its order."""
    colour = (pil.gray, pil.jitter) if recipe == "v1" else (pil.jitter, pil.gray)
    found = []
    for row, pixels in enumerate(views):
        view = Image.fromarray(pixels)
        for operation in (*colour, pil.blur, pil.flip):
            view = operation(view, table, row)
        found.append(np.asarray(view))
    return np.stack(found)
