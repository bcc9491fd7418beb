"""The momentum update of ResNet-50, and SGD with it, beside torch's and the published loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.races.race import WARMUP, Outputs, Race
from fastmoco.config import ModelConfig
from fastmoco.network.encoder import build_encoder
from fastmoco_kernels import ema_, reference, sgd_ema_

MOMENTUM = 0.999
SGD: dict[str, Any] = {"momentum": 0.9, "weight_decay": 1e-4}
LR = 0.03
CASE = {"model": "resnet50 mlp"}
CHECKED = 3
"""Tensors that are compared with the truth."""


def resnet50_shapes() -> list[torch.Size]:
    """Parameter shapes of the MoCo v2 encoder: ResNet-50 with a two-layer head."""
    with torch.device("meta"):
        return [p.shape for p in build_encoder(ModelConfig()).parameters()]


def _draw(shapes: Sequence[torch.Size], seed: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def published_ema(averages: list[Tensor], parameters: Sequence[Tensor]) -> None:
    """The published loop, which allocates every average anew."""
    for i, parameter in enumerate(parameters):
        averages[i] = averages[i] * MOMENTUM + parameter * (1.0 - MOMENTUM)


def ema_race(device: torch.device) -> Race:
    """The momentum update alone."""
    shapes = resnet50_shapes()
    sources = _draw(shapes, 1, device)

    @torch.compile
    def compiled(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(target * MOMENTUM + source * (1.0 - MOMENTUM))

    def way(update: Callable[[list[Tensor], list[Tensor]], object]) -> Callable[[], Outputs]:
        targets = _draw(shapes, 2, device)

        def call() -> Outputs:
            update(targets, sources)
            return targets[:CHECKED]

        return call

    ways = {
        "official": way(published_ema),
        "official compiled": way(compiled),
        "timm: foreach lerp": way(lambda t, s: torch._foreach_lerp_(t, s, 1 - MOMENTUM)),
        "fastmoco": way(lambda t, s: ema_(t, s, MOMENTUM)),
    }
    starts = zip(_draw(shapes[:CHECKED], 2, device), sources, strict=False)
    truth = [s + MOMENTUM**WARMUP * (t.double() - s) for t, s in starts]
    return Race("ema", CASE, ways, truth, 1e-5)


def sgd_ema_race(device: torch.device) -> Race:
    """SGD with momentum and weight decay, then the momentum update."""
    shapes = resnet50_shapes()
    grads = [0.01 * g for g in _draw(shapes, 1, device)]
    rates: dict[str, Any] = SGD | {"lr": torch.tensor(LR, device=device), "ema_momentum": MOMENTUM}

    def two_passes(update: Callable[[list[Tensor], list[Tensor]], object]) -> Callable[[], Outputs]:
        params, averages = _draw(shapes, 3, device), _draw(shapes, 4, device)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        sgd = torch.optim.SGD(params, LR, foreach=True, **SGD)

        def call() -> Outputs:
            sgd.step()
            update(averages, params)
            return params[:CHECKED] + averages[:CHECKED]

        return call

    params, averages = _draw(shapes, 3, device), _draw(shapes, 4, device)
    momenta = [torch.zeros_like(p) for p in params]

    def fused() -> Outputs:
        sgd_ema_(params, grads, momenta, averages, **rates)
        return params[:CHECKED] + averages[:CHECKED]

    few = [[t.double() for t in _draw(shapes[:CHECKED], seed, device)] for seed in (3, 4)]
    few_grads, few_momenta = [g.double() for g in grads[:CHECKED]], [p * 0 for p in few[0]]
    for _ in range(WARMUP):  # as often as a race runs a way before it looks at its output
        reference.sgd_ema_(few[0], few_grads, few_momenta, few[1], **rates)
    ways = {
        "official": two_passes(published_ema),
        "foreach SGD, ema_": two_passes(lambda averages, p: ema_(averages, p, MOMENTUM)),
        "fastmoco": fused,
    }
    return Race("sgd_ema", CASE, ways, few[0] + few[1], 1e-5)
