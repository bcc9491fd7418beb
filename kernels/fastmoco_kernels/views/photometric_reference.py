"""The photometric half of the augmentation in torch, view by view: on the CPU and where it must.

On CUDA it reads the rows back, which synchronizes.
"""

from __future__ import annotations

import torch
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION, HUE = 1, 2, 3, 4
BOXES = 3


def luminance(view: Tensor) -> Tensor:
    """PIL's gray of view (3, S, S): (S, S), whole numbers in float32 as there."""
    red, green, blue = view
    total = red * 19595 + green * 38470 + blue * 7471 + 32768
    return torch.floor(total / 65536)


def blend(view: Tensor, kind: int, factor: float) -> Tensor:
    """d + f (x - d) truncated and clipped, where d is black, the mean gray, or the gray."""
    other = torch.zeros_like(view[0])
    if kind != BRIGHTNESS:
        other = luminance(view)
    if kind == CONTRAST:
        other = torch.floor(other.mean(dtype=torch.float64) + 0.5).to(view.dtype)
    # Not `other + factor * ...`: PIL rounds the factor and each result to float32.
    mixed = (view - other).mul_(torch.tensor(factor, dtype=view.dtype)).add_(other)
    return mixed.clamp_(0, 255).floor_()


def shift_hue(view: Tensor, amount: int) -> Tensor:
    """PIL's way through HSV with its roundings: amount in 1/256 turn."""
    red, green, _ = view
    value = view.amax(0)
    chroma = value - view.amin(0)
    rest = (value - view) / chroma.clamp(min=1)
    from_green = 2.0 + rest[0].double() - rest[2]
    from_blue = 4.0 + rest[1].double() - rest[0]
    place = torch.where(green == value, from_green, from_blue).float()
    place = torch.where(red == value, rest[2] - rest[1], place)
    turns = place / 6
    turns = torch.where(turns < 0, turns + 1, turns)
    hue = ((turns * 255).int() + amount) % 256
    saturation = (chroma * 255 / value.clamp(min=1)).int()
    whole = value.int()
    planes = []
    for offset in (5, 3, 1):
        # In 1/255 of a sixth of a turn; divisions without ties.
        angle = (hue * 6 + 255 * offset) % 1530
        ramp = torch.minimum(angle, 1020 - angle).clamp(0, 255)
        planes.append(whole - (2 * whole * saturation * ramp + 65025) // 130050)
    return torch.stack(planes).to(view.dtype)


def box(view: Tensor, radius: int, inner: int, outer: int) -> Tensor:
    """PIL's box along the last axis of whole numbers (3, S, S) in int64; the ends repeat."""
    side = view.shape[-1]
    place = torch.arange(side, device=view.device)
    total = view * inner
    for step in range(1, radius + 2):
        ends = (
            view[..., (place - step).clamp(min=0)] + view[..., (place + step).clamp(max=side - 1)]
        )
        total += ends * (inner if step <= radius else outer)
    return (total + 2**23) >> 24


def photometric(views: Tensor, rows: Tensor) -> Tensor:
    """See `fastmoco_kernels.views.photometric.photometric`."""
    out = torch.empty_like(views)
    for at, row in enumerate(rows.tolist()):
        flip, radius, inner, outer, _, *slots = row[4:]
        view = views[at].permute(2, 0, 1).float()
        for kind, factor in zip(slots[::2], slots[1::2], strict=True):
            if kind == HUE:
                view = shift_hue(view, int(factor))
            elif kind > 0:
                view = blend(view, int(kind), factor)
        if radius >= 0:
            view = view.long()
            for _ in range(2):
                for _ in range(BOXES):
                    view = box(view, int(radius), int(inner), int(outer))
                view = view.transpose(1, 2)
        out[at] = (view.flip(2) if flip else view).permute(1, 2, 0)
    return out
