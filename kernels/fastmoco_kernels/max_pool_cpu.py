"""Max pooling of ResNet's stem on the CPU: 3x3, stride 2, padding 1, in channels-last memory.

ATen keeps an index of eight bytes per output, for keys too, and zeroes and scatters in its
backward; max_pool_cpu.cpp keeps one byte and gathers. Values and choices are ATen's.

N batch, C channels, H W spatial, H' = (H + 1) / 2, W' alike, rounded down.
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

from fastmoco_kernels import cpp

SOURCE = Path(__file__).with_name("max_pool_cpu.cpp")
DTYPES = (torch.bfloat16, torch.float32)


class Arguments(ctypes.Structure):
    """The struct of the same name in max_pool_cpu.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "y", "taps", "dy", "dx")),
        *((name, ctypes.c_int64) for name in ("n", "height", "width", "channels")),
        *((name, ctypes.c_int64) for name in ("out_height", "out_width")),
        *((name, ctypes.c_int32) for name in ("is_bf16", "threads")),
    )


@cache
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why there is none."""
    return cpp.load(SOURCE, Arguments, ("max_pool_forward", "max_pool_backward"))


@cache
def reason() -> str:
    """Why ATen pools on this machine; empty where max_pool_cpu.cpp does.

    The first call compiles, and compares a small case with ATen.
    """
    if why := _loaded()[1]:
        return why
    x = torch.randn(2, 32, 5, 6, generator=torch.Generator().manual_seed(0)).relu()
    x = x.to(memory_format=torch.channels_last)
    y, taps = _forward(x, True)
    wanted, indices = F.max_pool2d(x, 3, 2, 1, return_indices=True)
    dx = torch.ops.aten.max_pool2d_with_indices_backward(
        y, x, [3, 3], [2, 2], [1, 1], [1, 1], False, indices
    )
    same = torch.equal(y, wanted) and torch.allclose(_backward(y, taps, x.shape), dx, rtol=1e-5)
    return "" if same else "its result differs from ATen's"


def supports(x: Tensor) -> bool:
    """Whether `max_pool` takes x (N, C, H, W): a plain CPU tensor in channels-last memory."""
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and x.dtype in DTYPES
        and x.numel() > 0
        and x.shape[1] % 32 == 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and not reason()
    )


def max_pool(x: Tensor) -> Tensor:
    """`max_pool2d(x, 3, stride=2, padding=1)` of x (N, C, H, W), bf16 or fp32: (N, C, H', W').

    The gradient goes to the first of equal values and adds up in fp32.
    """
    out: Tensor = _MaxPool.apply(x)
    return out


def _call(function: str, large: torch.Size, small: Tensor, **tensors: Tensor | None) -> None:
    """Run `function` of the library between an input of shape `large` and an output like `small`.

    `tensors` are fields of `Arguments`.
    """
    n, channels, height, width = large
    arguments = Arguments(
        n=n,
        height=height,
        width=width,
        channels=channels,
        out_height=small.shape[2],
        out_width=small.shape[3],
        is_bf16=small.dtype == torch.bfloat16,
        threads=torch.get_num_threads(),
        **{name: 0 if t is None else t.data_ptr() for name, t in tensors.items()},
    )
    getattr(_loaded()[0], function)(arguments)


def _forward(x: Tensor, keep_taps: bool) -> tuple[Tensor, Tensor | None]:
    n, channels, height, width = x.shape
    shape = (n, channels, (height + 1) // 2, (width + 1) // 2)
    y = torch.empty(shape, dtype=x.dtype, device="cpu", memory_format=torch.channels_last)
    taps = torch.empty_like(y, dtype=torch.uint8) if keep_taps else None
    _call("max_pool_forward", x.shape, y, x=x, y=y, taps=taps)
    return y, taps


def _backward(dy: Tensor, taps: Tensor | None, shape: torch.Size) -> Tensor:
    dx = torch.empty(shape, dtype=dy.dtype, device="cpu", memory_format=torch.channels_last)
    _call("max_pool_backward", shape, dy, dy=dy, taps=taps, dx=dx)
    return dx


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y, taps = _forward(x, ctx.needs_input_grad[0])
        ctx.save_for_backward(taps)
        ctx.shape = x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (taps,) = ctx.saved_tensors
        return _backward(dy.contiguous(memory_format=torch.channels_last), taps, ctx.shape)
