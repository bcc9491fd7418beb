"""Op by op: the fused ops beside the official formulation, torch.compile of it and other libraries.

    python -m bench.kernels [--device cuda] [--only ema] [--rounds 20] [--threads 2] [--save]
                            [--profile DIR]

Prints a table per case; --save appends rows to bench/results/kernels.jsonl and is refused for a
dirty tree. `official` is what the published MoCo code does: einsum, cat, division, cross entropy on
a clone of the queue, backward; a loop over parameters that allocates each new one; torch.optim.SGD.
It takes no top-5, which the official step does and the fused op includes. The layers of the
encoder are in `bench.layers`. N local batch, C dimension, K queue length.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from bench import terminal
from bench.case import origin
from bench.harness import RESULTS, Contender, Race, append_rows, race, table
from bench.layers import batch_norm_race, cpu_races
from fastmoco_kernels import ema_, info_nce, info_nce_enqueue, sgd_ema_

MOMENTUM, SGD_MOMENTUM, WEIGHT_DECAY, LR = 0.999, 0.9, 1e-4, 0.03


def official_loss(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """The loss of the published code on a clone of the queue (K, C), which it stores transposed."""
    positive = torch.einsum("nc,nc->n", [q, k]).unsqueeze(-1)
    negative = torch.einsum("nc,kc->nk", [q, queue.clone().detach()])
    logits = torch.cat([positive, negative], dim=1) / temperature
    return cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


def _oracle(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> tuple[float, Tensor]:
    """Loss and gradient in float64, a few rows at a time."""
    losses, gradients = [], []
    for a, b in zip(q.split(16), k.split(16), strict=True):
        rows = a.double().requires_grad_(True)
        loss = official_loss(rows, b.double(), queue.double(), temperature) * len(a) / len(q)
        gradients.append(torch.autograd.grad(loss, rows)[0])
        losses.append(loss.item())
    return sum(losses), torch.cat(gradients)


def loss_race(n: int, c: int, k: int, dtype: torch.dtype, device: torch.device) -> Race:
    """Forward and backward of the loss, T = 0.2; the queue is float32, as the trainer keeps it."""
    generator = torch.Generator().manual_seed(0)
    q, key, queue = (
        normalize(torch.randn(rows, c, generator=generator), dim=1).to(device) for rows in (n, n, k)
    )
    q, key = q.to(dtype), normalize(q + 0.7 * key, dim=1).to(dtype)
    loss, gradient = _oracle(q, key, queue, 0.2)

    def step(function: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
        def run() -> tuple[Tensor, Tensor]:
            leaf = q.detach().requires_grad_(True)
            value = function(leaf, key, queue.to(dtype) if function is not fused else queue, 0.2)
            return value.detach(), torch.autograd.grad(value, leaf)[0]

        return run

    def fused(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
        return info_nce(q, k, queue, temperature).loss

    def error(output: tuple[Tensor, Tensor]) -> float:
        far = (output[1].double() - gradient).norm() / gradient.norm()
        return max(abs(float(output[0]) - loss) / loss, float(far))

    allowed = 1e-5 if dtype == torch.float32 else 5e-2
    functions = {
        "official": official_loss,
        "official compiled": torch.compile(official_loss),
        "fastmoco": fused,
    }
    contenders = [Contender(name, step(f), error, allowed) for name, f in functions.items()]
    case = {"N": n, "C": c, "K": k, "dtype": str(dtype)[6:], "device": device.type}
    return "info_nce", case, contenders


def enqueue_race(n: int, c: int, k: int, device: torch.device) -> Race:
    """Loss, backward and enqueue, float32; the official enqueue reads the pointer on the host."""
    case = {"N": n, "C": c, "K": k, "dtype": "float32", "device": device.type}
    generator = torch.Generator().manual_seed(1)
    q, queue = (normalize(torch.randn(r, c, generator=generator), dim=1).to(device) for r in (n, k))
    pointer = torch.zeros(1, dtype=torch.int64, device=device)
    queues = {"official": queue.clone(), "fastmoco": queue.clone()}

    def official_step() -> Tensor:
        ring, leaf = queues["official"], q.detach().requires_grad_(True)
        pointer.zero_()
        loss = official_loss(leaf, q, ring, 0.2)
        at = int(pointer)
        ring[at : at + n] = q
        torch.autograd.grad(loss, leaf)
        return ring

    def fused_step() -> Tensor:
        ring, leaf = queues["fastmoco"], q.detach().requires_grad_(True)
        pointer.zero_()
        loss = info_nce_enqueue(leaf, q, q, ring, pointer, 0.2).loss
        torch.autograd.grad(loss, leaf)
        return ring

    def error(ring: Tensor) -> float:
        return float((ring[:n] - q).abs().max())

    contenders = [
        Contender("official", official_step, error, 0.0),
        Contender("fastmoco", fused_step, error, 0.0),
    ]
    return "info_nce_enqueue", case, contenders


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

    def two_passes(targets: list[Tensor]) -> None:
        torch._foreach_mul_(targets, MOMENTUM)
        torch._foreach_add_(targets, sources, alpha=1.0 - MOMENTUM)

    @torch.compile
    def compiled(targets: list[Tensor]) -> None:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(target * MOMENTUM + source * (1.0 - MOMENTUM))

    def contender(name: str, update: Callable[[Any], None], parameters: bool = False) -> Contender:
        plain = _draw(shapes, 2, device)
        targets: list[Any] = (
            [torch.nn.Parameter(t, requires_grad=False) for t in plain] if parameters else plain
        )

        def run() -> list[Any]:
            with torch.no_grad():
                update(targets)
            return targets

        return Contender(name, run, lambda out: error(out), 1e-5)

    def error(targets: list[Tensor], calls: int = 3) -> float:
        start = _draw(shapes[:3], 2, device)
        worst = 0.0
        for at, (t, s) in enumerate(zip(start, sources, strict=False)):
            want = s.double() + MOMENTUM**calls * (t.double() - s.double())
            worst = max(worst, float((targets[at].double() - want).abs().max()))
        return worst

    contenders = [
        contender("official", official, parameters=True),
        contender("official compiled", compiled),
        contender("foreach mul, add", two_passes),
        contender("timm: foreach lerp", lambda t: torch._foreach_lerp_(t, sources, 1 - MOMENTUM)),
        contender("fastmoco", lambda t: ema_(t, sources, MOMENTUM)),
    ]
    return "ema", {"model": "resnet50 mlp", "device": device.type}, contenders


def sgd_ema_race(device: torch.device) -> Race:
    """SGD with momentum and weight decay, then the momentum update, of ResNet-50."""
    shapes = resnet50_shapes()
    grads = [0.01 * g for g in _draw(shapes, 1, device)]
    few = shapes[:3]
    want = _sgd_then_ema(_draw(few, 3, device), _draw(few, 4, device), grads[:3], calls=3)

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
    lr = torch.tensor(LR, device=device)

    def fused() -> list[Tensor]:
        sgd_ema_(
            params,
            grads,
            buffers,
            ema,
            lr=lr,
            momentum=SGD_MOMENTUM,
            weight_decay=WEIGHT_DECAY,
            ema_momentum=MOMENTUM,
        )
        return params[:3] + ema[:3]

    def error(got: list[Tensor]) -> float:
        return max(float((g.double() - w).abs().max()) for g, w in zip(got, want, strict=True))

    contenders = [
        Contender("official", stepper(True), error, 1e-5),
        Contender("foreach SGD, ema_", stepper(False), error, 1e-5),
        Contender("fastmoco", fused, error, 1e-5),
    ]
    return "sgd_ema", {"model": "resnet50 mlp", "device": device.type}, contenders


def _sgd_then_ema(
    params: list[Tensor], ema: list[Tensor], grads: list[Tensor], calls: int
) -> list[Tensor]:
    """Parameters and their averages after some steps in float64, written out."""
    params, ema = ([t.double() for t in tensors] for tensors in (params, ema))
    buffers = [torch.zeros_like(p) for p in params]
    for _ in range(calls):
        buffers = [
            SGD_MOMENTUM * b + g.double() + WEIGHT_DECAY * p
            for b, g, p in zip(buffers, grads, params, strict=True)
        ]
        params = [p - LR * b for p, b in zip(params, buffers, strict=True)]
        ema = [MOMENTUM * e + (1 - MOMENTUM) * p for e, p in zip(ema, params, strict=True)]
    return params + ema


def races(device: torch.device) -> dict[str, list[Callable[[], Race]]]:
    """All cases by op, built when they are run."""
    f32, bf16 = torch.float32, torch.bfloat16
    return {
        "info_nce": [
            lambda: loss_race(256, 128, 65536, f32, device),
            lambda: loss_race(256, 128, 65536, bf16, device),
            lambda: loss_race(32, 128, 65536, f32, device),
        ],
        "info_nce_enqueue": [lambda: enqueue_race(256, 128, 65536, device)],
        "ema": [lambda: ema_race(device)],
        "sgd_ema": [lambda: sgd_ema_race(device)],
        "batch_norm": [
            lambda: batch_norm_race(32, 64, 112, False, device),
            lambda: batch_norm_race(32, 256, 56, True, device),
            lambda: batch_norm_race(32, 256, 14, False, device),
            lambda: batch_norm_race(32, 1024, 14, True, device),
        ],
        **cpu_races(device),
    }


def profile(contenders: list[Contender], folder: Path, name: str, device: torch.device) -> None:
    """A trace per contender for chrome://tracing; its ten costliest operations on the screen."""
    folder.mkdir(parents=True, exist_ok=True)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    for contender in contenders:
        contender.run()
        with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
            contender.run()
        profiler.export_chrome_trace(str(folder / f"{name}-{contender.name.split(':')[0]}.json"))
        print(f"\n{name}: {contender.name}")
        print(profiler.key_averages().table(sort_by=key, row_limit=10, max_name_column_width=40))


@terminal.command("kernels")
def main(arguments: Sequence[str]) -> None:
    """Race what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", metavar="OP")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--profile", type=Path, metavar="DIR")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    known = races(device)
    if options.only not in (None, *known):
        parser.error(f"--only knows {', '.join(known)} here, not {options.only}")
    torch.set_num_threads(options.threads)
    where = origin(device, options.save)
    for op, builders in known.items():
        if options.only not in (None, op):
            continue
        for build in builders:
            name, case, contenders = build()
            if options.profile:
                profile(contenders, options.profile, name, device)
                continue
            timings = race(contenders, device, options.rounds)
            print(f"\n{name} {case}\n{table(timings, 'official')}", flush=True)
            if options.save:
                append_rows(RESULTS / "kernels.jsonl", name, case, timings, where)


if __name__ == "__main__":
    sys.exit(main())
