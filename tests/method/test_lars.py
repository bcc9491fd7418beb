"""LARS against the paper's rule in float64, timm's implementation, and inside the whole update."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from timm.optim.lars import Lars
from torch import Tensor, nn

from fastmoco.method.build import build_step
from fastmoco.method.optim.lars import LARS
from fastmoco.method.optim.update import build_ema, build_optimizer
from tests.support.gpu.fake_cuda import Watch
from tests.support.tiny import CONFIG, ONE, build_tiny, images

MOMENTUM, DECAY = 0.9, 1e-2
RATES = (0.5, 2.0, 1.0, 4.0)
LARS_CONFIG = replace(CONFIG, optim=replace(CONFIG.optim, name="lars", lr=2.0))


def start() -> list[nn.Parameter]:
    """A weight in channels-last, a matrix, one that is zero, a bias and a BN weight."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3, 5, 5), (7, 4), (3, 3), (7,), (4,)]
    params = [torch.randn(shape, generator=generator) for shape in shapes]
    params[0] = params[0].to(memory_format=torch.channels_last)
    params[2].zero_()
    order = [3, 0, 4, 1, 2]  # as in a model: not all weights first
    return [nn.Parameter(params[index]) for index in order]


def gradients(step: int, params: list[nn.Parameter]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    grads = [torch.randn(p.shape, generator=generator) for p in params]
    if step == 2:
        grads[3].zero_()  # a gradient of zero is not divided by
    return grads


def paper(params: list[nn.Parameter]) -> list[Tensor]:
    """Algorithm 1 in float64, with the rate outside the momentum; one scalar loop per tensor."""
    values = [p.detach().double().clone() for p in params]
    velocity = [torch.zeros_like(v) for v in values]
    for step, rate in enumerate(RATES):
        for w, v, g in zip(values, velocity, gradients(step, params), strict=True):
            g = g.double()
            if w.dim() > 1:
                w_norm, g_norm = float(w.square().sum()) ** 0.5, float(g.square().sum()) ** 0.5
                adapts = w_norm > 0 and g_norm > 0
                local = 0.001 * w_norm / (g_norm + DECAY * w_norm) if adapts else 1.0
                g = local * (g + DECAY * w)
            v.copy_(MOMENTUM * v + g)
            w.sub_(rate * v)
    return values


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
    for step, rate in enumerate(RATES):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for p, grad in zip(params, gradients(step, params), strict=True):
            p.grad = grad
        optimizer.step()


def test_updates_are_the_papers() -> None:
    params = start()
    run(LARS(params, lr=1.0, momentum=MOMENTUM, weight_decay=DECAY), params)
    for p, truth in zip(params, paper(start()), strict=True):
        torch.testing.assert_close(p.detach().double(), truth, rtol=1e-5, atol=1e-6)


def test_updates_are_timms() -> None:
    ours, theirs = start(), start()
    run(LARS(ours, lr=1.0, momentum=MOMENTUM, weight_decay=DECAY), ours)
    groups = [
        {"params": [p for p in theirs if p.dim() > 1]},
        {"params": [p for p in theirs if p.dim() <= 1], "weight_decay": 0.0},
    ]
    run(Lars(groups, lr=1.0, momentum=MOMENTUM, weight_decay=DECAY), theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_state_goes_through_a_checkpoint() -> None:
    """Two runs of which one is taken apart after each step end in the same bits."""
    whole, parts = start(), start()
    settings = {"lr": 1.0, "momentum": MOMENTUM, "weight_decay": DECAY}
    run(LARS(whole, **settings), whole)
    saved = LARS(parts, **settings).state_dict()
    for step, rate in enumerate(RATES):
        optimizer = LARS(parts, **settings)
        optimizer.load_state_dict(deepcopy(saved))
        optimizer.param_groups[0]["lr"] = rate
        for p, grad in zip(parts, gradients(step, parts), strict=True):
            p.grad = grad
        optimizer.step()
        saved = optimizer.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert set(saved["state"][0]) == {"momentum_buffer"}


def test_a_whole_step_moves_encoder_k_by_its_ema() -> None:
    moco = build_tiny(LARS_CONFIG, 4)
    before = [p.detach().clone() for p in moco.parameter_pairs()[1]]
    step = build_step(LARS_CONFIG, moco, ONE, compile_encoders=False)
    assert isinstance(step.optimizer, LARS)
    step([images(0)], 0)
    for k0, q1, k1 in zip(before, *moco.parameter_pairs(), strict=True):
        torch.testing.assert_close(k1.detach(), 0.9 * k0 + 0.1 * q1.detach(), rtol=1e-5, atol=1e-6)
    assert all(p.grad is None for p in moco.encoder_q.parameters())


def test_the_host_waits_for_nothing() -> None:
    moco = build_tiny(LARS_CONFIG, 4)
    optimizer = build_optimizer(LARS_CONFIG, moco)
    assert build_ema(LARS_CONFIG, moco, optimizer) is not None
    for p in moco.encoder_q.parameters():
        p.grad = torch.ones_like(p)
    with Watch() as watch:
        optimizer.step()
    assert watch.host_syncs == []
    assert watch.counts


def test_a_closure_is_refused() -> None:
    with pytest.raises(ValueError, match="no closure"):
        LARS(start(), lr=1.0, momentum=0.9, weight_decay=0.0).step(lambda: 0.0)
