"""Convolution on the CPU whose weight gradient is computed by our own kernel.

On processors with AVX-512 bfloat16 dot products but without AMX, oneDNN's weight gradients are
slower than its forward (rows of `python -m bench.kernels --only weight_gradient`).
convolution_cpu.cpp packs pixels once per block and multiplies from cache. Its sums stay float32,
where oneDNN rounds them to bf16. Forward and gradient of the input stay with oneDNN.

N batch, C channels, O outputs, H W spatial, K side of the kernel.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_weight

from fastmoco_kernels import cpp

SOURCE = Path(__file__).with_name("convolution_cpu.cpp")
# Output pixels of a partial sum: several of them let threads share a small weight.
PIXELS_PER_PART = 6272
MOST_CHANNELS = 1 << 14
CHANNELS_LAST = torch.channels_last


class Arguments(ctypes.Structure):
    """The struct of the same name in convolution_cpu.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "dy", "dw", "partial")),
        *((name, ctypes.c_int64) for name in ("n", "height", "width", "channels")),
        *((name, ctypes.c_int64) for name in ("out_height", "out_width", "outputs")),
        *((name, ctypes.c_int64) for name in ("kernel", "stride", "padding", "parts")),
        ("threads", ctypes.c_int32),
    )


@cache
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why there is none."""
    return cpp.available(SOURCE, Arguments, ("weight_gradient",))


@cache
def reason() -> str:
    """Why oneDNN computes weight gradients on this machine; empty where our kernel does.

    The first call compiles, and compares a small case with ATen.
    """
    if why := _loaded()[1]:
        return why
    generator = torch.Generator().manual_seed(0)
    x, dy = (
        torch.randn(2, 64, 5, 5, generator=generator).bfloat16().to(memory_format=CHANNELS_LAST)
        for _ in range(2)
    )
    mine = weight_gradient(x, dy, torch.Size((64, 64, 3, 3)), 1, 1)
    exact = conv2d_weight(x.float(), [64, 64, 3, 3], dy.float(), 1, 1)
    apart = float((mine - exact).abs().mean() / exact.abs().mean())
    return "" if apart < 1e-5 else f"its result differs from ATen's by {apart:.1e}"  # NaN too


def supports(x: Tensor, weight: Tensor) -> bool:
    """Whether `convolution` takes these: x (N, C, H, W) and weight (O, C, K, K), channels-last.

    x is bf16, the weight fp32; C and O are multiples of 64.
    """
    return (
        type(x) is Tensor
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and weight.dtype == torch.float32
        and x.shape[1] == weight.shape[1]  # no groups
        and weight.shape[0] % 64 == weight.shape[1] % 64 == 0
        and max(weight.shape) <= MOST_CHANNELS
        and weight.shape[2] == weight.shape[3]
        and x.is_contiguous(memory_format=CHANNELS_LAST)
        and weight.is_contiguous(memory_format=CHANNELS_LAST)
        and not reason()
    )


def weight_gradient(x: Tensor, dy: Tensor, shape: torch.Size, stride: int, padding: int) -> Tensor:
    """Gradient of a weight of `shape` (O, C, K, K), fp32 in channels-last memory.

    x (N, C, H, W) and dy, the gradient of the output (N, O, H', W'), are bf16 in channels-last
    memory. The sum runs over N H' W' in float32; its order depends on the shapes only.
    """
    dw = torch.empty(shape, dtype=torch.float32, device="cpu", memory_format=CHANNELS_LAST)
    n, channels, height, width = x.shape
    outputs, out_height, out_width = dy.shape[1:]
    parts = max(1, n * out_height * out_width // PIXELS_PER_PART)
    partial = dw.new_empty(parts if parts > 1 else 0, dw.numel())
    arguments = Arguments(
        x=x.data_ptr(),
        dy=dy.data_ptr(),
        dw=dw.data_ptr(),
        partial=partial.data_ptr(),
        n=n,
        height=height,
        width=width,
        channels=channels,
        out_height=out_height,
        out_width=out_width,
        outputs=outputs,
        kernel=shape[2],
        stride=stride,
        padding=padding,
        parts=parts,
        threads=torch.get_num_threads(),
    )
    library = _loaded()[0]
    assert library is not None
    library.weight_gradient(arguments)
    return dw


def convolution(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """`conv2d` in bf16 of tensors that `supports` accepts; the weight's gradient is fp32.

    x (N, C, H, W) bf16, weight (O, C, K, K) fp32, which is rounded to bf16 as autocast would.
    """
    out: Tensor = _Convolution.apply(x, weight, stride, padding)
    return out


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        rounded = weight.to(x.dtype)
        ctx.save_for_backward(x, rounded)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, rounded, None, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy = dy.to(x.dtype).contiguous(memory_format=CHANNELS_LAST)
        dx = None
        if ctx.needs_input_grad[0]:
            step, edge = [ctx.stride] * 2, [ctx.padding] * 2
            mask = [True, False, False]
            dx = torch.ops.aten.convolution_backward(
                dy, x, weight, None, step, edge, [1, 1], False, [0, 0], 1, mask
            )[0]
        return dx, weight_gradient(x, dy, weight.shape, ctx.stride, ctx.padding), None, None
