"""Max pooling behind the stem: forward and backward. N batch, C channels, side of the input."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure.contest import Race, Way
from bench.races.layers import in_turns
from fastmoco_kernels import max_pool

WINDOW = (3, 2, 1)


def max_pool_race(n: int, c: int, side: int, device: torch.device) -> Race:
    """Forward and backward in bf16 and channels-last memory, by autograd."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device).bfloat16()
        return values.contiguous(memory_format=torch.channels_last)

    x = normal(n, c, side, side)
    dy = normal(*F.max_pool2d(x, *WINDOW).shape)
    turn = in_turns(x, dy)

    def official(x: Tensor) -> Tensor:
        return F.max_pool2d(x, *WINDOW)

    def step(pool: Callable[[Tensor], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            x, dy = next(turn)
            leaf = x.detach().requires_grad_()
            y = pool(leaf)
            return y.detach(), *torch.autograd.grad(y, leaf, dy)

        return run

    leaf = x.double().requires_grad_()
    y = official(leaf)
    truth = (y.detach(), *torch.autograd.grad(y, leaf, dy.double()))

    def error(got: tuple[Tensor, ...]) -> float:
        pairs = zip(got, truth, strict=True)
        return max(float((g.double() - w).abs().mean() / w.abs().mean()) for g, w in pairs)

    compiled = torch.compile(official, dynamic=False)
    ways = [
        Way("official", step(official), error, 2e-2),
        Way("compiled", step(compiled), error, 2e-2),
        Way("fastmoco", step(lambda x: max_pool(x, *WINDOW)), error, 2e-2),
    ]
    # Two passes with a byte index: x, y, index and dy, index, dx, each once.
    least = 2 * (x.nbytes + dy.nbytes + dy.numel())
    case = {"n": n, "c": c, "side": side, "least_bytes": least, "device": device.type}
    return "max_pool", case, ways
