"""The public functions on the CPU: values, gradients, ring arithmetic, errors, tracing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastmoco_kernels import ema_, enqueue_, info_nce, info_nce_enqueue, sgd_ema_
from tests.kernels.oracle import features, official_info_nce


def test_loss_and_gradient_match_the_official_formulation() -> None:
    q, k, queue = features(7, 24, 91)
    losses, dq = official_info_nce(q, k, queue, 0.07)
    q.requires_grad_(True)
    out = info_nce(q, k, queue, 0.07)
    (out.loss * 3).backward()
    torch.testing.assert_close(out.losses.double(), losses, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.loss.double(), losses.mean(), rtol=1e-6, atol=1e-6)
    assert q.grad is not None
    torch.testing.assert_close(q.grad.double(), 3 * dq, rtol=1e-5, atol=1e-6)
    assert not out.losses.requires_grad


def test_enqueue_comes_after_the_loss_and_wraps() -> None:
    q, k, queue = features(4, 16, 10)
    keys = features(6, 16, 1, seed=5)[0]
    ptr = torch.tensor([7])
    before = queue.clone()
    out = info_nce_enqueue(q, k, keys, queue, ptr, 0.2)
    torch.testing.assert_close(out.losses, info_nce(q, k, before, 0.2).losses, rtol=0, atol=0)
    expected = before.clone()
    for i in range(6):
        expected[(7 + i) % 10] = keys[i]
    assert torch.equal(queue, expected)
    assert ptr.tolist() == [3]


def test_a_collapsed_encoder_scores_nothing() -> None:
    q = features(5, 48, 1)[0][:1].expand(5, 48)
    assert info_nce(q, q, q[:1].repeat(33, 1), 0.2).rank.tolist() == [33] * 5


@pytest.mark.parametrize(
    "call",
    [
        lambda q, k, u: info_nce(q, k[:, :3], u, 0.2),
        lambda q, k, u: info_nce(q, k, u[:, :3], 0.2),
        lambda q, k, u: info_nce(q, k, u, 0.0),
        lambda q, k, u: info_nce(q, k, u, float("nan")),
        lambda q, k, u: info_nce(q.double(), k, u, 0.2),
        lambda q, k, u: info_nce(q, k, u.T.contiguous().T, 0.2),
        lambda q, k, u: enqueue_(u.repeat(2, 1), u, torch.tensor([0])),
        lambda q, k, u: enqueue_(q, u, torch.tensor(0)),
        lambda q, k, u: ema_([q], [u], 0.9),
        lambda q, k, u: ema_([q], [q, q], 0.9),
    ],
)
def test_bad_input_is_refused_with_shapes(
    call: Callable[[Tensor, Tensor, Tensor], object],
) -> None:
    q, k, queue = features(4, 16, 10)
    with pytest.raises(ValueError, match=r"\(\d+, \d+\)|\d+ targets"):
        call(q, k, queue)


def test_sgd_ema_is_sgd_then_ema() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (7,), (2, 3, 4, 4)]
    start = [torch.randn(s, generator=generator) for s in shapes]
    reference = [torch.nn.Parameter(p.double()) for p in start]
    keys64 = [p.double() * 0.5 for p in start]
    params = [torch.nn.Parameter(p.clone()) for p in start]
    buffers = [torch.zeros_like(p) for p in start]
    keys = [p * 0.5 for p in start]
    sgd = torch.optim.SGD(reference, lr=0.1, momentum=0.9, weight_decay=1e-2)
    for step in range(3):
        grads = [torch.randn(s, generator=generator) for s in shapes]
        for p, g in zip(reference, grads, strict=True):
            p.grad = g.double()
        sgd.param_groups[0]["lr"] = 0.1 / (1 + step)
        sgd.step()
        keys64 = [0.99 * a + 0.01 * b.detach() for a, b in zip(keys64, reference, strict=True)]
        sgd_ema_(
            list(params),
            grads,
            buffers,
            keys,
            lr=0.1 / (1 + step),
            momentum=0.9,
            weight_decay=1e-2,
            ema_momentum=0.99,
        )
    for got, want in zip([*params, *keys], [*reference, *keys64], strict=True):
        torch.testing.assert_close(got.detach().double(), want.detach(), rtol=2e-6, atol=1e-6)


def test_one_graph_of_loss_and_updates() -> None:
    q, k, queue = features(4, 16, 10)
    ptr = torch.tensor([8])
    weight = torch.nn.Parameter(torch.eye(16))
    shadow, buffer = torch.eye(16), torch.zeros(16, 16)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(weight: Tensor) -> Tensor:
        return info_nce_enqueue(q @ weight, k, k, queue, ptr, 0.2).loss

    @torch.compile(fullgraph=True, backend="aot_eager")
    def update(grad: Tensor, lr: Tensor) -> None:
        sgd_ema_(
            [weight],
            [grad],
            [buffer],
            [shadow],
            lr=lr,
            momentum=0.9,
            weight_decay=0.0,
            ema_momentum=0.9,
        )

    want, dq = official_info_nce(q, k, queue, 0.2)
    loss = step(weight)
    loss.backward()
    assert weight.grad is not None
    torch.testing.assert_close(loss.detach().double(), want.mean(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(weight.grad.double(), q.double().T @ dq, rtol=1e-5, atol=1e-6)
    assert ptr.item() == 2
    update(weight.grad, torch.tensor(0.5))
    torch.testing.assert_close(weight.detach(), torch.eye(16) - 0.5 * weight.grad)
