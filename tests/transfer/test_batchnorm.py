"""Batch norm over ranks, against torch's own on the whole batch in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastmoco.machine.ranks import World
from fastmoco.transfer.batchnorm import SyncBatchNorm2d
from tests.support.ranks import Ranks

CHANNELS = 3


def pieces(rows: tuple[int, int]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Inputs of each rank, the gradient that reaches their outputs, and weight and bias."""
    draw = torch.Generator().manual_seed(5)
    sides = (4, 6)  # detection pads the pictures of each rank to a size of its own

    def some(n: int, side: int) -> Tensor:
        x = torch.randn(n, CHANNELS, side, side + 1, generator=draw, dtype=torch.float64)
        return x + 100 * n  # means far apart, and far from 0

    inputs = [some(n, side) for n, side in zip(rows, sides, strict=True)]
    slopes = [some(n, side) for n, side in zip(rows, sides, strict=True)]
    return inputs, slopes, torch.rand(2, CHANNELS, generator=draw, dtype=torch.float64)


def run(world: World, rows: tuple[int, int]) -> list[Tensor]:
    """Output, gradients of input, weight and bias on this rank, and the running statistics."""
    inputs, slopes, affine = pieces(rows)
    norm = SyncBatchNorm2d(CHANNELS, world).double()
    with torch.no_grad():
        norm.weight.copy_(affine[0])
        norm.bias.copy_(affine[1])
    x = inputs[world.rank].requires_grad_()
    y = norm(x)
    (y * slopes[world.rank]).sum().backward()
    grads = [x.grad, norm.weight.grad, norm.bias.grad]
    buffers = [norm.running_mean, norm.running_var, norm.num_batches_tracked]
    return [t.detach() for t in [y, *grads, *buffers] if t is not None]


@pytest.mark.parametrize("rows", [(2, 3), (4, 0)], ids=["unequal", "one rank without a region"])
def test_two_ranks_are_one_batch(two_ranks: Ranks, rows: tuple[int, int]) -> None:
    inputs, slopes, affine = pieces(rows)
    # Positions of all pictures as rows of a BatchNorm1d: it does not mind their different sizes.
    flat, slope = (
        torch.cat([x.permute(0, 2, 3, 1).reshape(-1, CHANNELS) for x in group])
        for group in (inputs, slopes)
    )
    oracle = nn.BatchNorm1d(CHANNELS).double()
    with torch.no_grad():
        oracle.weight.copy_(affine[0])
        oracle.bias.copy_(affine[1])
    flat.requires_grad_()
    y = oracle(flat)
    (y * slope).sum().backward()

    ranks = two_ranks.run(run, rows)
    for place, wanted in ((0, y), (1, flat.grad)):
        assert wanted is not None
        found = [r[place].permute(0, 2, 3, 1).reshape(-1, CHANNELS) for r in ranks]
        torch.testing.assert_close(torch.cat(found), wanted.detach(), rtol=1e-9, atol=1e-9)
    for place, parameter in ((2, oracle.weight), (3, oracle.bias)):
        total = ranks[0][place] + ranks[1][place]
        torch.testing.assert_close(total, parameter.grad, rtol=1e-9, atol=1e-9)
    for rank in ranks:
        for found_, wanted in zip(rank[4:], oracle.buffers(), strict=True):
            torch.testing.assert_close(found_, wanted, rtol=1e-12, atol=1e-12)


def test_addition_and_relu_are_part_of_the_call() -> None:
    norm = SyncBatchNorm2d(CHANNELS, World(0, 0, 1, torch.device("cpu"), "none"))
    x, residual = torch.randn(2, 2, CHANNELS, 5, 5)
    wanted = nn.BatchNorm2d(CHANNELS)(x) + residual
    torch.testing.assert_close(norm(x, residual=residual, relu=True), wanted.clamp(min=0))
