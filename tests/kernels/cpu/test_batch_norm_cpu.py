"""The fused batch norm of the CPU against its definition in float64."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from fastmoco_kernels import reference
from fastmoco_kernels.network import batch_norm_cpu
from fastmoco_kernels.network.batch_norm_cpu import batch_norm_act, supports
from tests.support.compiled import needs, threads

pytestmark = [pytest.mark.processor, needs(batch_norm_cpu.reason())]

EPS, MOMENTUM = 1e-5, 0.1

# (N, C, H, W), groups: odd sizes, no multiple of a vector, one row per sample, several chunks of
# 2**17 elements with a ragged last one, fewer rows than a chunk has.
SHAPES = [
    ((6, 5, 3, 3), 2),
    ((4, 64, 9, 7), 1),
    ((8, 33, 4, 4), 4),
    ((64, 512, 1, 1), 2),
    ((2, 3, 211, 211), 1),
    ((4, 256, 31, 33), 2),
]


def channels_last(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Normal values of another mean and scale in each channel."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(shape[1], generator=generator).view(1, -1, 1, 1) * 3 + 0.1
    mean = torch.randn(shape[1], generator=generator).view(1, -1, 1, 1) * 4
    x = torch.randn(shape, generator=generator) * scale + mean
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def parameters(channels: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Weight, bias, running mean and running variance."""
    generator = torch.Generator().manual_seed(9)
    weight, bias, mean = (torch.randn(channels, generator=generator) for _ in range(3))
    return [t.to(dtype) for t in (weight, bias, mean, torch.rand(channels, generator=generator))]


def act(
    function: Callable[..., Tensor],
    x: Tensor,
    residual: Tensor | None,
    tensors: Sequence[Tensor],
    groups: int,
    *,
    relu: bool,
    training: bool = True,
) -> Tensor:
    """`function` with the tensors that `parameters` makes."""
    return function(x, residual, *tensors, training, MOMENTUM, EPS, groups, relu)


