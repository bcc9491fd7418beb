"""The multi-tensor update kernels, interpreted on the CPU, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmoco_kernels.ema import ema_triton, launch_configuration
from fastmoco_kernels.multi_tensor import table
from fastmoco_kernels.sgd_ema import launch_configuration as sgd_launch_configuration
from fastmoco_kernels.sgd_ema import sgd_ema_triton
from tests.kernels.interpreter import watched

BLOCK = launch_configuration(90)[0]
SGD_BLOCK = sgd_launch_configuration(90)[0]


def draw(sizes: list[tuple[int, ...]], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for size in sizes]


def around(block: int) -> list[tuple[int, ...]]:
    """One element, a block, one less, one more, several, and a convolution."""
    return [(1,), (block,), (block - 1,), (block + 1,), (3 * block + 5,), (16, 3, 7, 7)]


@pytest.mark.parametrize("shadow", [None, torch.bfloat16, torch.float16])
def test_ema(shadow: torch.dtype | None) -> None:
    targets, sources = draw(around(BLOCK), 1), draw(around(BLOCK), 2)
    shadows = [torch.empty(t.shape, dtype=shadow) for t in targets] if shadow else []
    want = [0.999 * t.double() + 0.001 * s.double() for t, s in zip(targets, sources, strict=True)]
    with watched(*targets, *sources, *shadows):
        ema_triton(targets, sources, 0.999, shadows)
    for got, exact in zip(targets, want, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-7)
    for copy, got in zip(shadows, targets, strict=False):
        assert torch.equal(copy, got.to(copy.dtype))


def test_ema_leaves_equal_parameters_equal() -> None:
    targets = draw([(5000,)], 1)
    before = targets[0].clone()
    ema_triton(targets, [before.clone()], 0.999, [])
    assert torch.equal(targets[0], before)


def test_sgd_ema_is_sgd_then_ema_over_steps() -> None:
    sizes = around(SGD_BLOCK)
    params, ema = draw(sizes, 1), draw(sizes, 2)
    buffers = [torch.zeros_like(p) for p in params]
    exact = [torch.nn.Parameter(p.double()) for p in params]
    exact_ema = [e.double() for e in ema]
    sgd = torch.optim.SGD(exact, lr=0.1, momentum=0.9, weight_decay=1e-3)
    for step, lr in enumerate((0.1, 0.05, 0.2)):
        grads = draw(sizes, 10 + step)
        for p, g in zip(exact, grads, strict=True):
            p.grad = g.double()
        sgd.param_groups[0]["lr"] = lr
        sgd.step()
        exact_ema = [0.9 * e + 0.1 * p.detach() for e, p in zip(exact_ema, exact, strict=True)]
        with watched(*params, *grads, *buffers, *ema):
            sgd_ema_triton(params, grads, buffers, ema, torch.tensor(lr), 0.9, 1e-3, 0.9)
    for got, want in zip([*params, *ema], [*exact, *exact_ema], strict=True):
        torch.testing.assert_close(got.double(), want.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("found", [0.0, 2.0, -1.0])
def test_sgd_ema_divides_by_the_scale_and_skips_what_overflowed(found: float) -> None:
    sizes = around(SGD_BLOCK)
    params, grads, buffers, ema = (draw(sizes, seed) for seed in range(4))
    want = [[t.double() for t in tensors] for tensors in (params, buffers, ema)]
    if found:
        grads[-1].view(-1)[3] = torch.inf
        if found > 0:
            want[2] = [0.9 * e + 0.1 * p for e, p in zip(want[2], want[0], strict=True)]
    else:
        pairs = zip(grads, want[0], want[1], strict=True)
        want[1] = [0.9 * b + g.double() / 512 + 1e-3 * p for g, p, b in pairs]
        want[0] = [p - 0.1 * b for p, b in zip(want[0], want[1], strict=True)]
        want[2] = [0.9 * e + 0.1 * p for e, p in zip(want[2], want[0], strict=True)]
    lr, scale = torch.tensor(0.1), torch.tensor([512.0])
    with watched(*params, *grads, *buffers, *ema):
        sgd_ema_triton(
            params, grads, buffers, ema, lr, 0.9, 1e-3, 0.9, scale, torch.tensor([found])
        )
    for got, exact in zip((params, buffers, ema), want, strict=True):
        for g, e in zip(got, exact, strict=True):
            torch.testing.assert_close(g.double(), e, rtol=1e-6, atol=1e-6)


def test_unaligned_views_and_channels_last() -> None:
    pool = torch.zeros(4 * BLOCK)
    view = pool[1 : 1 + BLOCK + 3]
    weight = draw([(8, 4, 3, 3)], 3)[0].to(memory_format=torch.channels_last)
    targets = [view, weight]
    sources = draw([(BLOCK + 3,), (8, 4, 3, 3)], 4)
    want = [0.5 * t.double() + 0.5 * s.double() for t, s in zip(targets, sources, strict=True)]
    ema_triton(targets, sources, 0.5, [])
    for got, exact in zip(targets, want, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-7)
    assert pool[0] == 0
    assert not pool[BLOCK + 4 :].any()
    assert not table([targets], BLOCK).aligned


def test_a_table_belongs_to_addresses_and_sizes() -> None:
    pool = torch.arange(64.0)
    whole, half = table([[pool]], 16), table([[pool[:32]]], 16)
    assert (len(whole.owner), len(half.owner)) == (4, 2)
    assert table([[pool]], 16).rows is whole.rows
    assert whole.rows.tolist() == [[pool.data_ptr(), 64, 0]]
    two = table([[pool[:20], pool[32:48]]], 16)
    assert two.owner.tolist() == [0, 0, 1]
    assert two.rows[:, 2].tolist() == [0, 2]
