"""The CPU's fp32 convolutions against float64, beside ATen's own distance to it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoco.network.convolution import Conv2d, adopt
from fastmoco_kernels.convolution import convolution_fp32_cpu, direct_convolution_cpu, winograd_cpu
from fastmoco_kernels.convolution.convolution_fp32_cpu import by_winograd, convolution, supports
from tests.support.compiled import needs, threads

needs_kernel = needs(convolution_fp32_cpu.reason())

# N, C, H, W, O, K, stride, padding. Direct: rows of six pixels that end in another image, of one
# pixel of several images on small maps and of a single image, maps of 1, 2 and 3 pixels, all taps
# but one in the padding, stride 2 over even and odd sides, pixels that no tap sees, kernels without
# padding, several blocks of outputs and of channels, two parts of 6272 pixels, few channels.
DIRECT = [
    (3, 64, 13, 11, 128, 3, 1, 1),
    (5, 128, 9, 9, 64, 1, 1, 0),
    (4, 64, 15, 14, 64, 3, 2, 1),
    (3, 64, 17, 17, 192, 1, 2, 0),
    (2, 64, 81, 79, 64, 3, 1, 1),
    (7, 64, 1, 1, 128, 3, 1, 1),
    (13, 64, 2, 2, 64, 3, 1, 1),
    (8, 64, 3, 3, 64, 3, 1, 1),
    (1, 64, 2, 1, 64, 3, 2, 1),
    (1, 64, 4, 4, 64, 2, 2, 0),
    (2, 64, 7, 5, 64, 1, 3, 0),
    (2, 320, 3, 4, 192, 3, 1, 1),
    (3, 16, 9, 9, 48, 3, 2, 1),
]
# 3x3, stride 1, padding 1. Winograd: whole tiles, half ones in both directions, fewer than a task's
# 48 and more, more than a chunk of 1024, more than one block of 64 outputs, ragged, a single image.
WINOGRAD = [
    (2, 64, 8, 8, 64, 3, 1, 1),
    (3, 128, 7, 5, 64, 3, 1, 1),
    (1, 64, 4, 4, 192, 3, 1, 1),
    (2, 64, 53, 50, 64, 3, 1, 1),
    (13, 256, 4, 5, 128, 3, 1, 1),
    (2, 32, 6, 6, 80, 3, 1, 1),
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Normal values in fp32, channels-last."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    return values.contiguous(memory_format=torch.channels_last)


def case(
    n: int, c: int, h: int, w: int, o: int, k: int, stride: int, padding: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and gradient of the output."""
    side = [(s + 2 * padding - k) // stride + 1 for s in (h, w)]
    return normal(n, c, h, w), normal(o, c, k, k, seed=1), normal(n, o, *side, seed=2)


def aten(x: Tensor, weight: Tensor, dy: Tensor, stride: int, padding: int) -> list[Tensor]:
    """Result, gradient of x and gradient of the weight, in the dtype of the tensors."""
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    y = F.conv2d(leaves[0], leaves[1], None, stride, padding)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def by_direct(x: Tensor, weight: Tensor, dy: Tensor, stride: int, padding: int) -> list[Tensor]:
    """The same three by matrix products."""
    edge = (stride, padding)
    return [
        direct_convolution_cpu.forward(x, weight, *edge),
        direct_convolution_cpu.input_gradient(dy, weight, x.shape, *edge),
        direct_convolution_cpu.weight_gradient(x, dy, weight.shape, *edge),
    ]


def by_tiles(x: Tensor, weight: Tensor, dy: Tensor, *_: int) -> list[Tensor]:
    """The same three by Winograd's transforms."""
    return [
        winograd_cpu.forward(x, weight),
        winograd_cpu.input_gradient(dy, weight),
        winograd_cpu.weight_gradient(x, dy),
    ]


def chosen(x: Tensor, weight: Tensor, dy: Tensor, stride: int, padding: int) -> list[Tensor]:
    """The same three as the network gets them."""
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    y = convolution(leaves[0], leaves[1], stride, padding)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


Way = Callable[..., list[Tensor]]
CASES = [
    *((by_direct, sizes) for sizes in DIRECT),
    *((by_tiles, sizes) for sizes in WINOGRAD),
    *((chosen, sizes) for sizes in (DIRECT[2], DIRECT[6], WINOGRAD[1], DIRECT[4])),
]


def distance(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm())


@needs_kernel
@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize(("way", "sizes"), CASES)
def test_no_farther_from_float64_than_aten(way: Way, sizes: tuple[int, ...], number: int) -> None:
    x, weight, dy = case(*sizes)
    edge = sizes[6:]
    truth = aten(x.double(), weight.double(), dy.double(), *edge)
    theirs = aten(x, weight, dy, *edge)
    with threads(number):
        mine = way(x, weight, dy, *edge)
    for a, b, exact in zip(mine, theirs, truth, strict=True):
        assert a.shape == exact.shape
        assert a.is_contiguous(memory_format=torch.channels_last)
        # Sums of some hundred products differ by their order: hence a slack of two roundings.
        assert distance(a, exact) <= 1.2 * distance(b, exact) + 2**-22


@needs_kernel
@pytest.mark.parametrize(
    ("way", "sizes"), [(by_direct, DIRECT[4]), (by_direct, DIRECT[6]), (by_tiles, WINOGRAD[3])]
)
def test_bits_do_not_depend_on_the_number_of_threads(way: Way, sizes: tuple[int, ...]) -> None:
    def run(number: int) -> list[Tensor]:
        with threads(number):
            return way(*case(*sizes), *sizes[6:])

    alone = run(1)
    for number in (2, 3, 5):
        assert all(map(torch.equal, run(number), alone))


@needs_kernel
def test_nan_stays_with_the_pixels_that_see_it() -> None:
    for way, sizes in ((by_direct, DIRECT[7]), (by_tiles, WINOGRAD[0])):
        x, weight, dy = case(*sizes)
        x[1, 7, 0, 0] = torch.nan
        y, _, dw = way(x, weight, dy, 1, 1)
        assert y[1, :, :2, :2].isnan().all()
        assert not y[0].isnan().any()
        assert not y[1, :, 2:, 2:].isnan().any()
        assert dw[:, 7].isnan().any()
        assert not dw[:, [c for c in range(64) if c != 7]].isnan().any()


@needs_kernel
def test_shapes_choose_the_way() -> None:
    def taken(side: int, kernel: int, stride: int, padding: int) -> bool:
        image, weight = torch.Size((2, 64, side, side)), torch.Size((64, 64, kernel, kernel))
        return by_winograd(image, weight, stride, padding)

    assert taken(4, 3, 1, 1)
    assert not taken(3, 3, 1, 1)
    assert not taken(8, 3, 2, 1)
    assert not taken(8, 3, 1, 0)
    assert not taken(8, 1, 1, 0)


@needs_kernel
def test_adopted_network_computes_what_torch_does_for_queries_and_for_keys() -> None:
    plain = [nn.Conv2d(64, 128, 3, 2, 1, bias=False), nn.Conv2d(128, 64, 3, padding=1, bias=False)]
    network = nn.Sequential(*plain).to(memory_format=torch.channels_last)
    x = normal(3, 64, 13, 13)
    wanted = network(x)
    grads = torch.autograd.grad(wanted.square().sum(), list(network.parameters()))
    adopt(network)
    assert all(type(m) is Conv2d for m in network)
    y = network(x)
    assert "_Convolution" in type(y.grad_fn).__name__
    mine = torch.autograd.grad(y.square().sum(), list(network.parameters()))
    with torch.no_grad():
        keys = network(x)
    assert torch.equal(keys, y)
    assert not torch.equal(y, wanted)  # or the kernel did not run
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)
    for a, b in zip(mine, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


@needs_kernel
def test_only_what_is_wanted_gets_a_gradient() -> None:
    x, weight, dy = case(*WINOGRAD[0])
    convolution(x, weight.requires_grad_(), 1, 1).backward(dy)
    assert x.grad is None
    assert weight.grad is not None
    y = convolution(x.requires_grad_(), weight.detach(), 1, 1)
    y.backward(dy.contiguous())  # of NCHW memory
    expected = aten(x.detach(), weight.detach(), dy, 1, 1)[1]
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-4)


