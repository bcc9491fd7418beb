"""Convolution that uses our kernels on some CPUs.

N batch, C channels, O outputs, H W spatial, K side of the kernel.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from fastmoco_kernels.convolution import convolution_cpu, convolution_fp32_cpu


def convolution_choice(device: torch.device, precision: str, compiled: bool) -> str:
    """Who computes convolutions on this device, and why; may compile our kernels."""
    if device.type != "cpu":
        return "by cuDNN"
    if compiled or precision not in ("bf16", "fp32"):
        return "by oneDNN"
    if precision == "fp32":
        why = convolution_fp32_cpu.reason()
        return f"by oneDNN ({why})" if why else "by our AVX2 kernels where they are faster"
    why = convolution_cpu.reason()
    return f"by oneDNN ({why})" if why else "by oneDNN, weight gradients by our AVX-512 kernel"


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` that calls `fastmoco_kernels` where they are faster.

    No bias; equal stride and zero padding in both directions, as everywhere in a ResNet.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) to (N, O, H', W')."""
        if torch.compiler.is_compiling() or self.dilation != (1, 1):
            return super().forward(input)
        stride, padding = self.stride[0], cast(int, self.padding[0])
        if convolution_fp32_cpu.supports(input, self.weight):
            return convolution_fp32_cpu.convolution(input, self.weight, stride, padding)
        wants_gradient = torch.is_grad_enabled() and self.weight.requires_grad
        if wants_gradient and convolution_cpu.supports(input, self.weight):
            return convolution_cpu.convolution(input, self.weight, stride, padding)
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