def apart(mine: Tensor, truth: Tensor) -> float:
    """Largest error relative to the largest value."""
    return float((mine.double() - truth).abs().max() / truth.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["plain", "relu", "residual"])
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_forward_backward_and_running_statistics(
    shape: tuple[int, ...], groups: int, form: str, dtype: torch.dtype
) -> None:
    def run(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        """Output, gradients of x, weight, bias and residual, and running statistics."""
        leaf = x.clone().requires_grad_()
        added = None if residual is None else residual.clone().requires_grad_()
        own = parameters(shape[1])
        gradients = [leaf, *(t.requires_grad_() for t in own[:2])]
        gradients += [] if added is None else [added]
        y = act(function, leaf, added, own, groups, relu=form != "plain")
        return y.detach(), *torch.autograd.grad(y, gradients, upstream), *own[2:]

    x, upstream = channels_last(shape, dtype, 0), channels_last(shape, dtype, 2)
    residual = channels_last(shape, dtype, 1) if form == "residual" else None
    assert supports(x, residual, parameters(shape[1]), groups)
    y, dx, *of_norm = run(batch_norm_act)

    leaf, own = x.double().requires_grad_(), parameters(shape[1], torch.float64)
    added = None if residual is None else residual.double().requires_grad_()
    gradients = [leaf, *(t.requires_grad_() for t in own[:2])]
    gradients += [] if added is None else [added]
    whole = act(reference.batch_norm_act, leaf, added, own, groups, relu=False)
    # Within rounding of zero the sign of the sum is not the float64 one: that of y counts.
    passed = torch.ones_like(whole) if form == "plain" else (y > 0).double()
    truth = torch.autograd.grad(whole, gradients, passed * upstream.double())
    aten = run(reference.batch_norm_act)

    rounding = 2e-5 if dtype == torch.float32 else 2**-8
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert apart(y, (whole if form == "plain" else whole.relu()).detach()) < rounding
    assert apart(dx, truth[0]) < rounding
    for mine, theirs, exact in zip(of_norm, aten[2:], [*truth[1:], *own[2:]], strict=True):
        # Sums that cancel: float32 limits ATen too, which must not be the better one.
        assert apart(mine, exact) <= max(apart(theirs, exact), 5e-6)


def test_variance_survives_a_large_mean() -> None:
    """float32 sums of squares would lose a variance of 1 beside a mean of 10,000 entirely."""
    x = channels_last((4, 16, 32, 32), torch.float32, 3) + 1e4
    own = [torch.ones(16), torch.zeros(16), *parameters(16)[2:]]
    out = act(batch_norm_act, x, None, own, 1, relu=False)
    x64 = x.double()
    truth = (x64 - x64.mean((0, 2, 3), keepdim=True)) / (
        x64.var((0, 2, 3), correction=0, keepdim=True) + EPS
    ).sqrt()
    # The output itself rounds x * scale + shift, whose terms are as large as the mean.
    assert float((out.double() - truth).abs().max()) < 2e-2


def test_constant_channel_gives_the_bias() -> None:
    x = torch.full((4, 8, 5, 5), 3.0).to(memory_format=torch.channels_last)
    bias = torch.linspace(-1, 1, 8)
    own = [torch.ones(8), bias, *parameters(8)[2:]]
    out = act(batch_norm_act, x, None, own, 2, relu=False)
    torch.testing.assert_close(out, bias.view(1, 8, 1, 1).expand_as(out), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_reaches_its_channel_and_no_other(dtype: torch.dtype) -> None:
    x = channels_last((4, 20, 5, 5), dtype, 4)
    x[1, 7, 2, 2] = torch.nan
    out = act(batch_norm_act, x, x, parameters(20), 1, relu=True)
    assert out[:, 7].isnan().all()
    others = [c for c in range(20) if c != 7]
    assert not out[:, others].isnan().any()


def test_nan_whose_bits_are_all_ones_does_not_round_to_a_number() -> None:
    x, own = channels_last((4, 20, 5, 5), torch.bfloat16, 4), parameters(20)
    own[0].view(torch.int32)[3] = 0x7FFFFFFF
    assert act(batch_norm_act, x, None, own, 1, relu=False)[:, 3].isnan().all()


def test_evaluation_uses_the_running_statistics_and_leaves_them() -> None:
    x, residual = channels_last((3, 40, 6, 6), torch.float32, 5), None
    mine, theirs = parameters(40), parameters(40)
    out = act(batch_norm_act, x, residual, mine, 1, relu=True, training=False)
    truth = act(reference.batch_norm_act, x, residual, theirs, 1, relu=True, training=False)
    torch.testing.assert_close(out, truth, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    def run(number: int) -> list[Tensor]:
        with threads(number):
            x = channels_last((8, 64, 40, 40), torch.bfloat16, 6).requires_grad_()
            moving = parameters(64)[2:]
            weight = torch.ones(64, requires_grad=True)
            y = act(batch_norm_act, x, x, [weight, weight, *moving], 2, relu=True)
            y.backward(channels_last((8, 64, 40, 40), torch.bfloat16, 7))
        assert x.grad is not None
        assert weight.grad is not None
        return [y, x.grad, weight.grad, *moving]

    assert all(torch.equal(a, b) for a, b in zip(run(1), run(3), strict=True))


def test_what_it_does_not_take() -> None:
    good, own = channels_last((4, 8, 5, 5), torch.float32, 8), parameters(8)
    assert supports(good, None, own, 1)
    assert not supports(good.contiguous(), None, own, 1)  # NCHW
    assert not supports(good.double(), None, own, 1)
    assert not supports(good, None, [t.bfloat16() for t in own], 1)
    assert not supports(good, None, [*own[:3], None], 1)
    assert not supports(good, good.bfloat16(), own, 1)
    assert not supports(good, good[:2], own, 1)
    single = good[:, :, :1, :1].contiguous()  # one value per group has no variance
    assert not supports(single, None, own, 4)
    assert supports(single, None, own, 2)
    with pytest.raises(ValueError, match="ReLU"):
        act(batch_norm_act, good, good, own, 1, relu=False)


def test_statistics_are_float32_whatever_the_default_dtype() -> None:
    x = channels_last((4, 8, 5, 5), torch.bfloat16, 8)
    want = act(batch_norm_act, x, None, parameters(8), 2, relu=True)
    own = parameters(8)
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = act(batch_norm_act, x, None, own, 2, relu=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, want)


@pytest.mark.parametrize("compiler", ["false", "/nowhere/g++"])
def test_without_a_compiler_there_is_a_reason_and_no_error(compiler: str) -> None:
    code = """if True:
        import torch
        from fastmoco.network.batchnorm import SplitBatchNorm2d
        from fastmoco_kernels.network import batch_norm_cpu
        x = torch.randn(4, 8, 3, 3).to(memory_format=torch.channels_last)
        out = SplitBatchNorm2d(8, 2).train()(x, residual=x, relu=True)
        assert out.shape == x.shape and float(out.min()) == 0.0
        print(batch_norm_cpu.reason())
    """
    environment = {"CXX": compiler, "PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert compiler in run.stdout
