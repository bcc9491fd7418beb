"""Split BN against `torch.nn.BatchNorm2d` run on each group by itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models import resnet18

from fastmoco.config import ModelConfig
from fastmoco.network.batchnorm import SplitBatchNorm2d, supports_cuda
from fastmoco.network.encoder import build_encoder
from fastmoco_kernels import launch

pytestmark = pytest.mark.processor
GROUP = 4


def both_formulations(run: Callable[[], None]) -> None:
    """What eager mode runs, then what the compiler sees."""
    run()
    with mock.patch("torch.compiler.is_compiling", return_value=True):
        run()


def layer(channels: int = 5) -> SplitBatchNorm2d:
    torch.manual_seed(0)
    norm = SplitBatchNorm2d(channels, GROUP).double()
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            assert tensor is not None
            tensor.normal_()
    return norm.train()


def plain_layer(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    plain = nn.BatchNorm2d(norm.num_features).double()
    plain.load_state_dict(norm.state_dict())
    return plain


def close(mine: Tensor | None, truth: Tensor | None, tolerance: float = 1e-11) -> None:
    assert mine is not None
    assert truth is not None
    mine, truth = mine.detach(), truth.detach()
    assert float((mine - truth).abs().max()) <= tolerance * (1 + float(truth.abs().max()))


def test_layer_is_plain_bn_per_group_forward_and_backward() -> None:
    x = torch.randn(3 * GROUP, 5, 3, 2, dtype=torch.float64) * 3 + 2
    upstream = torch.randn_like(x)

    def check() -> None:
        norm = layer()
        mine = x.clone().requires_grad_()
        out = norm(mine)
        out.backward(upstream)
        theirs = x.clone().requires_grad_()
        twins = [plain_layer(layer()) for _ in range(3)]
        parts = [t(part) for t, part in zip(twins, theirs.split(GROUP), strict=True)]
        torch.cat(parts).backward(upstream)
        close(out, torch.cat(parts))
        close(mine.grad, theirs.grad)
        for name in ("weight", "bias"):
            shares = [getattr(twin, name).grad for twin in twins]
            close(getattr(norm, name).grad, torch.stack(shares).sum(0))
        for name in ("running_mean", "running_var"):
            moved = [getattr(twin, name) for twin in twins]
            close(getattr(norm, name), torch.stack(moved).mean(0))
        assert int(norm.num_batches_tracked or 0) == 1

    both_formulations(check)


def on_cuda() -> ExitStack:
    """The kernels that the compiled step takes on CUDA, here by their reference."""
    stack = ExitStack()
    for name in ("torch.compiler.is_compiling", "fastmoco.network.batchnorm.supports_cuda"):
        stack.enter_context(mock.patch(name, return_value=True))
    return stack


@pytest.mark.parametrize("group", [0, GROUP])
def test_kernels_of_cuda_compute_the_same_layer(group: int) -> None:
    torch.manual_seed(0)
    x, residual, upstream = torch.randn(3, 3 * GROUP, 5, 3, 2).mul(3).add(2).unbind()

    def run(norm: SplitBatchNorm2d) -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
        out = norm(leaves[0], residual=leaves[1], relu=True)
        gradients = torch.autograd.grad(out, [*leaves, norm.weight, norm.bias], upstream)
        return [out.detach(), *gradients, *norm.buffers()]

    plain, ours = layer().float(), layer().float()
    plain.group_size = ours.group_size = group
    truth = run(plain)
    with on_cuda():
        found = run(ours)
    for mine, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_in_evaluation_the_kernels_of_cuda_are_not_asked() -> None:
    norm, x = layer().float().eval(), torch.randn(4, 5, 3, 2)
    with on_cuda(), torch.no_grad():
        close(norm(x), plain_layer(norm).float().eval()(x), 1e-5)
    assert int(norm.num_batches_tracked or 0) == 0


@pytest.mark.parametrize("replaced", [False, True])
def test_the_kernels_take_what_they_support(replaced: bool) -> None:
    norm = SplitBatchNorm2d(8, GROUP)
    per_channel = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    reasons = {"batch_norm": "wrong"} if replaced else {}
    with mock.patch.object(launch, "replaced", return_value=reasons), FakeTensorMode():
        x = torch.empty(2**21, 8, 1, 1, device="cuda", dtype=torch.bfloat16)
        assert supports_cuda(x, per_channel, 2) is not replaced
        assert not supports_cuda(x[1:], per_channel, 1)
        assert not supports_cuda(x.cpu(), per_channel, 2)
        assert not supports_cuda(x.double(), per_channel, 2)
        assert not supports_cuda(x, (*per_channel[:3], None), 2)
        assert not supports_cuda(x, per_channel, len(x))  # no variance of one value


def test_evaluation_splits_nothing() -> None:
    norm = layer().eval()
    x = torch.randn(7, 5, 2, 2, dtype=torch.float64)  # not even a multiple of the group
    close(norm(x), plain_layer(norm).eval()(x))


def test_one_group_is_plain_bn_to_the_bit() -> None:
    norm, x = layer(), torch.randn(GROUP, 5, 3, 3, dtype=torch.float64)
    plain = plain_layer(norm)
    assert torch.equal(norm(x), plain(x))
    assert norm.running_var is not None
    assert plain.running_var is not None
    assert torch.equal(norm.running_var, plain.running_var)


def test_ragged_batch_is_refused_with_its_shape() -> None:
    with pytest.raises(ValueError, match=r"\(6, 5, 2, 2\).* 4"):
        layer()(torch.randn(6, 5, 2, 2, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_keeps_channels_last_and_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(3 * GROUP, 8, 6, 5).to(dtype).to(memory_format=torch.channels_last)

    def check() -> None:
        out = SplitBatchNorm2d(8, GROUP).train()(x)
        assert out.dtype == dtype
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert not out.is_contiguous()

    both_formulations(check)


def test_half_precision_input_is_normalized_in_float32() -> None:
    x = (torch.randn(2 * GROUP, 4, 16, 16) * 0.1 + 50).to(torch.bfloat16)
    truth = torch.cat([nn.BatchNorm2d(4).double()(p) for p in x.double().split(GROUP)])

    def check() -> None:
        out = SplitBatchNorm2d(4, GROUP).train()(x)
        # Statistics in bf16 would lose the variance beside a mean of 50 altogether.
        assert float((out.double() - truth).abs().max()) < 0.02 * float(truth.abs().max())

    both_formulations(check)


def test_whole_resnet18_equals_plain_bn_by_group() -> None:
    torch.manual_seed(1)
    config = ModelConfig(arch="resnet18", stem="cifar", head="linear", dim=8)
    encoder = build_encoder(config, GROUP).double().train()
    x = torch.randn(3 * GROUP, 3, 16, 16, dtype=torch.float64)
    upstream = torch.randn(3 * GROUP, 8, dtype=torch.float64)
    twins = [resnet18(num_classes=8).double().train() for _ in range(3)]
    for twin in twins:
        twin.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False).double()
        twin.maxpool = nn.Identity()
        twin.load_state_dict(encoder.state_dict())
    truth = torch.cat([twin(part) for twin, part in zip(twins, x.split(GROUP), strict=True)])
    truth.backward(upstream)

    def check() -> None:
        mine = copy.deepcopy(encoder)
        out = mine(x)
        out.backward(upstream)
        close(out, truth, 1e-9)
        for name, parameter in mine.named_parameters():
            grads = [twin.get_parameter(name).grad for twin in twins]
            close(parameter.grad, torch.stack([g for g in grads if g is not None]).sum(0), 1e-8)
        for name, buffer in mine.named_buffers():
            if buffer.is_floating_point():
                moved = [twin.get_buffer(name) for twin in twins]
                close(buffer, torch.stack(moved).mean(0), 1e-10)

    both_formulations(check)


def test_residual_without_relu_is_added_and_nothing_else() -> None:
    x = torch.randn(GROUP, 8, 4, 4).to(memory_format=torch.channels_last)
    norm = SplitBatchNorm2d(8, 0).train()
    torch.testing.assert_close(norm(x, residual=x), nn.BatchNorm2d(8).train()(x) + x)
