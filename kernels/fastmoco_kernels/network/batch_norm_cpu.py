"""Batch norm, residual addition and ReLU in one operation on the CPU, in channels-last memory.

ATen reads or writes an activation eight times in the forward of `relu(batch_norm(x) + residual)`
and nine times in its backward; batch_norm_cpu.cpp needs four and seven times. It is compiled once
per machine by the C++ compiler that torch.compile uses too. Where there is none, or the result is
not right, `reason` says so and the caller composes ATen operations instead.

N batch, G groups that are normalized by themselves, C channels, H W spatial.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmoco_kernels import cpp, reference

SOURCE = Path(__file__).with_name("batch_norm_cpu.cpp")
DTYPES = (torch.bfloat16, torch.float32)


class Arguments(ctypes.Structure):
    """The struct of the same name in batch_norm_cpu.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "residual", "y", "dy", "dx", "d_residual")),
        *((name, ctypes.c_void_p) for name in ("grad_weight", "grad_bias", "weight", "bias")),
        *((name, ctypes.c_void_p) for name in ("mean", "invstd", "running_mean", "running_var")),
        *((name, ctypes.c_double) for name in ("momentum", "eps")),
        *((name, ctypes.c_int64) for name in ("groups", "rows", "channels")),
        *((name, ctypes.c_int32) for name in ("is_bf16", "relu", "training", "threads")),
    )


@cache
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why there is none."""
    return cpp.load(SOURCE, Arguments, ("batch_norm_forward", "batch_norm_backward"))


@cache
def reason() -> str:
    """Why the fused operation is not used on this machine; empty where it is.

    The first call compiles, and compares a small case with ATen: outputs, gradients and running
    statistics, in both dtypes.
    """
    library, why = _loaded()
    if library is None:
        return why
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        apart = _distance_from_aten(dtype)
        if not apart < bound:  # NaN too
            return f"its {dtype} result differs from ATen's by {apart:.1e}"
    return ""


@torch.inference_mode(False)
@torch.enable_grad()
def _distance_from_aten(dtype: torch.dtype) -> float:
    """Mean error of anything that comes out, relative to its mean size. ATen computes in fp32."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 4, 24, 3, 3, generator=generator).to(dtype)
    found = []
    for function, kind in ((batch_norm_act, dtype), (reference.batch_norm_act, torch.float32)):
        x, residual, dy = (t.to(kind, memory_format=torch.channels_last) for t in inputs)
        w, b = torch.linspace(0.5, 2, 24), torch.linspace(-1, 1, 24)
        moving = torch.zeros(24), torch.ones(24)
        leaves = [t.requires_grad_() for t in (x, residual, w, b)]
        y = function(x, residual, w, b, *moving, True, 0.1, 1e-5, 2, True)
        found.append([y.detach(), *torch.autograd.grad(y, leaves, dy), *moving])
    errors = [(a - b).abs().mean() / b.abs().mean() for a, b in zip(*found, strict=True)]
    return float(torch.stack(errors).max())


def supports(
    x: Tensor, residual: Tensor | None, per_channel: Sequence[Tensor | None], groups: int
) -> bool:
    """Whether `batch_norm_act` takes these: plain CPU tensors in channels-last memory.

    `per_channel` are weight, bias and running statistics, which must be fp32.
    """
    for t in per_channel:
        if t is None or t.dtype != torch.float32 or t.device.type != "cpu":
            return False
    for t in (x, residual):
        if t is not None and not (
            type(t) is Tensor
            and t.device.type == "cpu"
            and t.dtype in DTYPES
            and t.dtype == x.dtype
            and t.shape == x.shape
            and t.is_contiguous(memory_format=torch.channels_last)
        ):
            return False
    return x.numel() > groups * x.shape[1] and not reason()


def batch_norm_act(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    groups: int,
    relu: bool,
) -> Tensor:
    """`relu(batch_norm(x) + residual)` for tensors that `supports` accepts.

    x, residual (N, C, H, W), bf16 or fp32; weight, bias, running_mean, running_var (C,) fp32. In
    training each of `groups` runs of N / groups samples is normalized by its own statistics, and
    the running ones move once, by the mean over groups (variances unbiased); otherwise the running
    ones are used and no gradient is recorded. Raises `ValueError` for a residual without `relu`.
    """
    if residual is not None and not relu:
        raise ValueError("a residual is only added in front of a ReLU")
    out: Tensor = _BatchNormAct.apply(
        x, residual, weight, bias, running_mean, running_var, training, momentum, eps, groups, relu
    )
    return out


def _call(function: str, x: Tensor, groups: int, **fields: Any) -> None:
    """Run `function` of the library; `fields` are those of `Arguments`, tensors by address."""
    library = _loaded()[0]
    pointers = {k: v.data_ptr() if isinstance(v, Tensor) else v for k, v in fields.items()}
    arguments = Arguments(
        x=x.data_ptr(),
        groups=groups,
        rows=x.numel() // (groups * x.shape[1]),
        channels=x.shape[1],
        is_bf16=x.dtype == torch.bfloat16,
        threads=torch.get_num_threads(),
        **pointers,
    )
    getattr(library, function)(arguments)


class _BatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        training: bool,
        momentum: float,
        eps: float,
        groups: int,
        relu: bool,
    ) -> Tensor:
        y = torch.empty_like(x)
        if training:
            mean, invstd = torch.empty(2, groups, x.shape[1], dtype=torch.float32, device="cpu")
        else:
            mean, invstd = running_mean, torch.rsqrt(running_var + eps)
        _call(
            "batch_norm_forward",
            x,
            groups,
            residual=residual,
            y=y,
            weight=weight,
            bias=bias,
            mean=mean,
            invstd=invstd,
            running_mean=running_mean,
            running_var=running_var,
            momentum=momentum,
            eps=eps,
            relu=relu,
            training=training,
        )
        ctx.save_for_backward(x, None if residual is None else y, weight, bias, mean, invstd)
        ctx.groups, ctx.relu = groups, relu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight, bias, mean, invstd = ctx.saved_tensors
        dy = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
        dx, d_residual = torch.empty_like(x), None if y is None else torch.empty_like(x)
        grad_weight, grad_bias = torch.empty(2, x.shape[1], dtype=torch.float32, device="cpu")
        _call(
            "batch_norm_backward",
            x,
            ctx.groups,
            residual=y,  # not read: says that there was one
            y=y,
            dy=dy,
            dx=dx,
            d_residual=d_residual,
            grad_weight=grad_weight,
            grad_bias=grad_bias,
            weight=weight,
            bias=bias,
            mean=mean,
            invstd=invstd,
            relu=ctx.relu,
            training=True,
        )
        return dx, d_residual, grad_weight, grad_bias, *[None] * 7
