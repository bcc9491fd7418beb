"""Convolution in fp32 on the CPU as matrix products over channels-last memory, with AVX2.

oneDNN copies channels-last weights into its own layout in every call, which is most of the work on
small maps, and it multiplies the padding. direct_convolution_cpu.cpp packs a few columns of the
weight at a time, and leaves out the padding on small maps.

N batch, C channels, O outputs, H W spatial, K side of the kernel.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fastmoco_kernels import cpp

SOURCE = Path(__file__).with_name("direct_convolution_cpu.cpp")
# Output pixels of a partial sum: several of them let threads share a small weight.
PIXELS_PER_PART = 6272
# Largest K: a table of taps in the kernel has room for 9.
LARGEST_KERNEL = 3
CHANNELS_LAST = torch.channels_last


class Arguments(ctypes.Structure):
    """The struct of the same name in direct_convolution_cpu.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "w", "dy", "y", "dx", "dw", "partial")),
        *((name, ctypes.c_int64) for name in ("n", "height", "width", "channels")),
        *((name, ctypes.c_int64) for name in ("out_height", "out_width", "outputs")),
        *((name, ctypes.c_int64) for name in ("kernel", "stride", "padding", "parts")),
        ("threads", ctypes.c_int32),
    )


@cache
def loaded() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why there is none."""
    return cpp.available(SOURCE, Arguments, ("forward", "input_gradient", "weight_gradient"))


def forward(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """`conv2d` of x (N, C, H, W) and weight (O, C, K, K): (N, O, H', W'), all fp32 channels-last.

    C and O are multiples of 16, K is at most 3; nothing is checked.
    """
    n, _, height, width = x.shape
    outputs, _, kernel, _ = weight.shape
    side = [(size + 2 * padding - kernel) // stride + 1 for size in (height, width)]
    y = _empty(torch.Size((n, outputs, *side)))
    _call("forward", x.shape, y.shape, kernel, stride, padding, x=x, w=weight, y=y)
    return y


def input_gradient(
    dy: Tensor, weight: Tensor, shape: torch.Size, stride: int, padding: int
) -> Tensor:
    """Gradient of an input of `shape` (N, C, H, W) from dy (N, O, H', W') and weight (O, C, K, K).

    Everything is fp32 in channels-last memory, as in `forward`.
    """
    dx = _empty(shape)
    _call(
        "input_gradient", shape, dy.shape, weight.shape[2], stride, padding, w=weight, dy=dy, dx=dx
    )
    return dx


def weight_gradient(x: Tensor, dy: Tensor, shape: torch.Size, stride: int, padding: int) -> Tensor:
    """Gradient of a weight of `shape` (O, C, K, K) from x (N, C, H, W) and dy (N, O, H', W').

    Everything is fp32 in channels-last memory, as in `forward`. The order of the sum over N H' W'
    depends on the shapes only.
    """
    dw = _empty(shape)
    parts = max(1, dy.shape[0] * dy.shape[2] * dy.shape[3] // PIXELS_PER_PART)
    partial = dw.new_empty(parts if parts > 1 else 0, dw.numel())
    tensors = {"x": x, "dy": dy, "dw": dw, "partial": partial}
    _call("weight_gradient", x.shape, dy.shape, shape[2], stride, padding, parts, **tensors)
    return dw


def _empty(shape: torch.Size) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu", memory_format=CHANNELS_LAST)


def _call(
    function: str,
    large: torch.Size,
    small: torch.Size,
    kernel: int,
    stride: int,
    padding: int,
    parts: int = 1,
    **tensors: Tensor,
) -> None:
    """Run `function` between an input of shape `large` and an output of shape `small`.

    `tensors` are fields of `Arguments`.
    """
    n, channels, height, width = large
    arguments = Arguments(
        n=n,
        height=height,
        width=width,
        channels=channels,
        out_height=small[2],
        out_width=small[3],
        outputs=small[1],
        kernel=kernel,
        stride=stride,
        padding=padding,
        parts=parts,
        threads=torch.get_num_threads(),
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
    )
    getattr(loaded()[0], function)(arguments)
