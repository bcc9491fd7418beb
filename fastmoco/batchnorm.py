"""Batch normalization over virtual groups inside one device.

The published recipe normalizes per GPU, 32 images at a time, and shuffling keys between those
groups is what keeps BN from leaking which key is positive (arXiv 1911.05722, section 3.3).
Splitting the batch of one device into groups gives a single GPU, or one with a large local batch,
the same protection.

N batch, G group size, C channels, H W spatial.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SplitBatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` applied to each run of `group_size` consecutive samples by itself.

    Parameters and buffers are those of `BatchNorm2d`, so checkpoints interchange. In training, the
    running statistics move once per forward by the *mean over groups* of the group statistics: what
    the average over GPUs would be if each group were a GPU. In evaluation nothing is split.

    Raises `ValueError` in a training forward whose batch is not a multiple of `group_size`.
    """

    def __init__(self, num_features: int, group_size: int, momentum: float = 0.1) -> None:
        super().__init__(num_features, momentum=momentum)
        self.group_size = group_size

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape, dtype and memory format."""
        if not self.training or input.shape[0] == self.group_size:
            return super().forward(input)
        if input.shape[0] % self.group_size:
            raise ValueError(
                f"batch of shape {tuple(input.shape)} is no multiple of BN group {self.group_size}"
            )
        if torch.compiler.is_compiling():
            return self._forward_batched(input)
        return self._forward_by_group(input)

    def _forward_by_group(self, x: Tensor) -> Tensor:
        """One library kernel per group: fastest without a compiler, channels-last throughout."""
        groups = x.shape[0] // self.group_size
        momentum = self.momentum or 0.0
        out = []
        for index, group in enumerate(x.split(self.group_size)):
            # Weights of successive updates such that every group ends up with momentum / groups.
            share = (momentum / groups) / (1 - (groups - 1 - index) * momentum / groups)
            out.append(
                F.batch_norm(
                    group,
                    self.running_mean,
                    self.running_var,
                    self.weight,
                    self.bias,
                    training=True,
                    momentum=share,
                    eps=self.eps,
                )
            )
        self._count_batch()
        return torch.cat(out)

    def _forward_batched(self, x: Tensor) -> Tensor:
        """All groups in one reduction and one pointwise pass, for Inductor to fuse."""
        n, c, h, w = x.shape
        groups = n // self.group_size
        # permute + view: a view of channels-last memory, so the compiler sees no transposition.
        grouped = x.permute(0, 2, 3, 1).reshape(groups, self.group_size * h * w, c)
        grouped = grouped.to(self.weight.dtype)
        var, mean = torch.var_mean(grouped, dim=1, correction=0)
        scale = torch.rsqrt(var + self.eps) * self.weight
        shift = self.bias - mean * scale
        out = (grouped * scale[:, None] + shift[:, None]).to(x.dtype)
        with torch.no_grad():
            count = self.group_size * h * w
            momentum = self.momentum or 0.0
            assert self.running_mean is not None
            assert self.running_var is not None
            self.running_mean.lerp_(mean.mean(0), momentum)
            self.running_var.lerp_(var.mean(0) * (count / (count - 1)), momentum)
        self._count_batch()
        return out.view(n, h, w, c).permute(0, 3, 1, 2)

    def _count_batch(self) -> None:
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
