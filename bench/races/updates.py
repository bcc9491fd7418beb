"""The momentum update and SGD with it, beside torch's and the published loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.measure.contest import Race, Way
from fastmoco_kernels import ema_, reference, sgd_ema_

MOMENTUM, SGD_MOMENTUM, WEIGHT_DECAY, LR = 0.999, 0.9, 1e-4, 0.03
RATES: dict[str, Any] = {
    **{"lr": torch.tensor(LR), "momentum": SGD_MOMENTUM, "weight_decay": WEIGHT_DECAY},
    "ema_momentum": MOMENTUM,
}


def resnet50_shapes() -> list[torch.Size]:
    """Parameter shapes of the MoCo v2 encoder: ResNet-50 with a two-layer head."""
    from torchvision.models import resnet50

    with torch.device("meta"):
        encoder = resnet50(num_classes=128)
        encoder.fc = torch.nn.Sequential(
            torch.nn.Linear(2048, 2048), torch.nn.ReLU(), torch.nn.Linear(2048, 128)
        )
    return [p.shape for p in encoder.parameters()]


def _draw(shapes: list[torch.Size], seed: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def ema_race(device: torch.device) -> Race:
    """The momentum update of ResNet-50."""
    shapes = resnet50_shapes()
    sources = _draw(shapes, 1, device)

    def official(targets: list[torch.nn.Parameter]) -> None:
        for source, target in zip(sources, targets, strict=True):
            target.data = target.data * MOMENTUM + source.data * (1.0 - MOMENTUM)

    @torch.compile
    def compiled(targets: list[Tensor]) -> None:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(target * MOMENTUM + source * (1.0 - MOMENTUM))

    def way(name: str, update: Callable[[Any], None], parameters: bool = False) -> Way:
        plain = _draw(shapes, 2, device)
        targets: list[Any] = (
            [torch.nn.Parameter(t, requires_grad=False) for t in plain] if parameters else plain
        )

        def run() -> list[Any]:
            with torch.no_grad():
                update(targets)
            return targets

        return Way(name, run, lambda out: error(out), 1e-5)

    def error(targets: list[Tensor], calls: int = 3) -> float:
        start = _draw(shapes[:3], 2, device)
        worst = 0.0
        for at, (t, s) in enumerate(zip(start, sources, strict=False)):
            want = s.double() + MOMENTUM**calls * (t.double() - s.double())
            worst = max(worst, float((targets[at].double() - want).abs().max()))
        return worst

    ways = [
        way("official", official, parameters=True),
        way("official compiled", compiled),
        way("timm: foreach lerp", lambda t: torch._foreach_lerp_(t, sources, 1 - MOMENTUM)),
        way("fastmoco", lambda t: ema_(t, sources, MOMENTUM)),
    ]
    return "ema", {"model": "resnet50 mlp", "device": device.type}, ways


def sgd_ema_race(device: torch.device) -> Race:
    """SGD with momentum and weight decay, then the momentum update, of ResNet-50."""
    shapes = resnet50_shapes()
    grads = [0.01 * g for g in _draw(shapes, 1, device)]
    few = [[t.double() for t in _draw(shapes[:3], seed, device)] for seed in (3, 4)]
    momenta = [torch.zeros_like(t) for t in few[0]]
    for _ in range(3):  # as often as a race runs a way before it looks at its output
        reference.sgd_ema_(few[0], [g.double() for g in grads[:3]], momenta, few[1], **RATES)
    want = few[0] + few[1]

    def stepper(official: bool) -> Callable[[], list[Tensor]]:
        params, ema = _draw(shapes, 3, device), _draw(shapes, 4, device)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        sgd = torch.optim.SGD(params, LR, SGD_MOMENTUM, weight_decay=WEIGHT_DECAY, foreach=True)

        def run() -> list[Tensor]:
            sgd.step()
            if official:
                for i, p in enumerate(params):
                    ema[i] = ema[i] * MOMENTUM + p * (1.0 - MOMENTUM)
            else:
                ema_(ema, params, MOMENTUM)
            return params[:3] + ema[:3]

        return run

    params, ema = _draw(shapes, 3, device), _draw(shapes, 4, device)
    buffers = [torch.zeros_like(p) for p in params]
    rates = RATES | {"lr": torch.tensor(LR, device=device)}

    def fused() -> list[Tensor]:
        sgd_ema_(params, grads, buffers, ema, **rates)
        return params[:3] + ema[:3]

    def error(got: list[Tensor]) -> float:
        return max(float((g.double() - w).abs().max()) for g, w in zip(got, want, strict=True))

    ways = [
        Way("official", stepper(True), error, 1e-5),
        Way("foreach SGD, ema_", stepper(False), error, 1e-5),
        Way("fastmoco", fused, error, 1e-5),
    ]
    return "sgd_ema", {"model": "resnet50 mlp", "device": device.type}, ways
