"""Batch norm over groups of samples, addition and ReLU on CUDA, in bf16 and channels-last memory.

`official` is torch's batch norm on one group after the other, `compiled` what torch.compile makes
of the same sums over all groups at once. Tensors come from memory as in a step.
N batch, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import relu

from bench.measure.contest import Race, Way
from bench.races.layers import in_turns
from fastmoco_kernels import batch_norm_act, reference

# Layers of ResNet-50 at 224 pixels: N, C, side, whether something is added, groups.
CASES = (
    (256, 64, 112, False, 8),
    (256, 64, 56, False, 8),
    (256, 256, 56, True, 8),
    (256, 128, 28, False, 8),
    (256, 1024, 14, True, 8),
    (256, 512, 7, False, 8),
    (256, 2048, 7, True, 8),
    (32, 256, 56, True, 1),
    (32, 1024, 14, True, 1),
)
MOMENTUM, EPS = 0.1, 1e-5
Function = Callable[..., Tensor]


def batched(x: Tensor, residual: Tensor | None, norm: list[Tensor], groups: int) -> Tensor:
    """The formulation that torch.compile fuses best: every group in one reduction."""
    weight, bias, running_mean, running_var, counter = norm
    n, c, h, w = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(groups, -1, c).float()
    var, mean = torch.var_mean(rows, dim=1, correction=0)
    scale = torch.rsqrt(var + EPS) * weight
    out = (rows * scale[:, None] + (bias - mean * scale)[:, None]).to(x.dtype)
    with torch.no_grad():
        running_mean.lerp_(mean.mean(0), MOMENTUM)
        running_var.lerp_(var.mean(0) * (rows.shape[1] / (rows.shape[1] - 1)), MOMENTUM)
        counter.add_(1)
    out = out.view(n, h, w, c).permute(0, 3, 1, 2)
    return relu(out if residual is None else out + residual)


def group_batch_norm_race(
    n: int, c: int, side: int, added: bool, groups: int, device: torch.device
) -> Race:
    """Forward and backward, with the gradients of weight and bias and the running statistics."""
    generator = torch.Generator(device).manual_seed(0)
    x, residual, upstream = (
        torch.randn(n, c, side, side, generator=generator, device=device)
        .to(torch.bfloat16)
        .contiguous(memory_format=torch.channels_last)
        for _ in range(3)
    )
    turn = in_turns(x, residual, upstream)
    norm = [torch.linspace(0.5, 1.5, c, device=device) for _ in range(4)]
    norm.append(torch.zeros((), dtype=torch.int64, device=device))

    def official(x: Tensor, residual: Tensor | None, norm: list[Tensor]) -> Tensor:
        definition: Function = reference.batch_norm_act
        return definition(x, residual, *norm[:4], True, MOMENTUM, EPS, groups, True)

    def fused(x: Tensor, residual: Tensor | None, norm: list[Tensor]) -> Tensor:
        ours: Function = batch_norm_act
        return ours(x, residual, *norm, MOMENTUM, EPS, groups, True)

    @torch.compile(dynamic=False)
    def compiled(x: Tensor, residual: Tensor | None, norm: list[Tensor]) -> Tensor:
        return batched(x, residual, norm, groups)

    def gradients(function: Function, tensors: list[Tensor], norm: list[Tensor]) -> list[Tensor]:
        a, b, dy = tensors
        wanted = [a, *norm[:2], b] if added else [a, *norm[:2]]
        leaves = [t.detach().requires_grad_() for t in wanted]
        y = function(leaves[0], leaves[3] if added else None, [*leaves[1:3], *norm[2:]])
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    exact = [t.double() if t.is_floating_point() else t for t in norm]
    wide = [t.double() for t in (x, residual, upstream)]
    # In half the bytes: the largest of these is 1.6 GB in float64.
    truth = [t.float() for t in gradients(official, wide, exact)]
    del wide

    def error(got: list[Tensor]) -> float:
        # On average: beside the kink of the ReLU single gradients are right either way.
        pairs = zip(got, truth, strict=True)
        return max(float((g.float() - w).abs().mean() / w.abs().mean()) for g, w in pairs)

    def run(function: Function) -> list[Tensor]:
        return gradients(function, next(turn), norm)

    functions: dict[str, Function] = {"official": official, "compiled": compiled, "fastmoco": fused}
    ways = [Way(name, partial(run, function), error, 2e-2) for name, function in functions.items()]
    case = {"n": n, "c": c, "side": side, "residual": added, "groups": groups}
    # Forward x twice and y once, backward x and dy twice and dx once. An addition: the residual
    # forward, and y and the residual's gradient, which the second pass reads in the place of dy.
    case |= {"least_bytes": (11 if added else 8) * x.nbytes, "device": device.type}
    return "batch_norm", case, ways
