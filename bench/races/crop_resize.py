"""Boxes of a ragged list of pictures, resized: n pictures, two views of each, side S."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from bench.races.race import Race
from fastmoco.config import AugmentConfig
from fastmoco.data.table import draw_uniforms, view_table
from fastmoco_kernels import crop_resize
from fastmoco_kernels.views import crop_resize_reference as reference

HEIGHT, WIDTH = 375, 500  # as most of ImageNet


def crop_resize_race(n: int, side: int, device: torch.device) -> Race:
    """MoCo v2's boxes, drawn as in training, on noise; the truth is the reference's on the CPU.

    torch's own antialiased resize rounds once less than PIL: by a level at most.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (n, 3, HEIGHT, WIDTH)
    pictures = list(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator))
    sizes = np.full((n, 2), (WIDTH, HEIGHT), np.int32)
    tables = [view_table(AugmentConfig(), draw_uniforms(0, 0, v, 0, n), sizes) for v in (0, 1)]
    boxes = torch.from_numpy(np.concatenate([table.crop for table in tables]))
    which = torch.arange(n).repeat(2)
    truth = reference.crop_resize(pictures, which, boxes, side).to(device)
    ways = {
        "torch": lambda *pictures: [by_torch(pictures, which, boxes, side)],
        "fastmoco": lambda *pictures: [crop_resize(pictures, which, boxes, side)],
    }
    # Each box is read once and each view written once.
    read = 3 * int(boxes[:, 2:].prod(dim=1).sum())
    case = {"n": n, "side": side, "least_bytes": read + truth.numel()}
    return Race("crop_resize", case, ways, [truth], 5e-3, [one.to(device) for one in pictures])


def by_torch(pictures: tuple[Tensor, ...], which: Tensor, boxes: Tensor, side: int) -> Tensor:
    """View by view with `interpolate`, in float32 as it has no other type on CUDA."""
    views = []
    for number, (top, left, height, width) in zip(which.tolist(), boxes.tolist(), strict=True):
        cut = pictures[number][None, :, top : top + height, left : left + width].float()
        resized = interpolate(cut, size=(side, side), mode="bilinear", antialias=True)
        views.append(resized.round().clamp(0, 255).byte()[0].permute(1, 2, 0))
    return torch.stack(views)
