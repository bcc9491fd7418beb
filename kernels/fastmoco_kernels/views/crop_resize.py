"""Boxes of pictures, which differ in size, resized to uint8 views: the input of `photometric`.

By PIL's antialiased bilinear filter, with its weights of 22 bits and its rounding to 8 bits between
the passes along the width and along the height: equal in every pixel to cropping the box and
resizing it with Pillow 13. Boxes are read on the host, which knows them, and checked against their
pictures, so that no program reads outside. No gradient. B views, S side of a view.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmoco_kernels import launch
from fastmoco_kernels.launch import Launch, triton
from fastmoco_kernels.views import crop_resize_reference as reference
from fastmoco_kernels.views import crop_resize_triton as kernels

COLUMNS = 11  # of a row of the table, see `crop_resize_triton`
MAX_SIDE = 4096
_TURNED = [0, 1, 3, 2, 5, 4, 7, 6, 9, 8]  # lines for columns, in every pair of a row


def launches(table: Tensor, taps: int, side: int) -> tuple[list[Launch], Tensor]:
    """The two launches over a table (B, COLUMNS) int64, and the views (B, S, S, 3) they fill.

    taps: the most of any view. A program has eight lines of 64 pixels, a thread one column.
    """
    count, device = len(table), table.device
    out = torch.empty(count, side, side, 3, dtype=torch.uint8, device=device)
    room = taps + 1
    coefficients = torch.empty(count, 2, room, side, dtype=torch.int32, device=device)
    shared = {"table": table, "coefficients": coefficients, "ROOM": room, "SIDE": side}
    programs = count * triton.cdiv(side, 8) * triton.cdiv(side, 64)
    resizing = {**shared, "out": out, "LINES": 8, "WIDTH": 64}
    return [
        Launch(
            kernels.coefficients_kernel,
            (count * 2 * triton.cdiv(side, 128),),
            {**shared, "BLOCK": 128},
            4,
            fused_multiply_add=False,
        ),
        Launch(kernels.resize_kernel, (programs,), resizing, 2),
    ], out


def recipe_launches(views: int, side: int) -> list[tuple[str, Launch, int]]:
    """Names, launches over a meta table, and least bytes moved for boxes of 350 x 350 pixels."""
    table = torch.empty(views, COLUMNS, dtype=torch.int64, device="meta")
    taps = reference.taps(350, side)
    work, out = launches(table, taps, side)
    weights = 4 * views * 2 * (taps + 1) * side
    return [
        ("crop_resize coefficients", work[0], weights),
        ("crop_resize", work[1], weights + 3 * views * 350**2 + out.numel()),
    ]


def table_of(pictures: Sequence[Tensor], which: Tensor, boxes: Tensor, side: int) -> Tensor:
    """(B, COLUMNS) int64 on the host: what the kernels know of each view."""
    known = torch.tensor([[p.data_ptr(), *p.stride()] for p in pictures], dtype=torch.int64)
    taps = 2 * (boxes[:, 2:].double() / side).clamp(min=1).ceil().long() + 1
    turned = reference.height_first(boxes[:, 2], boxes[:, 3], side)[:, None]
    rows = torch.cat([known[which], boxes, taps], dim=1)
    rows = torch.where(turned, rows[:, _TURNED], rows)
    return torch.cat([rows, turned.long()], dim=1)


def crop_resize_triton(
    pictures: Sequence[Tensor], which: Tensor, boxes: Tensor, side: int
) -> Tensor:
    """`crop_resize` by the Triton kernels: on CUDA, or on the CPU under the interpreter."""
    table = table_of(pictures, which, boxes, side)
    taps = int(table[:, 8:10].max())
    if pictures[0].device.type == "cuda":  # from pinned memory, so that the host does not wait
        table = table.pin_memory().to(pictures[0].device, non_blocking=True)
    work, out = launches(table, taps, side)
    for one in work:
        one.run()
    return out


@torch.library.custom_op("fastmoco::crop_resize", mutates_args=(), device_types="cpu")
def _crop_resize(pictures: list[Tensor], which: Tensor, boxes: Tensor, side: int) -> Tensor:
    return reference.crop_resize(pictures, which, boxes, side)


@_crop_resize.register_kernel("cuda")
def _(pictures: list[Tensor], which: Tensor, boxes: Tensor, side: int) -> Tensor:
    replaced = "crop_resize" in launch.replaced()
    implementation = reference.crop_resize if replaced else crop_resize_triton
    return implementation(pictures, which, boxes, side)


@_crop_resize.register_fake
def _(pictures: list[Tensor], which: Tensor, boxes: Tensor, side: int) -> Tensor:
    return pictures[0].new_empty(len(which), side, side, 3)


def crop_resize(pictures: Sequence[Tensor], which: Tensor, boxes: Tensor, side: int) -> Tensor:
    """View b is box b of picture which[b], resized: uint8 (B, S, S, 3), channels last.

    pictures: uint8 (3, H, W) of any sizes and strides, on one device. which: int64 (B,) on the
    host. boxes: int64 (B, 4) on the host: top, left, height, width. side: S. Raises ValueError
    naming the shapes, or the first box that is not inside of its picture.
    """
    if not pictures or not 1 <= side <= MAX_SIDE:
        raise ValueError(
            f"expected pictures and a side up to {MAX_SIDE}, got {len(pictures)} of "
            f"them and side {side}"
        )
    for number, one in enumerate(pictures):
        fits = one.ndim == 3 and len(one) == 3 and one.device == pictures[0].device
        if not fits or one.dtype != torch.uint8:
            raise ValueError(
                "expected uint8 pictures (3, H, W) on one device, got number "
                f"{number}: {one.dtype} {tuple(one.shape)} on {one.device}"
            )
    shapes = f"which {which.dtype} {tuple(which.shape)}, boxes {boxes.dtype} {tuple(boxes.shape)}"
    whole = which.dtype == boxes.dtype == torch.int64
    if not whole or which.ndim != 1 or boxes.shape != (len(which), 4):
        raise ValueError(f"expected int64 which (B,) and boxes (B, 4), got {shapes}")
    if which.device.type != "cpu" or boxes.device.type != "cpu":
        raise ValueError(
            f"expected which and boxes on the host, got {which.device}, {boxes.device}"
        )
    if len(which) == 0:
        return pictures[0].new_empty(0, side, side, 3)
    _check_boxes(pictures, which, boxes)
    views: Tensor = _crop_resize(list(pictures), which, boxes, side)
    return views


def _check_boxes(pictures: Sequence[Tensor], which: Tensor, boxes: Tensor) -> None:
    if int(which.min()) < 0 or int(which.max()) >= len(pictures):
        raise ValueError(f"expected which from 0 to {len(pictures) - 1}, got {which.tolist()}")
    sizes = torch.tensor([one.shape[1:] for one in pictures])[which]
    start, size = boxes[:, :2], boxes[:, 2:]
    outside = ((start < 0) | (size < 1) | (start + size > sizes)).any(dim=1)
    if bool(outside.any()):
        view = int(outside.nonzero()[0])
        raise ValueError(
            f"box {view} is {boxes[view].tolist()} (top, left, height, width), outside of its "
            f"picture of {sizes[view].tolist()}"
        )
