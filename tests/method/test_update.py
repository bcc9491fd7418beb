"""Schedules against hand-computed values, the fused update against torch, apex refused."""

from __future__ import annotations

import sys
import types
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from fastmoco.config import Config, ConfigError, MocoConfig, ModelConfig, OptimConfig
from fastmoco.method.moco import MoCo
from fastmoco.method.optim.lars import LARS
from fastmoco.method.optim.update import build_ema, build_optimizer, lr_at, require_sgd
from tests.support.gpu.fake_cuda import Watch

V2 = Config(optim=OptimConfig(epochs=200, lr=0.03, schedule="cosine"))
V1 = Config(optim=OptimConfig(epochs=200, lr=0.03, schedule="step", milestones=(120, 160)))


def test_cosine_schedule() -> None:
    assert lr_at(V2, 0) == pytest.approx(0.03)
    assert lr_at(V2, 100) == pytest.approx(0.015)
    assert lr_at(V2, 50) == pytest.approx(0.03 * 0.8535533905932737)  # (1 + cos(pi/4)) / 2
    assert lr_at(V2, 199) == pytest.approx(1.850513e-6, rel=1e-5)


@pytest.mark.parametrize(
    ("epoch", "lr"), [(0, 0.03), (119, 0.03), (120, 0.003), (159, 0.003), (160, 3e-4), (199, 3e-4)]
)
def test_step_schedule(epoch: int, lr: float) -> None:
    assert lr_at(V1, epoch) == pytest.approx(lr)


def test_warmup_rises_at_every_step_and_the_cosine_starts_after_it() -> None:
    warm = replace(V2, optim=replace(V2.optim, epochs=110, warmup_epochs=10))
    assert [lr_at(warm, epoch) for epoch in (0, 2.5, 9.75)] == pytest.approx([0.0, 0.0075, 0.02925])
    assert lr_at(warm, 10) == pytest.approx(0.03)
    assert lr_at(warm, 60) == lr_at(warm, 60.999) == pytest.approx(0.015)  # half of 100 epochs
    assert lr_at(warm, 109.9) == pytest.approx(0.03 * (1 - 0.9995065603657316) / 2)  # cos(pi/100)
    steps = replace(V1, optim=replace(V1.optim, warmup_epochs=10))
    assert lr_at(steps, 5) == pytest.approx(0.015)
    assert [lr_at(steps, e) for e in (10, 119.99, 120)] == pytest.approx([0.03, 0.03, 0.003])


def test_without_warmup_the_rate_is_constant_within_an_epoch() -> None:
    for number in range(7 * 3):
        assert lr_at(V2, number / 7) == lr_at(V2, number // 7)


def test_linear_scaling_is_opt_in() -> None:
    big = replace(V2, optim=replace(V2.optim, global_batch_size=1024))
    assert lr_at(big, 0) == pytest.approx(0.03)
    scaled = replace(big, optim=replace(big.optim, lr_scaling="linear"))
    assert lr_at(scaled, 0) == pytest.approx(0.12)  # IG-1B of the paper: batch 1024 at 0.12


def moco() -> MoCo:
    torch.manual_seed(0)
    small = Config(model=ModelConfig(arch="resnet18", dim=8), moco=MocoConfig(queue_size=32))
    return MoCo(small, 0)


def train(name: str, steps: int) -> MoCo:
    """A few updates with gradients that depend on the step only."""
    config = Config(
        optim=OptimConfig(name=name, lr=0.1, weight_decay=1e-2),  # type: ignore[arg-type]
        moco=MocoConfig(momentum=0.9),
    )
    model = moco()
    optimizer = build_optimizer(config, model)
    ema = build_ema(config, model, optimizer)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for p in model.encoder_q.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        if ema is not None:
            ema()
    return model


def test_one_pass_update_equals_sgd_followed_by_ema() -> None:
    fused, separate = train("sgd_ema", 3), train("sgd", 3)
    for a, b in zip(fused.state_dict().values(), separate.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_encoder_k_moves_towards_the_updated_encoder_q() -> None:
    before, after = moco(), train("sgd_ema", 1)
    for k0, q1, k1 in zip(
        before.encoder_k.parameters(),
        after.encoder_q.parameters(),
        after.encoder_k.parameters(),
        strict=True,
    ):
        torch.testing.assert_close(k1, 0.9 * k0 + 0.1 * q1.detach(), rtol=1e-5, atol=1e-6)


def test_a_step_that_the_scaler_skips_moves_encoder_k_alone_and_nobody_waits() -> None:
    model = moco()
    with torch.no_grad():
        for q in model.encoder_q.parameters():
            q.add_(1.0)
    config = replace(V2, moco=MocoConfig(momentum=0.9))
    optimizer, scaler = build_optimizer(config, model), torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    want = deepcopy(model)
    sgd = torch.optim.SGD(want.encoder_q.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4)
    for number, overflow in enumerate((True, False, True, False)):
        generator = torch.Generator().manual_seed(number)
        scale = scaler.get_scale()
        for p, exact in zip(model.encoder_q.parameters(), want.encoder_q.parameters(), strict=True):
            exact.grad = torch.randn(p.shape, generator=generator)
            p.grad = exact.grad * scale
        if overflow:
            assert p.grad is not None
            p.grad[0] = torch.inf
        else:
            sgd.step()
        with torch.no_grad():
            for theta_q, theta_k in zip(*want.parameter_pairs(), strict=True):
                theta_k.lerp_(theta_q, 0.1)
        with Watch() as watch:
            scaler.step(optimizer)
            scaler.update()
        assert watch.host_syncs == []
        assert scaler.get_scale() == (scale / 2 if overflow else scale)
    for a, b in zip(model.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_missing_gradient_is_an_error() -> None:
    model = moco()
    optimizer = build_optimizer(Config(), model)
    with pytest.raises(ValueError, match="64 of 64 parameters lack a gradient"):
        optimizer.step()


def test_apex_from_pypi_is_not_nvidia_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(optim=OptimConfig(name="apex_sgd"))
    with pytest.raises(ConfigError, match="package called apex on PyPI"):
        build_optimizer(config, moco())
    impostor, optimizers = types.ModuleType("apex"), types.ModuleType("apex.optimizers")
    monkeypatch.setitem(sys.modules, "apex", impostor)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    monkeypatch.setitem(sys.modules, "amp_C", types.ModuleType("amp_C"))
    with pytest.raises(ConfigError, match="FusedSGD"):
        build_optimizer(config, moco())
    optimizers.__dict__["FusedSGD"] = torch.optim.SGD
    with pytest.raises(ConfigError, match="runs on CUDA only"):
        build_optimizer(config, moco())


def nesterov(params: list[torch.Tensor], **options: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, nesterov=True, **options)  # type: ignore[arg-type]


def test_an_sgd_that_differs_from_torchs_is_refused() -> None:
    cpu = torch.device("cpu")
    require_sgd(torch.optim.SGD, cpu)
    with pytest.raises(ConfigError, match="differs by"):
        require_sgd(nesterov, cpu)
    with pytest.raises(ConfigError, match="differs by"):
        require_sgd(LARS, cpu)
