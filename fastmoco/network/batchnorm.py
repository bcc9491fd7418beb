"""Batch normalization over virtual groups inside one device.

The published recipe normalizes per GPU, 32 images at a time, and shuffling keys between those
groups is what keeps BN from leaking which key is positive (arXiv 1911.05722, section 3.3).
Splitting the batch of one device into groups gives a single GPU, or one with a large local batch,
the same protection.

N batch, G group size, C channels, H W spatial.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoco_kernels import batch_norm_act as batch_norm_act_cuda
from fastmoco_kernels import launch, reference
from fastmoco_kernels.network.batch_norm_cpu import batch_norm_act, reason, supports


def norm_choice(device: torch.device, compiled: bool) -> str:
    """Who runs batch norm, addition and ReLU on this device, and why; may compile the CPU form."""
    if compiled and device.type == "cuda" and "batch_norm" not in launch.replaced():
        return "with addition and ReLU in Triton where tensors are large, else by torch.compile"
    if compiled:
        return "fused by torch.compile"
    if device.type != "cpu":
        return "by PyTorch, in bf16 without cuDNN (run.compile off)"
    return f"by ATen ({why})" if (why := reason()) else "fused with ReLU for this CPU"


# A call of the Triton form costs the host about 0.2 ms forward and again backward, whatever the
# size, and Inductor's next to nothing; what it saves grows with the size. Modelled, not measured.
LEAST_ELEMENTS = 2**24


def supports_cuda(x: Tensor, per_channel: Sequence[Tensor | None], groups: int) -> bool:
    """Whether the compiled step takes the Triton kernels for x (N, C, H, W) on a GPU.

    `per_channel` are weight, bias and running statistics, which must be fp32.
    """
    return (
        x.is_cuda
        and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and x.numel() >= LEAST_ELEMENTS
        and x.numel() > groups * x.shape[1]
        and all(t is not None and t.dtype == torch.float32 for t in per_channel)
        and "batch_norm" not in launch.replaced()
    )


class SplitBatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` applied to each run of `group_size` consecutive samples by itself.

    Not timm's class of this name, which gives each split of the batch weights and statistics of its
    own. `group_size` 0 means one group, the whole batch. The addition and the ReLU that follow in a
    ResNet may be part of the call, for in memory traffic they weigh as much as the normalization.
    Parameters and buffers are those of `BatchNorm2d`, so checkpoints interchange. In training, the
    running statistics move once per forward by the *mean over groups* of the group statistics: what
    the average over GPUs would be if each group were a GPU. In evaluation nothing is split.

    Raises `ValueError` in a training forward whose batch is not a multiple of `group_size`.
    """

    def __init__(self, num_features: int, group_size: int, momentum: float = 0.1) -> None:
        super().__init__(num_features, momentum=momentum)
        self.group_size = group_size

    def forward(self, input: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """`relu(norm(input) + residual)`: (N, C, H, W) to the same shape, dtype and format."""
        groups = 1
        if self.training and self.group_size:
            groups, rest = divmod(input.shape[0], self.group_size)
            if rest:
                shape, size = tuple(input.shape), self.group_size
                raise ValueError(f"batch of shape {shape} is no multiple of BN group {size}")
        per_channel = (self.weight, self.bias, self.running_mean, self.running_var)
        if torch.compiler.is_compiling():
            if self.training and supports_cuda(input, per_channel, groups):
                return self._forward_cuda(input, residual, groups, relu)
            out = self._forward_batched(input) if groups > 1 else super().forward(input)
            out = out if residual is None else out + residual
            return F.relu(out) if relu else out
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        fused = (
            (self.training or not torch.is_grad_enabled())  # no backward through running statistics
            and (relu or residual is None)
            and supports(input, residual, per_channel, groups)
        )
        function = batch_norm_act if fused else reference.batch_norm_act
        assert self.running_mean is not None
        assert self.running_var is not None
        return function(
            input,
            residual,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.training,
            self.momentum or 0.0,
            self.eps,
            groups,
            relu,
        )

    def _forward_cuda(self, x: Tensor, residual: Tensor | None, groups: int, relu: bool) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        return batch_norm_act_cuda(
            x,
            residual,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.num_batches_tracked,
            self.momentum or 0.0,
            self.eps,
            groups,
            relu,
        )

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
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
        return out.view(n, h, w, c).permute(0, 3, 1, 2)
