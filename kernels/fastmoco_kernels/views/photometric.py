"""The photometric half of the augmentation: jitter, gray, blur and flip of resized uint8 views.

What torchvision and PIL do to a view after the crop, in the order that its row says, rounded to
uint8 after every operation as there. A row has COLUMNS numbers (columns 0 to 3 are the crop's):

    4           whether the view is mirrored
    5, 6, 7     radius of PIL's boxes (-1: no blur), weight of their inside and of their two ends
    8           slots before that of contrast (-1: none)
    9 ...       five slots of an operation (0: none) and its factor: 1 brightness, 2 contrast,
                3 saturation (with factor 0: gray), 4 hue (factor in 1/256 turn)

A blend is d + f (x - d), where d is black, the mean gray of the view, or the gray of the pixel.
The result stays uint8: a quarter of the bytes for the exchange of shuffle-BN, and the encoder's
first operation normalizes. No gradient. B views, S side of a view.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmoco_kernels import launch
from fastmoco_kernels.launch import Launch, triton
from fastmoco_kernels.views import photometric_reference as reference
from fastmoco_kernels.views import photometric_triton as kernels

COLUMNS = 19
MAX_SIDE = 4096  # the sum of the luminance of a larger view passes 2^32


def launches(views: Tensor, rows: Tensor) -> tuple[list[Launch], Tensor]:
    """The three launches over views (B, S, S, 3) and rows (B, COLUMNS), and the views they fill.

    A program has 1,024 pixels, then whole lines of about 4,000, four per thread at a time (eight
    spill on sm_100), then a strip of 64 bytes per line, of which a thread has 16.
    """
    count, side = views.shape[:2]
    out = torch.empty_like(views)
    chunks = triton.cdiv(side * side, 1024)
    lines = max(1, min(side, 4096 // side))
    sums = torch.empty(count, chunks, dtype=torch.int32, device=views.device)
    shared = {"rows": rows, "COLUMNS": COLUMNS, "SIDE": side}
    both = {"out": out, "scratch": torch.empty_like(views)}
    summed = {"views": views, "sums": sums, "CHUNKS": chunks, "BLOCK": 1024}
    grouped = {"BLOCK_CHUNKS": triton.next_power_of_2(chunks), "LINES": lines, "BLOCK": 512}
    work = [
        (kernels.luminance_kernel, chunks, summed),
        (kernels.colour_kernel, triton.cdiv(side, lines), {**summed, **both, **grouped}),
        (kernels.columns_kernel, triton.cdiv(side * 3, 64), {**both, "WIDTH": 64, "BLOCK": 32}),
    ]
    return [
        Launch(kernel, (count * programs,), {**shared, **more}, 4, fused_multiply_add=False)
        for kernel, programs, more in work
    ], out


def recipe_launches(views: int, side: int) -> list[tuple[str, Launch, int]]:
    """Names, launches over meta tensors, and least bytes moved where half of the views blur."""
    pixels = torch.empty(views, side, side, 3, dtype=torch.uint8, device="meta")
    work, _ = launches(pixels, torch.empty(views, COLUMNS, device="meta"))
    size = pixels.numel()
    return [
        ("photometric luminance", work[0], size),
        ("photometric colours and rows of boxes", work[1], 2 * size),
        ("photometric columns of boxes", work[2], size),
    ]


def photometric_triton(views: Tensor, rows: Tensor) -> Tensor:
    """`photometric` by the Triton kernels: on CUDA, or on the CPU under the interpreter."""
    work, out = launches(views, rows)
    for one in work:
        one.run()
    return out


@torch.library.custom_op("fastmoco::photometric", mutates_args=(), device_types="cpu")
def _photometric(views: Tensor, rows: Tensor) -> Tensor:
    return reference.photometric(views, rows)


@_photometric.register_kernel("cuda")
def _(views: Tensor, rows: Tensor) -> Tensor:
    if "photometric" in launch.replaced():
        return reference.photometric(views, rows)
    return photometric_triton(views, rows)


@_photometric.register_fake
def _(views: Tensor, rows: Tensor) -> Tensor:
    return torch.empty_like(views)


def photometric(views: Tensor, rows: Tensor) -> Tensor:
    """The views as their rows change them: a new uint8 (B, S, S, 3), channels last.

    views: contiguous uint8 (B, S, S, 3). rows: contiguous float32 (B, COLUMNS) on the same device,
    of which nothing is read on the host. Raises ValueError naming the shapes.
    """
    shapes = f"views {views.dtype} {tuple(views.shape)}, rows {rows.dtype} {tuple(rows.shape)}"
    square = views.ndim == 4 and views.shape[1] == views.shape[2] and views.shape[3] == 3
    if views.dtype != torch.uint8 or not square or not 1 <= views.shape[1] <= MAX_SIDE:
        raise ValueError(f"expected uint8 views (B, S, S, 3), S up to {MAX_SIDE}, got {shapes}")
    if rows.dtype != torch.float32 or rows.shape != (len(views), COLUMNS):
        raise ValueError(f"expected float32 rows (B, {COLUMNS}), got {shapes}")
    if rows.device != views.device or not (views.is_contiguous() and rows.is_contiguous()):
        raise ValueError(f"expected contiguous tensors on one device, got {shapes}")
    if len(views) == 0:
        return views.clone()
    changed: Tensor = _photometric(views, rows)
    return changed
