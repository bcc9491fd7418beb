"""Convolution in fp32 on CPUs with AVX2: for every layer the fastest way that was measured.

- 3x3, stride 1, on maps of 4x4 and more: Winograd's F(2x2, 3x3), forward and both gradients.
- The weight gradients of all others: products of matrices over channels-last memory.
- Their forward and the gradient of their input where a map of the result has 49 pixels or fewer:
  the same products. On larger maps oneDNN is as fast, and computes them.

The rows are those of `python -m bench.kernels --only convolution`.

N batch, C channels, O outputs, H W spatial, K side of the kernel.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmoco_kernels.convolution import direct_convolution_cpu as direct
from fastmoco_kernels.convolution import winograd_cpu as winograd

CHANNELS_LAST = torch.channels_last
MOST_CHANNELS = 1 << 14
# Shortest side of a map on which Winograd's tiles of 4x4 pixels are not mostly padding.
SHORTEST_SIDE = 4
# Pixels of a map of the result up to which our products are faster than oneDNN's.
SMALL_MAP = 49


@cache
def reason() -> str:
    """Why oneDNN convolves in fp32 on this machine; empty where our kernels do.

    The first call compiles, and compares two small cases with ATen.
    """
    for _, why in (direct.loaded(), winograd.loaded()):
        if why:
            return why
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 64, 5, 6), (64, 64, 3, 3))
    x, weight = (
        torch.randn(s, generator=generator).to(memory_format=CHANNELS_LAST) for s in shapes
    )
    for stride in (1, 2):  # by Winograd and by direct products
        y = forward(x, weight, stride, 1)
        dx, dw = _gradients(y, x, weight, stride, 1, True)
        wanted = F.conv2d(x, weight, None, stride, 1)
        both = _aten_gradients(wanted, x, weight, stride, 1, [True, True, False])
        for mine, theirs in zip((y, dx, dw), (wanted, *both), strict=False):
            assert mine is not None
            apart = float((mine - theirs).abs().mean() / theirs.abs().mean())
            if not apart < 1e-5:  # NaN too
                return f"its result differs from ATen's by {apart:.1e}"
    return ""


def supports(x: Tensor, weight: Tensor) -> bool:
    """Whether `convolution` takes these: x (N, C, H, W) and weight (O, C, K, K), channels-last.

    Both are fp32 and autocast is off; C and O are multiples of 16, K is at most 3.
    """
    return (
        type(x) is Tensor
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and x.numel() > 0
        and x.shape[1] == weight.shape[1]  # no groups
        and weight.shape[0] % 16 == weight.shape[1] % 16 == 0
        and max(weight.shape) <= MOST_CHANNELS
        and weight.shape[2] == weight.shape[3] <= direct.LARGEST_KERNEL
        and x.is_contiguous(memory_format=CHANNELS_LAST)
        and weight.is_contiguous(memory_format=CHANNELS_LAST)
        and not reason()
    )


def convolution(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """`conv2d` of tensors that `supports` accepts: x (N, C, H, W), weight (O, C, K, K), fp32."""
    out: Tensor = _Convolution.apply(x, weight, stride, padding)
    return out


def by_winograd(image: torch.Size, weight: torch.Size, stride: int, padding: int) -> bool:
    """Whether Winograd's way is taken for these shapes."""
    shaped = weight[2] == 3 and stride == padding == 1
    return shaped and min(image[2], image[3]) >= SHORTEST_SIDE


def forward(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """The result alone, without a gradient."""
    if by_winograd(x.shape, weight.shape, stride, padding):
        return winograd.forward(x, weight)
    height, width = ((side + 2 * padding - weight.shape[2]) // stride + 1 for side in x.shape[2:])
    if height * width <= SMALL_MAP:
        return direct.forward(x, weight, stride, padding)
    return F.conv2d(x, weight, None, stride, padding)


def _gradients(
    dy: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, wants_dx: bool
) -> tuple[Tensor | None, Tensor]:
    """Gradients of x, if it is wanted, and of the weight; dy is in channels-last memory."""
    dx = None
    if by_winograd(x.shape, weight.shape, stride, padding):
        if wants_dx:
            dx = winograd.input_gradient(dy, weight)
        return dx, winograd.weight_gradient(x, dy)
    if wants_dx and dy.shape[2] * dy.shape[3] <= SMALL_MAP:
        dx = direct.input_gradient(dy, weight, x.shape, stride, padding)
    elif wants_dx:
        dx = _aten_gradients(dy, x, weight, stride, padding, [True, False, False])[0]
    return dx, direct.weight_gradient(x, dy, weight.shape, stride, padding)


def _aten_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    step, edge = [stride] * 2, [padding] * 2
    gradients: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        dy, x, weight, None, step, edge, [1, 1], False, [0, 0], 1, wanted
    )
    return gradients[0], gradients[1]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return forward(x, weight, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy = dy.contiguous(memory_format=CHANNELS_LAST)
        wants_dx, wants_dw = ctx.needs_input_grad[:2]
        dx, dw = _gradients(dy, x, weight, ctx.stride, ctx.padding, wants_dx)
        return dx, dw if wants_dw else None, None, None
