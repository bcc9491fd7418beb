"""Batch norm over groups of samples, residual addition and ReLU as torch custom operations.

    y = relu(weight (x - mean) / sqrt(var + eps) + bias + residual)

in channels-last memory, with the mean and the biased variance of x over each group of consecutive
samples. The forward reads x twice and writes y once; the backward reads x and dy twice and writes
dx once; a residual adds one pass forward and two backward. On CUDA this is Triton
(batch_norm_triton.py), elsewhere its reference. What it replaces on CUDA is what torch.compile
makes of the same lines: more launches, and partial sums in an order of its choosing.

Two operations, because one that writes to its inputs, the running statistics, can have no gradient:
the first finds mean and var, the second is functional, and its gradient is that of both.
N batch, G groups, C channels, H W spatial.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmoco_kernels import launch, reference
from fastmoco_kernels.network.batch_norm_launch import (
    backward_plan,
    normalize_plan,
    shape_of,
    statistics_plan,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NHWC = torch.channels_last
OP = "batch_norm"  # the name under which it is replaced by its reference


@torch.library.custom_op(
    "fastmoco::batch_norm_statistics",
    mutates_args=("running_mean", "running_var", "counter"),
    device_types="cpu",
)
def _statistics(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    counter: Tensor,
    momentum: float,
    groups: int,
) -> tuple[Tensor, Tensor]:
    return reference.batch_norm_statistics(x, running_mean, running_var, counter, momentum, groups)


@_statistics.register_kernel("cuda")
def _(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    counter: Tensor,
    momentum: float,
    groups: int,
) -> tuple[Tensor, Tensor]:
    running = (running_mean, running_var, counter, momentum)
    if OP in launch.replaced():
        return reference.batch_norm_statistics(x, *running, groups)
    launches, mean, var = statistics_plan(x, *running, shape_of(x, groups))
    for each in launches:
        each.run()
    return mean, var


@_statistics.register_fake
def _(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    counter: Tensor,
    momentum: float,
    groups: int,
) -> tuple[Tensor, Tensor]:
    mean = x.new_empty(groups, x.shape[1], dtype=running_mean.dtype)
    return mean, torch.empty_like(mean)


@torch.library.custom_op("fastmoco::batch_norm_apply", mutates_args=(), device_types="cpu")
def _apply(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    relu: bool,
) -> Tensor:
    return reference.batch_norm_apply(x, residual, weight, bias, mean, var, eps, relu)


@_apply.register_kernel("cuda")
def _(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    relu: bool,
) -> Tensor:
    if OP in launch.replaced():
        return reference.batch_norm_apply(x, residual, weight, bias, mean, var, eps, relu)
    affine = {"weight": weight, "bias": bias, "mean": mean, "var": var}
    work, y = normalize_plan(x, residual, affine, eps, relu, shape_of(x, len(mean)))
    work.run()
    return y


@_apply.register_fake
def _(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    relu: bool,
) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("fastmoco::batch_norm_backward", mutates_args=(), device_types="cpu")
def _backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return reference.batch_norm_backward(dy, x, y, weight, bias, mean, var, eps, relu)


@_backward.register_kernel("cuda")
def _(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if OP in launch.replaced():
        return reference.batch_norm_backward(dy, x, y, weight, bias, mean, var, eps, relu)
    affine = {"weight": weight, "bias": bias, "mean": mean, "var": var}
    plan = backward_plan(dy, x, y, affine, eps, relu, shape_of(x, len(mean)))
    for each in plan.launches:
        each.run()
    # What a custom operation returns must not be one of its inputs.
    g = x.new_empty(0) if y is None else plan.g
    return plan.dx, g, plan.grad_weight, plan.grad_bias


@_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = x.new_empty(0) if y is None else torch.empty_like(x)
    return torch.empty_like(x), g, torch.empty_like(weight), torch.empty_like(bias)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, residual, weight, bias, mean, var, ctx.eps, ctx.relu = inputs
    ctx.added = residual is not None
    y = output if ctx.added and ctx.relu else None
    ctx.save_for_backward(x, y, weight, bias, mean, var)


def _give_back(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, y, *affine = ctx.saved_tensors
    dy = dy.to(x.dtype).contiguous(memory_format=NHWC)
    dx, g, grad_weight, grad_bias = _backward(dy, x, y, *affine, ctx.eps, ctx.relu)
    if y is None:
        g = dy
    return dx, g if ctx.added else None, grad_weight, grad_bias, None, None, None, None


_apply.register_autograd(_give_back, setup_context=_keep)


def batch_norm_act(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    counter: Tensor,
    momentum: float,
    eps: float,
    groups: int,
    relu: bool,
) -> Tensor:
    """`relu(batch_norm(x) + residual)` in training: each of `groups` runs of samples by itself.

    x, residual (N, C, H, W) of one dtype, float32, float16 or bfloat16, copied first where they do
    not lie in channels-last memory; weight, bias, running_mean, running_var (C,) float32; counter
    () int64. In place, the running statistics move once, by `momentum` towards the mean over groups
    (variances unbiased), and counter counts one. The gradient can be taken once and treats running
    statistics as constants. Raises ValueError naming the shapes.
    """
    shapes = f"x {tuple(x.shape)} {x.dtype}, {groups} groups"
    if x.ndim != 4 or x.dtype not in DTYPES or groups < 1 or x.shape[0] % groups:
        raise ValueError(f"expected a floating (N, C, H, W), N a multiple of groups, got {shapes}")
    if x.numel() <= groups * x.shape[1]:
        raise ValueError(f"expected more than one value per channel and group, got {shapes}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"a residual {tuple(residual.shape)} {residual.dtype} for {shapes}")
    per_channel = (weight, bias, running_mean, running_var)
    if any(t.shape != x.shape[1:2] or t.dtype != torch.float32 for t in per_channel):
        found = [(tuple(t.shape), t.dtype) for t in per_channel]
        raise ValueError(f"expected (C,) float32 per channel, got {found} for {shapes}")
    x = x.contiguous(memory_format=NHWC)
    if residual is not None:
        residual = residual.contiguous(memory_format=NHWC)
    mean, var = _statistics(x.detach(), running_mean, running_var, counter, momentum, groups)
    y: Tensor = _apply(x, residual, weight, bias, mean, var, eps, relu)
    return y
