"""Crop and resize in torch, view by view: on the CPU and where it must. Boxes are on the host."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BITS = 22


def taps(size: int, side: int) -> int:
    """Most pixels of `size` that PIL makes one of `side` output pixels of."""
    return 2 * math.ceil(max(size / side, 1.0)) + 1


def height_first(height: Tensor, width: Tensor, side: int) -> Tensor:
    """Whether PIL resizes the height of such boxes before their width; it always rounds between.

    Found by trying Pillow 13 out: the height shrinks by more than twice what the width does. Older
    ones always begin with the width, which makes a pixel differ by one level at most.
    """
    return (height > side) & (height - side > 2 * (width - side))


def weights(size: int, side: int) -> Tensor:
    """PIL's weights of `size` pixels in each of `side`: (side, size), whole numbers in float64.

    Source: `precompute_coeffs` and `normalize_coeffs_8bpc` in Pillow's Resample.c.
    """
    scale = size / side
    support = max(scale, 1.0)
    center = (torch.arange(side, dtype=torch.float64) + 0.5) * scale
    first = (center - support + 0.5).long().clamp(min=0)
    end = (center + support + 0.5).long().clamp(max=size)
    places = [first + tap for tap in range(taps(size, side))]
    parts = []
    for place in places:
        distance = ((place.double() - center + 0.5) * (1.0 / support)).abs()
        parts.append(torch.where(place < end, (1.0 - distance).clamp(min=0), 0.0))
    total = torch.zeros_like(center)
    for part in parts:  # one after another, as rounding depends on the order
        total += part
    found = torch.zeros(side, size, dtype=torch.float64)
    for place, part in zip(places, parts, strict=True):
        rounded = (0.5 + part / total * 2**BITS).floor()
        found.scatter_add_(1, place.clamp(max=size - 1)[:, None], rounded[:, None])
    return found


def crop_resize(pictures: Sequence[Tensor], which: Tensor, boxes: Tensor, side: int) -> Tensor:
    """See `fastmoco_kernels.views.crop_resize.crop_resize`."""
    device = pictures[0].device
    out = torch.empty(len(which), side, side, 3, dtype=torch.uint8, device=device)
    turned = height_first(boxes[:, 2], boxes[:, 3], side).tolist()
    rows = zip(out, which.tolist(), boxes.tolist(), turned, strict=True)
    for view, number, (top, left, height, width), first in rows:
        cut = pictures[number][:, top : top + height, left : left + width].double()
        across, down = (weights(size, side).to(device) for size in (width, height))
        # Products and sums are whole numbers below 2^31: exact.
        if first:
            resized = _rounded(_rounded(down @ cut) @ across.T)
        else:
            resized = _rounded(down @ _rounded(cut @ across.T))
        view.copy_(resized.permute(1, 2, 0))
    return out


def _rounded(total: Tensor) -> Tensor:
    return torch.floor((total + 2 ** (BITS - 1)) / 2**BITS)
