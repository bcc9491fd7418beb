"""What the layers of ResNet-50 launch at 256 images of 224 pixels, as aot.py compiles it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmoco_kernels.info_nce_launch import MULTIPROCESSORS
from fastmoco_kernels.launch import Launch
from fastmoco_kernels.network.batch_norm_launch import (
    backward_plan,
    launch_configuration,
    normalize_plan,
    shape_of,
    statistics_plan,
)

# Passes over a tensor: statistics, normalization, sums for the gradient, gradient of the input.
PASSES = {False: (1, 2, 2, 3), True: (1, 3, 4, 3)}
NAMES = (
    *("statistics", "merge of statistics", "normalization"),
    *("sums for the gradient", "merge of sums", "input gradient"),
)


def layer_launches(arch: int) -> list[tuple[str, Launch, int]]:
    """Name, launch and least bytes moved, on sm_`arch`."""
    return [
        *batch_norm_launches(256, 64, 112, False, torch.bfloat16, arch),
        *batch_norm_launches(256, 256, 56, True, torch.bfloat16, arch),
    ]


def batch_norm_launches(
    n: int, c: int, side: int, added: bool, dtype: torch.dtype, arch: int, groups: int = 8
) -> list[tuple[str, Launch, int]]:
    """Batch norm, addition where `added`, and ReLU of (n, c, side, side), and the backward."""

    def meta(*shape: int) -> Tensor:
        return torch.empty(*shape, device="meta")

    x = meta(n, c, side, side).to(dtype, memory_format=torch.channels_last)
    tiles = launch_configuration(groups, n * side * side // groups, c, MULTIPROCESSORS[arch])
    shape = shape_of(x, groups, tiles)
    counter = torch.empty((), dtype=torch.int64, device="meta")
    launches, mean, var = statistics_plan(x, meta(c), meta(c), counter, 0.1, shape)
    affine = {"weight": meta(c), "bias": meta(c), "mean": mean, "var": var}
    last, y = normalize_plan(x, x if added else None, affine, 1e-5, True, shape)
    backward = backward_plan(x, x, y if added else None, affine, 1e-5, True, shape)
    name = f"{n}x{c}x{side}x{side} {str(dtype)[6:]}{' with addition' * added}"
    size, part = x.numel() * x.element_size(), shape.partials(x).numel() * 4
    first, second, third, fourth = (passes * size for passes in PASSES[added])
    return [
        (f"batch norm, {kind} {name}", launch, moved)
        for kind, launch, moved in zip(
            NAMES,
            [*launches, last, *backward.launches],
            (first, part, second, third, part, fourth),
            strict=True,
        )
    ]
