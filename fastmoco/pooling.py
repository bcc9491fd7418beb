"""Max pooling of ResNet's stem, which has a kernel of its own on the CPU.

N batch, C channels, H W spatial.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmoco_kernels.max_pool_cpu import max_pool, supports


class MaxPool2d(nn.MaxPool2d):
    """`torch.nn.MaxPool2d(3, stride=2, padding=1)`."""

    def __init__(self) -> None:
        super().__init__(3, stride=2, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, (H + 1) / 2, (W + 1) / 2), rounded down."""
        if torch.compiler.is_compiling() or not supports(input):
            out: Tensor = super().forward(input)
            return out
        return max_pool(input)
