"""The Triton max-pooling kernels, interpreted on the CPU, against ATen in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoco_kernels.network.max_pool import Window, backward_launch, forward_launch
from tests.kernels.interpreter import watched

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NHWC = torch.channels_last


def kernels(x: Tensor, dy: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    x, dy = x.contiguous(memory_format=NHWC), dy.contiguous(memory_format=NHWC)
    work, y, index = forward_launch(x, window)
    work.run()
    work, dx = backward_launch(dy, index, x.shape[2], x.shape[3], window)
    work.run()
    return y, dx


def aten(x: Tensor, dy: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    x = x.double().requires_grad_(True)
    y = F.max_pool2d(x, *window)
    (dx,) = torch.autograd.grad(y, x, dy.double())
    return y.detach(), dx


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize(
    ("shape", "window"),
    [
        ((2, 64, 12, 12), (3, 2, 1)),
        ((2, 24, 13, 9), (3, 2, 1)),
        ((1, 5, 1, 2), (3, 2, 1)),
        ((2, 8, 10, 11), (2, 2, 0)),
        ((1, 7, 9, 8), (3, 1, 1)),
        ((1, 3, 11, 12), (2, 3, 0)),  # some inputs are in no window
    ],
)
def test_equals_float64_with_many_ties(
    dtype: torch.dtype, shape: tuple[int, ...], window: Window
) -> None:
    """Whole numbers, so that every sum of gradients is exact and ties are common."""
    torch.manual_seed(0)
    x = torch.randint(-1, 2, shape).to(dtype)
    dy = torch.randint(-3, 4, F.max_pool2d(x.float(), *window).shape).to(dtype)
    for got, want in zip(kernels(x, dy, window), aten(x, dy, window), strict=True):
        assert got.is_contiguous(memory_format=NHWC)
        assert torch.equal(got.double(), want)


def test_no_program_leaves_its_tensors_or_writes_what_another_does() -> None:
    x, dy = torch.randn(2, 64, 13, 8), torch.randn(2, 64, 7, 4)
    with watched() as watch:
        kernels(x, dy, (3, 2, 1))
    assert len(watch.programs) == 2 * 3  # two images, three blocks of 1,024 lanes


def test_nan_and_infinities_go_where_aten_sends_them() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 9, 10)
    x[0, :3] = float("-inf")
    x[0, 4, 2:5, 3:6] = float("nan")
    x[1, 0, 0, 0], x[1, 1, 8, 9] = float("nan"), float("inf")
    dy = torch.randint(-3, 4, (2, 6, 5, 5)).float()
    for got, want in zip(kernels(x, dy, (3, 2, 1)), aten(x, dy, (3, 2, 1)), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("large", range(4))
def test_gradients_are_summed_in_float32(large: int) -> None:
    """One input wins four windows; in bfloat16 256 + 1 + 1 + 1 stays 256 where 256 is first."""
    x = torch.zeros(1, 1, 4, 4, dtype=BF16)
    x[0, 0, 1, 1] = 1
    dy = torch.ones(4, dtype=BF16)
    dy[large] = 256
    _, dx = kernels(x, dy.view(1, 1, 2, 2), (3, 2, 1))
    assert dx[0, 0, 1, 1] == torch.tensor(259.0).bfloat16()
