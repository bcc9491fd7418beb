"""Colours, blur and flip of resized views: n views, side S."""

from __future__ import annotations

import numpy as np
import torch

from bench.races.race import Race
from fastmoco.config import AugmentConfig
from fastmoco.data.photometric_rows import photometric_rows
from fastmoco.data.table import draw_uniforms, view_table
from fastmoco_kernels import photometric
from fastmoco_kernels.views import photometric_reference as reference


def photometric_race(n: int, side: int, device: torch.device) -> Race:
    """MoCo v2's rows, drawn as in training, on noise; the truth is the reference's on the CPU.

    On a GPU the reference misses a few pixels by a level: torch's own kernels round sums of
    products once. Ours are held to every pixel by `tests/kernels/test_gpu.py`.
    """
    generator = torch.Generator().manual_seed(0)
    views = torch.randint(0, 256, (n, side, side, 3), dtype=torch.uint8, generator=generator)
    sizes = np.full((n, 2), side, np.int32)
    table = view_table(AugmentConfig(), draw_uniforms(0, 0, 0, 0, n), sizes)
    rows = torch.from_numpy(photometric_rows(table, "v2"))
    truth = [reference.photometric(views, rows).to(device)]
    ways = {
        "eager": lambda views, rows: [reference.photometric(views, rows)],
        "fastmoco": lambda views, rows: [photometric(views, rows)],
    }
    # Each view is read once and written once.
    case = {"n": n, "side": side, "least_bytes": 2 * views.numel()}
    inputs = [views.to(device), rows.to(device)]
    return Race("photometric", case, ways, truth, 1e-4, inputs)