@needs_kernel
def test_what_it_does_not_take() -> None:
    x = normal(2, 64, 5, 5)
    w = normal(128, 64, 3, 3)
    assert supports(x, w)
    assert supports(x, torch.randn(128, 64, 1, 1))
    assert not supports(x.bfloat16(), w)
    assert not supports(x, w.bfloat16())
    assert not supports(x.double(), w.double())
    assert not supports(x.contiguous(), w)
    assert not supports(x, w.contiguous())
    assert not supports(normal(2, 128, 5, 5), w)  # two groups
    assert not supports(normal(2, 3, 5, 5), normal(64, 3, 3, 3))
    assert not supports(x, normal(72, 64, 3, 3))
    assert not supports(x, normal(64, 64, 5, 5))
    assert not supports(x, normal(64, 64, 1, 3))
    assert not supports(x[:0], w)
    with torch.autocast("cpu", torch.bfloat16):
        assert not supports(x, w)


@pytest.mark.parametrize("compiler", ["false", "/nowhere/g++"])
def test_without_a_compiler_there_is_a_reason_and_no_error(compiler: str) -> None:
    code = """if True:
        import torch
        from fastmoco.network.convolution import Conv2d, convolution_choice
        conv = Conv2d(64, 64, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
        x = torch.randn(2, 64, 4, 4).to(memory_format=torch.channels_last)
        conv(x).sum().backward()
        assert conv.weight.grad.shape == (64, 64, 3, 3)
        print(convolution_choice(torch.device("cpu"), "fp32", False))
    """
    environment = {"CXX": compiler, "PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith("by oneDNN (")
    assert compiler in run.stdout
