"""Batch norm with addition and ReLU, and max pooling, in bf16 and channels-last memory.

`official` is what torch computes layer by layer, `compiled` what torch.compile makes of it; of
batch norm on CUDA it compiles one reduction over all groups.
N batch, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import batch_norm, max_pool2d, relu

from bench.races.race import Outputs, Race, forward_backward
from fastmoco_kernels import batch_norm_act, max_pool, reference
from fastmoco_kernels.network import batch_norm_cpu

# Layers of ResNet-50 at 224 pixels: N, C, side, whether something is added, groups.
CUDA_NORMS = (
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
CPU_NORMS = (
    (32, 64, 112, False, 1),
    (32, 256, 56, True, 1),
    (32, 256, 14, False, 1),
    (32, 1024, 14, True, 1),
)
MOMENTUM, EPS = 0.1, 1e-5
Layer = Callable[[Tensor, Tensor | None, Sequence[Any]], Tensor]
"""Of images, what is added, and weight, bias, running statistics and counter."""
DEFINITION: Callable[..., Tensor] = reference.batch_norm_act
ON_CPU: Callable[..., Tensor] = batch_norm_cpu.batch_norm_act
POOL = (3, 2, 1)


def _normal(*shape: int, count: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    made = (torch.randn(shape, generator=generator, device=device) for _ in range(count))
    return [t.bfloat16().contiguous(memory_format=torch.channels_last) for t in made]


def batched(x: Tensor, residual: Tensor | None, norm: Sequence[Any], groups: int) -> Tensor:
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


def batch_norm_race(
    n: int, c: int, side: int, added: bool, groups: int, device: torch.device
) -> Race:
    """Forward and backward, with the gradients of weight and bias and the running statistics."""
    x, residual, upstream = _normal(n, c, side, side, count=3, device=device)
    norm = [torch.linspace(0.5, 1.5, c, device=device) for _ in range(4)]
    norm.append(torch.zeros((), dtype=torch.int64, device=device))
    settings: tuple[Any, ...] = (MOMENTUM, EPS, groups, True)

    def defined(x: Tensor, residual: Tensor | None, norm: Sequence[Any]) -> Tensor:
        return DEFINITION(x, residual, *norm[:4], True, *settings)

    def official(x: Tensor, residual: Tensor | None, norm: Sequence[Any]) -> Tensor:
        weight, bias, mean, var, _ = norm
        parts = [batch_norm(part, mean, var, weight, bias, True) for part in x.chunk(groups)]
        y = parts[0] if groups == 1 else torch.cat(parts)
        return relu(y if residual is None else y.add_(residual), inplace=True)

    @torch.compile(dynamic=False)
    def compiled(x: Tensor, residual: Tensor | None, norm: Sequence[Any]) -> Tensor:
        on_cuda = device.type == "cuda"
        return batched(x, residual, norm, groups) if on_cuda else official(x, residual, norm)

    def fused(x: Tensor, residual: Tensor | None, norm: Sequence[Any]) -> Tensor:
        if device.type == "cpu":
            return ON_CPU(x, residual, *norm[:4], True, *settings)
        return batch_norm_act(x, residual, *norm, *settings)

    def way(layer: Layer, norm: Sequence[Any]) -> Callable[..., Outputs]:
        def call(x: Tensor, residual: Tensor, upstream: Tensor) -> Outputs:
            def of(x: Tensor, a: Tensor, b: Tensor, residual: Tensor | None = None) -> Tensor:
                return layer(x, residual, [a, b, *norm[2:]])

            wanted = [x, *norm[:2], residual] if added else [x, *norm[:2]]
            return forward_backward(of, wanted, upstream)

        return call

    exact = [t.double() if t.is_floating_point() else t for t in norm]
    # In half the bytes: the largest of these is 1.6 GB in float64.
    whole = way(defined, exact)(x.double(), residual.double(), upstream.double())
    truth = [t.float() for t in whole]
    case = {"n": n, "c": c, "side": side, "residual": added}
    if device.type == "cuda":
        # Forward x twice and y once, backward x and dy twice and dx once. An addition: the residual
        # forward, and y and the residual's gradient, which the second pass reads instead of dy.
        case |= {"groups": groups, "least_bytes": (11 if added else 8) * x.nbytes}
    layers: dict[str, Layer] = {"official": official, "compiled": compiled, "fastmoco": fused}
    ways = {name: way(layer, norm) for name, layer in layers.items()}
    # torch rounds before the ReLU, at whose kink gradients of weight and bias are off by 2.5e-2.
    return Race("batch_norm", case, ways, truth, 4e-2, [x, residual, upstream])


def max_pool_race(n: int, c: int, side: int, device: torch.device) -> Race:
    """Max pooling behind the stem, forward and backward."""
    (x,) = _normal(n, c, side, side, count=1, device=device)
    (dy,) = _normal(*max_pool2d(x, *POOL).shape, count=1, device=device)

    def official(x: Tensor) -> Tensor:
        return max_pool2d(x, *POOL)

    def way(pool: Callable[[Tensor], Tensor]) -> Callable[..., Outputs]:
        return lambda x, dy: forward_backward(pool, [x], dy)

    ways = {
        "official": way(official),
        "compiled": way(torch.compile(official, dynamic=False)),
        "fastmoco": way(lambda x: max_pool(x, *POOL)),
    }
    truth = way(official)(x.double(), dy.double())
    # Two passes with a byte index: x, y, index and dy, index, dx, each once.
    least = 2 * (x.nbytes + dy.nbytes + dy.numel())
    case = {"n": n, "c": c, "side": side, "least_bytes": least}
    return Race("max_pool", case, ways, truth, 2e-2, [x, dy])
