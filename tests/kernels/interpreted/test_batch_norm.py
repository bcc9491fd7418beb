"""The Triton batch norm kernels, interpreted on the CPU, against the definition in float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastmoco_kernels.network.batch_norm_launch import (
    Configuration,
    backward_plan,
    normalize_plan,
    shape_of,
    statistics_plan,
)
from tests.kernels.interpreter import watched

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NHWC = torch.channels_last
EPS, MOMENTUM = 1e-5, 0.1
# A rounding of the output, and of float32 sums.
ROUNDING = {F32: 2e-6, F16: 2.0**-10, BF16: 2.0**-7}
SUMS = 1e-5

# (N, C, H, W), groups, pieces and tiles or the chosen ones: see `test_every_form`.
SMALL = Configuration(block_r=16, block_c=16, reduced_rows=48, pieces=0, mapped_rows=32)
SHAPES = [
    ((6, 5, 3, 3), 2, None),
    ((4, 64, 9, 7), 1, None),
    ((5, 33, 5, 4), 5, None),  # every sample a group
    ((4, 24, 9, 7), 2, SMALL),  # 126 rows: three pieces, the last ragged, up to three tiles in each
    ((16, 80, 1, 1), 2, None),
]


class Case(NamedTuple):
    x: Tensor
    residual: Tensor | None
    dy: Tensor
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    counter: Tensor
    groups: int
    relu: bool


class Found(NamedTuple):
    y: Tensor
    dx: Tensor
    d_residual: Tensor
    grad_weight: Tensor
    grad_bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    counter: Tensor


def draw(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype, form: str, offset: float = 0.0
) -> Case:
    """Values of another mean and scale in each channel; the weight has both signs."""
    generator = torch.Generator().manual_seed(0)
    c = shape[1]

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    def images(scale: Tensor, mean: Tensor) -> Tensor:
        values = normal(*shape) * scale.view(-1, 1, 1) + mean.view(-1, 1, 1)
        return values.to(dtype).contiguous(memory_format=NHWC)

    x = images(normal(c).abs() * 2 + 0.2, normal(c) * 3 + offset)
    residual = images(torch.ones(c), torch.zeros(c)) if "residual" in form else None
    dy = images(torch.ones(c), normal(c))
    per_channel = (normal(c), normal(c), normal(c), normal(c).abs())
    return Case(x, residual, dy, *per_channel, torch.tensor(7), groups, "relu" in form)


def kernels(case: Case, tiles: Configuration | None = None) -> Found:
    x, relu = case.x, case.relu
    if tiles is not None:
        rows = x.numel() // (x.shape[1] * case.groups)
        tiles = tiles._replace(pieces=-(-rows // tiles.reduced_rows))
    shape = shape_of(x, case.groups, tiles)
    running = [t.clone() for t in (case.running_mean, case.running_var, case.counter)]
    launches, mean, var = statistics_plan(x, running[0], running[1], running[2], MOMENTUM, shape)
    for each in launches:
        each.run()
    affine = {"weight": case.weight, "bias": case.bias, "mean": mean, "var": var}
    work, y = normalize_plan(x, case.residual, affine, EPS, relu, shape)
    work.run()
    read = y if relu and case.residual is not None else None
    plan = backward_plan(case.dy, x, read, affine, EPS, relu, shape)
    for each in plan.launches:
        each.run()
    return Found(y, plan.dx, plan.g, plan.grad_weight, plan.grad_bias, *running)


def oracle(case: Case, y: Tensor) -> Found:
    """By autograd in float64 from the definition; `y` says where the ReLU let through."""
    x, weight, bias = (t.double().requires_grad_() for t in (case.x, case.weight, case.bias))
    n, c, h, w = x.shape
    grouped = x.reshape(case.groups, n // case.groups, c, h, w)
    mean = grouped.mean((1, 3, 4), keepdim=True)
    var = grouped.var((1, 3, 4), correction=0, keepdim=True)
    normal = (grouped - mean) / (var + EPS).sqrt()
    z = normal.reshape(x.shape) * weight[:, None, None] + bias[:, None, None]
    if case.residual is not None:
        z = z + case.residual.double()
    # Within rounding of zero the sign of the sum is not the float64 one: that of y counts.
    g = case.dy.double() * (y > 0) if case.relu else case.dy.double()
    dx, grad_weight, grad_bias = torch.autograd.grad(z, (x, weight, bias), g)
    unbiased = grouped.var((1, 3, 4), correction=1)
    running_mean = 0.9 * case.running_mean.double() + 0.1 * mean.mean(0).flatten()
    running_var = 0.9 * case.running_var.double() + 0.1 * unbiased.mean(0)
    z = z.relu() if case.relu else z
    found = (z, dx, g, grad_weight, grad_bias, running_mean, running_var, case.counter + 1)
    return Found._make(t.detach() for t in found)


def apart(mine: Tensor, truth: Tensor) -> float:
    """Largest error relative to the largest value."""
    return float((mine.double() - truth).abs().max() / truth.abs().max())


def compare(case: Case, found: Found) -> None:
    truth = oracle(case, found.y)
    for name in ("y", "dx"):
        mine = getattr(found, name)
        assert mine.dtype == case.x.dtype
        assert mine.is_contiguous(memory_format=NHWC)
        assert apart(mine, getattr(truth, name)) < ROUNDING[case.x.dtype], name
    if case.residual is not None:
        assert torch.equal(found.d_residual.double(), truth.d_residual)
    for name in ("grad_weight", "grad_bias", "running_mean", "running_var"):
        assert apart(getattr(found, name), getattr(truth, name)) < SUMS, name
    assert int(found.counter) == 8


@pytest.mark.parametrize("form", ["plain", "relu", "residual", "residual relu"])
@pytest.mark.parametrize(("shape", "groups", "tiles"), SHAPES)
def test_every_form(
    shape: tuple[int, ...], groups: int, tiles: Configuration | None, form: str
) -> None:
    case = draw(shape, groups, F32, form)
    compare(case, kernels(case, tiles))


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("form", ["relu", "residual relu"])
def test_low_precision_is_rounded_once_and_summed_in_float32(dtype: torch.dtype, form: str) -> None:
    case = draw((4, 24, 9, 7), 2, dtype, form)
    compare(case, kernels(case, SMALL))


def test_variance_survives_a_large_mean() -> None:
    """float32 sums of squares would lose a variance of 1 beside a mean of 10,000 entirely."""
    case = draw((2, 16, 8, 16), 2, F32, "relu", offset=1e4)
    found = kernels(case, SMALL)
    truth = oracle(case, found.y)
    # The mean itself is a float32: a unit of its last place, in the smallest standard deviation.
    unit = 2.0**-10 / float(case.x.double().var((2, 3)).min().sqrt())
    for name in ("y", "dx", "grad_weight", "grad_bias"):
        assert apart(getattr(found, name), getattr(truth, name)) < unit, name
    assert apart(found.running_mean, truth.running_mean) < 2.0**-23
    assert apart(found.running_var, truth.running_var) < SUMS


def test_variance_survives_an_outlier_in_the_first_row() -> None:
    """Distances from the first row alone would lose the variance of all the others."""
    case = draw((2, 16, 16, 16), 1, F32, "plain")
    case.x[0, :, 0, 0] = 3e4
    found, truth = kernels(case, SMALL), kernels(case)
    exact = case.running_var.double() * 0.9 + 0.1 * case.x.double().var((0, 2, 3))
    assert apart(found.running_var, exact) < 1e-6
    assert apart(truth.running_var, exact) < 1e-6


def test_many_channels_with_a_tail() -> None:
    case = draw((4, 264, 2, 1), 1, F32, "residual relu")
    compare(case, kernels(case))


def test_many_groups_are_merged_in_turns() -> None:
    case = draw((66, 8, 4, 2), 66, F32, "relu")
    compare(case, kernels(case))


def test_many_pieces_are_merged_in_turns() -> None:
    """265 of 16 rows, the last of 8; a program merges 256 at once."""
    case = draw((2, 8, 46, 46), 1, F32, "relu")
    tiles = Configuration(block_r=16, block_c=16, reduced_rows=16, pieces=0, mapped_rows=512)
    compare(case, kernels(case, tiles))


@pytest.mark.parametrize("form", ["relu", "residual relu"])
def test_no_program_leaves_its_tensors_or_writes_what_another_does(form: str) -> None:
    case = draw((4, 40, 5, 5), 2, BF16, form)
    with watched() as watch:
        kernels(case, SMALL)
    # Three blocks of columns, two groups, two pieces of 50 rows; partial results in five blocks.
    assert len(watch.programs) == 3 * 2 * 2 + 2


def test_two_runs_give_the_same_bits() -> None:
    case = draw((4, 16, 7, 7), 2, F32, "residual relu")
    first, again = kernels(case, SMALL), kernels(case, SMALL)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_nan_reaches_its_channel_and_group_and_no_other() -> None:
    case = draw((4, 16, 3, 3), 2, F32, "relu")
    case.x[0, 3, 1, 1] = float("nan")
    found = kernels(case)
    bad = torch.zeros(4, 16, dtype=torch.bool)
    bad[:2, 3] = True
    for t in (found.y, found.dx):
        assert torch.equal(t.isnan().any(-1).any(-1), bad)
        assert torch.equal(t.isnan().all(-1).all(-1), bad)
    for t in (found.grad_weight, found.running_mean, found.running_var):
        assert torch.equal(t.isnan(), bad.any(0))
