"""The max pooling of the CPU against torch's, to the bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoco.pooling import MaxPool2d
from fastmoco_kernels import max_pool_cpu
from fastmoco_kernels.max_pool_cpu import max_pool, supports
from tests.compiled import needs, threads

pytestmark = [pytest.mark.processor, needs(max_pool_cpu.reason())]

DTYPES = [torch.float32, torch.bfloat16]
# N, C, H, W: even and odd sides, windows over both edges, one pixel, more vectors than one.
SHAPES = [(2, 32, 8, 8), (3, 64, 7, 5), (2, 96, 6, 9), (1, 32, 1, 1), (2, 32, 2, 1), (1, 64, 1, 6)]


def channels_last(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal values of which every third is equal to others, as zeros behind a ReLU are."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    values[torch.rand(shape, generator=generator) < 1 / 3] = 0.25
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_choices_and_sums_are_those_of_torch(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    mine, theirs = (channels_last(*shape, dtype=dtype).requires_grad_() for _ in range(2))
    assert supports(mine.detach())
    y, wanted = max_pool(mine), F.max_pool2d(theirs.double(), 3, 2, 1)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y.double(), wanted)
    dy = channels_last(*y.shape, dtype=dtype, seed=1)
    (dx,) = torch.autograd.grad(y, [mine], dy)
    # The first of equal values takes the gradient, or the sums go elsewhere.
    (truth,) = torch.autograd.grad(wanted, [theirs], dy.double())
    torch.testing.assert_close(dx, truth, rtol=1e-6 if dtype == torch.float32 else 2**-8, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_zeros_of_either_sign(dtype: torch.dtype) -> None:
    values = torch.tensor([-torch.inf, -0.0, 0.0, torch.inf, -2.0, 1e-30, -1e-30, 3.0])
    picks = torch.randint(8, (4, 32, 9, 9), generator=torch.Generator().manual_seed(0))
    x = values[picks].to(dtype).contiguous(memory_format=torch.channels_last)
    x[:, :, :4] = -torch.inf  # whole windows of the smallest value
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, wanted = max_pool(mine), F.max_pool2d(theirs, 3, 2, 1)
    assert torch.equal(y, wanted)
    upstream = torch.ones_like(y)
    mine_dx, dx = (
        torch.autograd.grad(o, [i], upstream)[0] for o, i in ((y, mine), (wanted, theirs))
    )
    assert torch.equal(mine_dx, dx)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nan_passes_and_so_does_its_gradient(dtype: torch.dtype, sign: float) -> None:
    x = channels_last(1, 32, 7, 7, dtype=dtype)
    x[0, 5, 3, 3] = torch.copysign(torch.tensor(torch.nan), torch.tensor(sign))
    y = max_pool(x)
    assert torch.equal(y.isnan(), F.max_pool2d(x, 3, 2, 1).isnan())
    assert int(y.isnan().sum()) == 4
    dy = torch.zeros_like(y)
    dy[0, 7, 1, 1] = torch.nan
    leaf = channels_last(1, 32, 7, 7, dtype=dtype).requires_grad_()
    (dx,) = torch.autograd.grad(max_pool(leaf), [leaf], dy)
    assert dx.isnan().nonzero()[:, 1].tolist() == [7]


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    def run(number: int) -> tuple[Tensor, Tensor]:
        with threads(number):
            x = channels_last(4, 64, 15, 14, dtype=torch.bfloat16).requires_grad_()
            y = max_pool(x)
            dy = channels_last(*y.shape, dtype=torch.bfloat16, seed=1)
            return y, torch.autograd.grad(y, [x], dy)[0]

    assert all(torch.equal(a, b) for a, b in zip(run(1), run(3), strict=True))


def test_module_pools_what_the_kernel_does_not_take() -> None:
    good = channels_last(2, 32, 6, 6, dtype=torch.float32)
    assert supports(good)
    others = [
        good.contiguous(),
        good.double(),
        good[:, :16].contiguous(memory_format=torch.channels_last),
        good.half(),
    ]
    for x in [good, *others]:
        assert torch.equal(MaxPool2d()(x), F.max_pool2d(x, 3, 2, 1))
    assert not any(supports(x) for x in others)


def test_gradient_that_comes_in_another_layout() -> None:
    x = channels_last(2, 32, 6, 6, dtype=torch.bfloat16).requires_grad_()
    y = max_pool(x)
    dy = channels_last(*y.shape, dtype=torch.bfloat16, seed=1)
    (wanted,) = torch.autograd.grad(y, [x], dy, retain_graph=True)
    (dx,) = torch.autograd.grad(y, [x], dy.contiguous())
    assert torch.equal(dx, wanted)
