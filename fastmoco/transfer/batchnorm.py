"""The feature normalization of detection: batch norm that is tuned, and one over all ranks.

MoCo's detectors do not freeze batch norm: a pre-trained trunk has features of other magnitudes than
a supervised one, so the statistics must follow (arXiv 1911.05722, section 4.2, "Normalization").

N local batch, which may differ between ranks and may be 0; C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmoco.machine.collectives import all_gather
from fastmoco.machine.ranks import World


class SyncBatchNorm2d(nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm` that also runs on CPUs.

    In training, mean and variance are those of the pixels of all ranks, whatever the size of the
    batch and of the pictures on each of them; every rank must call it equally often. The addition
    and the ReLU of a residual block may be part of the call, as the encoders of training make it.
    """

    def __init__(self, num_features: int, world: World) -> None:
        super().__init__(num_features)
        self.world = world

    def forward(self, input: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """`relu(norm(input) + residual)`: (N, C, H, W) to the same shape and dtype."""
        # PyTorch's own class refuses CPU tensors as soon as there are two ranks.
        by_hand = self.training and self.world.size > 1 and input.device.type == "cpu"
        out: Tensor = self._over_ranks(input) if by_hand else super().forward(input)
        if residual is not None:
            out = out + residual
        return out.relu() if relu else out

    def _over_ranks(self, input: Tensor) -> Tensor:
        x = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
        count = x.numel() // x.shape[1]
        mean = x.sum((0, 2, 3)) / max(count, 1)
        # Squares around the mean of each rank: sums of plain squares lose the digits of a variance.
        squares = (x - _wide(mean)).square().sum((0, 2, 3))
        row = torch.cat([mean, squares, mean.new_tensor([count])])[None]
        means, squares, counts = all_gather(row, self.world).split([len(mean), len(mean), 1], 1)
        total = counts.sum()
        if not total:  # no rank has a region: nothing to normalize, nothing to follow
            return input * _wide(self.weight) + _wide(self.bias)
        mean = (means * counts).sum(0) / total
        squares = (squares + counts * (means - mean).square()).sum(0)
        var = squares / total
        self._follow(mean.detach(), squares.detach() / (total - 1))
        scale = self.weight * torch.rsqrt(var + self.eps)
        return ((x - _wide(mean)) * _wide(scale) + _wide(self.bias)).to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, unbiased: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        self.num_batches_tracked += 1


def _wide(x: Tensor) -> Tensor:
    """(C,) to (1, C, 1, 1)."""
    return x[None, :, None, None]


def synchronize(network: nn.Module, world: World) -> None:
    """Make each batch norm a `SyncBatchNorm2d` with the same parameters and buffers."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                tuned = SyncBatchNorm2d(child.num_features, world)
                tuned.eps, tuned.momentum = child.eps, child.momentum
                tuned.load_state_dict(child.state_dict(), assign=True)
                setattr(module, name, tuned.train(child.training))
