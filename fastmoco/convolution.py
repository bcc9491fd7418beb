"""Convolution whose weight gradient has a kernel of its own on some CPUs.

N batch, C channels, O outputs, H W spatial, K side of the kernel.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from fastmoco_kernels.convolution_cpu import convolution, reason, supports


def gradient_choice(device: torch.device, precision: str, compiled: bool) -> str:
    """Who computes the weight gradients of convolutions on this device; may compile the kernel."""
    if device.type != "cpu":
        return "by cuDNN"
    if compiled or precision != "bf16":
        return "by oneDNN"
    return f"by oneDNN ({why})" if (why := reason()) else "by our AVX-512 kernel"


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` that leaves its weight gradient to `fastmoco_kernels` where that is faster.

    Without a bias, stride and zero padding alike in both directions, as everywhere in a ResNet.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) to (N, O, H', W')."""
        if (
            not torch.compiler.is_compiling()
            and torch.is_grad_enabled()
            and self.weight.requires_grad
            and self.dilation == (1, 1)
            and supports(input, self.weight)
        ):
            return convolution(input, self.weight, self.stride[0], cast(int, self.padding[0]))
        return super().forward(input)


def adopt(network: nn.Module) -> None:
    """Replace each bias-free `torch.nn.Conv2d` of `network` by a `Conv2d` around its weight."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Conv2d and child.bias is None:
                own = Conv2d(
                    child.in_channels,
                    child.out_channels,
                    cast(tuple[int, int], child.kernel_size),
                    cast(tuple[int, int], child.stride),
                    cast(tuple[int, int], child.padding),
                    cast(tuple[int, int], child.dilation),
                    child.groups,
                    bias=False,
                    device="meta",  # draws no random numbers
                )
                own.weight = child.weight
                setattr(module, name, own)
