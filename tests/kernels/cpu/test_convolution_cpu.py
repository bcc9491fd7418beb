"""The weight gradient of the CPU's convolution against its definition in float64."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoco.network.convolution import Conv2d, adopt
from fastmoco_kernels.convolution import convolution_cpu
from fastmoco_kernels.convolution.convolution_cpu import convolution, supports, weight_gradient
from tests.support.compiled import needs, threads

pytestmark = pytest.mark.processor
needs_kernel = needs(convolution_cpu.reason())

# N, C, H, W, O, K, stride, padding: a block of 256 pixels that ends in the middle of an image, odd
# numbers of pixels and of columns, two and three parts of 6272 pixels, one of them ragged, images
# smaller than the kernel, a width that no power of two divides, more channels than are packed at
# once, taps that read nothing but padding.
SHAPES = [
    (3, 64, 13, 11, 128, 3, 1, 1),
    (5, 128, 9, 9, 64, 1, 1, 0),
    (4, 64, 15, 14, 64, 3, 2, 1),
    (3, 64, 17, 17, 192, 1, 2, 0),
    (2, 64, 83, 79, 64, 3, 1, 1),
    (7, 64, 53, 51, 64, 1, 1, 0),
    (2, 64, 2, 1, 64, 5, 1, 2),
    (1, 1088, 5, 5, 64, 1, 1, 0),
    (1, 64, 4, 4, 2112, 1, 1, 0),
    (1, 64, 1, 1, 64, 3, 1, 1),
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Normal values in bf16, channels-last."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator).bfloat16()
    return values.contiguous(memory_format=torch.channels_last)


def case(
    n: int, c: int, h: int, w: int, o: int, k: int, stride: int, padding: int
) -> tuple[Tensor, Tensor, torch.Size]:
    """Input, gradient of the output and shape of the weight."""
    side = [(s + 2 * padding - k) // stride + 1 for s in (h, w)]
    return normal(n, c, h, w), normal(n, o, *side, seed=1), torch.Size((o, c, k, k))


def defined(x: Tensor, dy: Tensor, shape: torch.Size, stride: int, padding: int) -> Tensor:
    """The same tap by tap in float64: what each tap reads of the padded image, times dy."""
    padded = F.pad(x.double(), [padding] * 4)
    height, width = dy.shape[2:]
    dw = torch.empty(shape, dtype=torch.float64)
    for ky in range(shape[2]):
        for kx in range(shape[3]):
            seen = padded[:, :, ky::stride, kx::stride][:, :, :height, :width]
            dw[:, :, ky, kx] = torch.einsum("nohw,nchw->oc", dy.double(), seen)
    return dw


@needs_kernel
@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("sizes", SHAPES)
def test_gradient_is_that_of_float64(sizes: tuple[int, ...], number: int) -> None:
    x, dy, shape = case(*sizes)
    truth = defined(x, dy, shape, *sizes[6:])
    with threads(number):
        dw = weight_gradient(x, dy, shape, *sizes[6:])
    assert dw.dtype == torch.float32
    assert dw.is_contiguous(memory_format=torch.channels_last)
    # float32 sums of up to 13,000 products, not rounded to bf16 (2**-9) at the end.
    assert float((dw - truth).norm()) <= 2e-6 * float(truth.norm())


@needs_kernel
def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    def run(number: int, sizes: tuple[int, ...]) -> Tensor:
        x, dy, shape = case(*sizes)
        with threads(number):
            return weight_gradient(x, dy, shape, *sizes[6:])

    for sizes in (SHAPES[4], SHAPES[0]):
        alone = run(1, sizes)
        assert all(torch.equal(run(number, sizes), alone) for number in (2, 3, 5))


@needs_kernel
def test_nan_reaches_its_channel_and_no_other() -> None:
    x, dy, shape = case(2, 64, 6, 6, 64, 3, 1, 1)
    x[1, 7, 3, 3] = torch.nan
    dw = weight_gradient(x, dy, shape, 1, 1)
    assert dw[:, 7].isnan().all()
    assert not dw[:, [c for c in range(64) if c != 7]].isnan().any()


@needs_kernel
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_forward_and_input_gradient_are_those_of_torch(layout: torch.memory_format) -> None:
    x, weight = normal(2, 64, 9, 9), normal(128, 64, 3, 3, seed=2).float()
    dy = normal(2, 128, 5, 5, seed=3).contiguous(memory_format=layout)
    mine, theirs = (t.clone().requires_grad_() for t in (x, x))
    w = weight.clone().requires_grad_()
    y = convolution(mine, w, 2, 1)
    y.backward(dy)
    y_torch = F.conv2d(theirs, weight.bfloat16(), None, 2, 1)
    y_torch.backward(dy)
    assert torch.equal(y, y_torch)
    assert mine.grad is not None
    assert theirs.grad is not None
    assert torch.equal(mine.grad, theirs.grad)
    assert w.grad is not None
    truth = defined(x, dy, w.shape, 2, 1)
    assert float((w.grad - truth).norm()) <= 2e-6 * float(truth.norm())


@needs_kernel
def test_module_under_autocast_takes_the_kernel_and_its_gradient_is_closer() -> None:
    """To float64, on the operands that autocast rounds, than the one that torch rounds to bf16."""
    plain = nn.Conv2d(64, 64, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    network = nn.Sequential(nn.Identity(), plain)
    adopt(network)
    own = network[1]
    assert isinstance(own, Conv2d)
    x, dy = normal(4, 64, 12, 12), normal(4, 64, 12, 12, seed=1)
    truth = defined(x, dy, plain.weight.shape, 1, 1)
    errors = []
    for module in (own, plain):
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        assert y.dtype == torch.bfloat16
        (dw,) = torch.autograd.grad(y, [plain.weight], dy)
        assert dw.dtype == torch.float32
        errors.append(float((dw - truth).norm() / truth.norm()))
    assert errors[0] < 2e-6 < 1e-4 < errors[1]


def test_adopted_network_has_the_same_parameters_and_draws_nothing() -> None:
    torch.manual_seed(5)
    network = nn.Sequential(
        nn.Conv2d(8, 8, 3, 2, 1, bias=False), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 1, groups=2)
    )
    state, weight = torch.get_rng_state(), network[0].weight
    adopt(network)
    assert torch.equal(state, torch.get_rng_state())
    assert list(network.state_dict()) == ["0.weight", "1.weight", "1.bias", "2.weight", "2.bias"]
    assert network[0].weight is weight
    assert [type(m) for m in network] == [Conv2d, nn.Conv2d, nn.Conv2d]
    assert network(torch.randn(1, 8, 6, 6)).shape == (1, 4, 3, 3)


@needs_kernel
def test_what_it_does_not_take() -> None:
    x = normal(2, 64, 5, 5)
    w = torch.randn(128, 64, 3, 3).to(memory_format=torch.channels_last)
    assert supports(x, w)
    assert supports(x, torch.randn(128, 64, 1, 1))  # every layout of a 1x1 kernel is channels-last
    assert not supports(x.float(), w)
    assert not supports(x, w.bfloat16())
    assert not supports(x.contiguous(), w)
    assert not supports(x, w.contiguous())
    assert not supports(normal(2, 128, 5, 5), w)  # two groups
    assert not supports(normal(2, 96, 5, 5), torch.randn(64, 96, 1, 1))
    assert not supports(x, torch.randn(96, 64, 1, 1))
    assert not supports(x, torch.randn(64, 64, 1, 3).to(memory_format=torch.channels_last))


@pytest.mark.parametrize("compiler", ["false", "/nowhere/g++"])
def test_without_a_compiler_there_is_a_reason_and_no_error(compiler: str) -> None:
    code = """if True:
        import torch
        from fastmoco.network.convolution import Conv2d, convolution_choice
        conv = Conv2d(64, 64, 1, bias=False).to(memory_format=torch.channels_last)
        x = torch.randn(2, 64, 3, 3).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            conv(x.bfloat16()).sum().backward()
        assert conv.weight.grad.shape == (64, 64, 1, 1)
        print(convolution_choice(torch.device("cpu"), "bf16", False))
    """
    environment = {"CXX": compiler, "PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith("by oneDNN (")
    assert compiler in run.stdout
